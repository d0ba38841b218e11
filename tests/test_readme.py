"""What README.md and cache/README.md show is true: their Python runs, their commands and files exist."""

import csv
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from relish.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CACHE_README = (ROOT / "cache" / "README.md").read_text(encoding="utf-8")
PACKAGE = ("cache", "extract", "train", "evaluate")
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "RESULTS.md", "cache/README.md"),
    *("benchmarks/recipe-log.md", "benchmarks/speed-log.md"),
]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The lines after "$ " in console blocks, continued lines joined, without comments."""
    found = []
    for block in blocks(text, "console"):
        joined = block.replace("\\\n", " ")
        found += [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]
    return found


def relish_commands() -> list[str]:
    documents = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return [line for line in commands(documents) if re.match(r"(\w+=\S+ )*relish ", line)]


def file_tree() -> list[str]:
    """Paths of the last text block: folders end with a slash, files are indented by two spaces in their folder."""
    paths, folder = [], ""
    for line in blocks(README, "text")[-1].splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            folder = name
            paths.append(name)
        else:
            paths.append(f"{folder}{name}" if line.startswith("  ") else name)
    return paths


def parse(argv: list[str]) -> Any:
    """Parse a command line as the real command does, without running it."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *argv = argv
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
    return command.make_context(command.name, argv).params


def every_option(command: Any) -> set[str]:
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(every_option(child) for child in getattr(command, "commands", {}).values()), {"--help"})


def test_the_first_python_block_runs_and_prints_what_it_says() -> None:
    code = blocks(README, "python")[0]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(r"print\(.*#\s*(torch\.Size\(\[\d+\]\)|\d+)", code)
    assert done.stdout.splitlines() == said


def test_the_python_section_runs_from_texts_to_scores(
    tiny_model: Any, tiny_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("train", "dev", "test", "new")):
        with Path(f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text", "score"])
            writer.writeheader()
            writer.writerows(tiny_rows(40, seed))
    code = "\n".join(blocks(README, "python")[1:])
    hub_id = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
    assert hub_id in code
    exec(compile(code.replace(hub_id, repr(str(tiny_model("llama")))), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "('train', 'dev', 'test') (2,) 32 (0.0, 5.0)"
    assert [line.partition(" 0.")[0] for line in lines[1:4]] == ["ridge", "relish, L = 1", "relish, L = 3"]
    assert Path("film-report/report.html").exists()
    assert len(Path("scores.csv").read_text(encoding="utf-8").splitlines()) == 41


def test_the_cache_readme_reads_a_shard_without_relish(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_cache, "my-cache")
    exec(compile(blocks(CACHE_README, "python")[0], "cache/README.md", "exec"), {})
    assert re.fullmatch(r"\S+ \S+ \(\d+, 32\) float32\nTrue\n", capsys.readouterr().out)


@pytest.mark.parametrize("line", relish_commands())
def test_a_command_line_parses(line: str) -> None:
    argv = shlex.split(line, comments=True)
    while argv[0] != "relish":
        argv.pop(0)  # a setting of the environment
    assert parse(argv[1:])


def test_command_lines_are_found() -> None:
    found = " ".join(relish_commands())
    for name in ("extract", "train", "evaluate", "predict", "cache info", "cache verify"):
        assert f"relish {name}" in found


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ("extract c --model m --no-such-option", "No such option"),
        ("cache inform c", "no command 'inform'"),
        ("train c", "Missing"),
    ],
)
def test_the_parser_of_this_test_notices(argv: str, error: str) -> None:
    with pytest.raises(Exception, match=error):
        parse(argv.split())


def test_options_in_the_prose_exist() -> None:
    prose = re.sub(r"^```.*?^```$", "", README + CACHE_README, flags=re.MULTILINE | re.DOTALL)
    named = {option for code in re.findall(r"`[^`]+`", prose) for option in re.findall(r"(?<!\S)`?(--[a-z-]+)", code)}
    assert "--layers" in named
    assert named - every_option(typer.main.get_command(app)) == set()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = {line.split()[1] for line in commands(text) if line.startswith("make ")}
    assert {"demo", "test", "check"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_file_of_the_tree_exists() -> None:
    missing = [path for path in file_tree() if not (ROOT / path).exists()]
    assert missing == []


def test_the_tree_shows_every_file_of_the_package() -> None:
    there = {path.name for path in ROOT.glob("*.py")}
    for folder in PACKAGE:
        there |= {f"{folder}/{path.name}" for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".html")}
    tree = file_tree()
    assert there - set(tree) == set()
    assert len(tree) == len(set(tree))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_files_lead_somewhere(document: str) -> None:
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("https://") and not (path.parent / t).exists()]
    assert missing == []


def test_the_tables_of_results_are_those_that_the_reports_gave() -> None:
    """Each line of the counts, of a table by LLM, of the averages and of the best rivals."""
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    tables = sorted((ROOT / "benchmarks" / "results").glob("*/overview.md"))
    assert tables
    for path in tables:
        text = path.read_text(encoding="utf-8").splitlines()
        lines = [line for line in text if line.startswith("| ") and not line.startswith("| ---")]
        assert len(lines) > 30
        assert [line for line in lines if line not in results] == []


def test_every_field_of_the_manifest_is_described() -> None:
    from dataclasses import fields

    from relish.cache.archive import PackedShard
    from relish.cache.identity import Identity
    from relish.cache.manifest import Manifest, ShardRecord, SplitRecord
    from relish.cache.readouts import Readout

    for record in (Identity, Manifest, SplitRecord, ShardRecord, PackedShard, Readout):
        for field in fields(record):
            assert f"| `{field.name}` |" in CACHE_README, field.name
