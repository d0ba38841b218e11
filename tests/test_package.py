"""The package as a user meets it: light imports, fixed names, imports that run downward, and the wheel."""

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import relish

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("cache", "extract", "train", "evaluate")
MAY_IMPORT = {
    "cache": {"cache"},
    "extract": {"extract", "cache"},
    "train": {"train", "cache"},
    "evaluate": {"evaluate", "train", "extract", "cache"},
}
PUBLIC = [
    "ExtractSettings",
    "FeatureCache",
    "RelishError",
    "RelishHead",
    "TrainSettings",
    "TuneSettings",
    "__version__",
    "evaluate_runs",
    "extract_cache",
    "load_head",
    "open_cache",
    "predict_scores",
    "train_heads",
    "tune_adapter",
]


def run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def loaded_by(statement: str, *modules: str) -> list[str]:
    """Which of the modules a statement brings in, in a process of its own."""
    code = f"{statement}\nimport sys\nprint(*(m for m in {modules!r} if m in sys.modules))"
    return run(sys.executable, "-c", code).split()


# Imports


def test_import_relish_is_light() -> None:
    assert loaded_by("import relish", "torch", "transformers", "numpy", "h5py", "typer") == []


def test_the_command_line_is_light() -> None:
    assert loaded_by("import relish.cli", "torch", "transformers", "numpy", "scipy", "h5py", "matplotlib") == []


@pytest.mark.parametrize(
    "module", ["cache.reader", "cache.writer", "train.grid", "train.run", "evaluate.results", "evaluate.predict"]
)
def test_no_stage_but_extract_needs_transformers(module: str) -> None:
    assert loaded_by(f"import relish.{module}", "transformers", "datasets", "huggingface_hub", "matplotlib") == []


def test_public_names_are_these_and_all_resolve() -> None:
    assert sorted(relish.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(relish, name) is not None
        assert name in dir(relish)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'relish' has no attribute 'relish_head'"):
        relish.relish_head  # noqa: B018


def package_imports(path: Path) -> list[tuple[int, str]]:
    """(line, what) of each import of this package in a file: "cache", "extract" … or "" for the package itself."""
    stage = path.relative_to(ROOT).parts[0] if path.parent != ROOT else ""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            modules = [stage or (node.module or "").partition(".")[0]]
        elif isinstance(node, ast.ImportFrom) and node.level > 1:
            modules = [node.module] if node.module else [f"{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""] if (node.module or "").partition(".")[0] == "relish" else []
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.partition(".")[0] == "relish"]
        else:
            continue
        found += [(node.lineno, module.partition(".")[0]) for module in modules]
    return found


def test_imports_run_downward_only() -> None:
    wrong = []
    for stage in STAGES:
        for path in sorted((ROOT / stage).rglob("*.py")):
            for line, what in package_imports(path):
                if what not in MAY_IMPORT[stage]:
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {what}")
    assert wrong == []


def test_the_walk_sees_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "cache" / "a.py"
    path.parent.mkdir()
    path.write_text(
        "import os\nimport relish.train\nfrom relish.train import grid\nfrom .b import c\nfrom ..train.grid import d\n"
        "from .. import extract\ndef f():\n    from ..evaluate import x\n",
        encoding="utf-8",
    )
    found = [(2, "relish"), (3, "relish"), (4, "cache"), (5, "train"), (6, "extract"), (8, "evaluate")]
    assert sorted(package_imports(path)) == found


# Processes


def test_help_runs_as_a_process_and_answers_in_half_a_second() -> None:
    command = shutil.which("relish", path=str(Path(sys.executable).parent))
    assert command is not None, "the command relish is not installed beside this python"
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        shown = run(command, "--help")
        seconds.append(time.perf_counter() - started)
    for name in ("extract", "tune", "train", "evaluate", "predict", "demo", "cache"):
        assert re.search(rf"^  {name} ", shown, re.MULTILINE)
    median = statistics.median(seconds)
    assert median < 0.5, f"relish --help took {median:.2f} s (median of {len(seconds)}); what does it import?"


def test_python_m_relish_shows_the_same_help() -> None:
    shown = run(sys.executable, "-m", "relish", "--help")
    assert "extract runs the LLM once and caches its hidden states" in shown


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that the checkout gets no build folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "py.typed", *(p.name for p in ROOT.glob("*.py"))):
        shutil.copy2(ROOT / name, source / name)
    for name in (*STAGES, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel alone is installed into."""
    folder = tmp_path_factory.mktemp("target")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wheel.name == f"relish_llm-{relish.__version__}-py3-none-any.whl"
    assert {name.partition("/")[0] for name in names} == {"relish", f"relish_llm-{relish.__version__}.dist-info"}
    assert {"relish/py.typed", "relish/cache/README.md", "relish/evaluate/report.html"} <= names
    assert [name for name in names if "test" in name or "benchmark" in name] == []
    there = {f"relish/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("*.py")}
    for stage in STAGES:
        there |= {f"relish/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / stage).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == there


def test_the_installed_wheel_works_and_takes_no_other_name(target: Path, tmp_path: Path) -> None:
    packages = {path.name for path in target.iterdir() if path.is_dir() and not path.name.endswith(".dist-info")}
    assert packages - {"bin"} == {"relish"}
    code = "import relish; print(relish.__file__); print(relish.RelishHead(hidden_size=8, depth=1).hidden_size)"
    path = {"PYTHONPATH": str(target)}
    where, size = run(sys.executable, "-c", code, cwd=tmp_path, env=path).splitlines()
    assert Path(where).is_relative_to(target)
    assert size == "8"
    assert "Usage: " in run(sys.executable, "-m", "relish", "--help", cwd=tmp_path, env=path)


def test_the_version_is_the_same_everywhere() -> None:
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert project is not None
    assert project[1] == relish.__version__
    assert f"## [{relish.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
