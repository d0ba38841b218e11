import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from relish.cache.jsonfile import sealed_text
from relish.cli import app
from relish.train.settings import HEADS

from .conftest import write_cache

FAST = ["--epochs", 1, "--latent-size", 32, "--num-heads", 4, "--device", "cpu", "--threads", 1]


def relish(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_grid_its_json_and_running_it_again(cache, tmp_path):
    words = ["train", cache, "--out", tmp_path / "runs", "--head", "relish,ridge", "--depths", "1-2", *FAST]
    result = relish(*words, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert [(c["head"], c["depth"], c["seed"]) for c in figures["cells"]] == [
        ("relish", 1, 0),
        ("relish", 2, 0),
        ("ridge", 0, 0),
    ]
    assert 0 < figures["cells"][0]["val"]["nrmse"] < 2
    assert "note: 6 steps per cell are few; a larger --epochs usually helps" in result.stderr
    again = relish(*words)
    assert again.exit_code == 0
    assert again.stderr.count("there already") == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--depths", "5-1"], "the grid is empty: --depths '5-1' holds no number"),
        (["--head", ","], "the grid is empty: heads has no value"),
        (["--head", "cnn"], f"there is no head 'cnn'; there are {', '.join(HEADS)}"),
        (["--layer", "7"], "holds the layers 2, not 7"),
        (["--layer", "0.5"], "--layer takes an index such as 15, or mix; not '0.5'"),
        (["--layer", "mix", "--head", "relish,ridge"], "ridge cannot learn a mix of layers"),
        (["--val-split", "nope"], "has no split 'nope', only train, dev, test"),
    ],
)
def test_wrong_input_ends_with_code_2_and_one_sentence(cache, tmp_path, words, message):
    result = relish("train", cache, "--out", tmp_path / "runs", *FAST, *words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_every_head_in_one_grid_as_the_help_shows_it(cache, tmp_path):
    words = ["train", cache, "--out", tmp_path / "runs", *FAST, "--head", ",".join(HEADS), "--depths", "1-2"]
    result = relish(*words, "--seeds", "0-1", "--workers", 1, "--json")
    assert result.exit_code == 0, result.output
    cells = [(cell["head"], cell["depth"], cell["seed"]) for cell in json.loads(result.stdout)["cells"]]
    assert cells == [
        *(("relish", depth, seed) for depth in (1, 2) for seed in (0, 1)),
        *((head, 0, seed) for head in HEADS if head not in ("relish", "ridge", "ridge-mean") for seed in (0, 1)),
        ("ridge", 0, 0),
        ("ridge-mean", 0, 0),
    ]
    shown = " ".join(relish("train", "--help").stdout.replace("│", " ").split())
    assert f"{', '.join(HEADS)}; several with commas" in shown
    assert f"--head {','.join(HEADS)}" in shown


def test_a_cache_of_another_version_and_one_without_a_training_split(cache, tmp_path):
    other = write_cache(tmp_path / "other", sizes={"test": 20})
    result = relish("train", other, "--out", tmp_path / "runs", *FAST)
    assert (result.exit_code, "has no split 'train', only test" in result.stderr) == (2, True)
    manifest = json.loads((other / "manifest.json").read_text())
    del manifest["sha256"]
    (other / "manifest.json").write_text(sealed_text({**manifest, "version": 2}), encoding="utf-8")
    result = relish("train", other, "--out", tmp_path / "runs", *FAST)
    assert result.exit_code == 2
    assert "has format version 2, and this relish reads version 1; install the relish that wrote it" in result.stderr


def test_an_output_folder_of_another_run(cache, tmp_path):
    assert relish("train", cache, "--out", tmp_path / "runs", *FAST).exit_code == 0
    result = relish("train", cache, "--out", tmp_path / "runs", *FAST, "--seeds", 1, "--loss", "huber")
    assert result.exit_code == 2
    assert "holds runs of another training: relish-L3-seed0 has loss 'mse', this one 'huber'" in result.stderr


def test_the_figure_that_chooses_the_epoch(cache, tmp_path):
    words = ["train", cache, "--out", tmp_path / "runs", *FAST, "--best-by"]
    assert relish(*words, "pearson").exit_code == 0
    config = json.loads((tmp_path / "runs" / "relish-L3-seed0" / "config.json").read_text())
    assert config["settings"]["best_by"] == "pearson"
    result = relish(*words, "nrmse")
    assert "relish-L3-seed0 has best_by 'pearson', this one 'nrmse'" in result.stderr


def test_each_head_has_its_own_rate_and_decay(cache, tmp_path):
    for folder, more in (("own", ()), ("given", ("--lr", 1e-3, "--weight-decay", 0.5))):
        result = relish("train", cache, "--out", tmp_path / folder, *FAST, "--head", "relish,linear,ridge", *more)
        assert result.exit_code == 0, result.stderr
    found = {
        (folder, head): json.loads((tmp_path / folder / f"{head}-seed0" / "config.json").read_text())["settings"]
        for folder in ("own", "given")
        for head in ("relish-L3", "linear-L0", "ridge-L0")
    }
    recipes = {name: (settings["lr"], settings["weight_decay"]) for name, settings in found.items()}
    assert recipes == {
        ("own", "relish-L3"): (3e-4, 9.0),
        ("own", "linear-L0"): (1e-3, 9.0),
        ("own", "ridge-L0"): (None, None),
        ("given", "relish-L3"): (1e-3, 0.5),
        ("given", "linear-L0"): (1e-3, 0.5),
        ("given", "ridge-L0"): (None, None),
    }


def test_diverged_cells_are_named_and_the_code_is_2(tmp_path):
    cache = write_cache(tmp_path / "c", fill=3e38)
    result = relish("train", cache, "--out", tmp_path / "runs", "--head", "mlp", "--no-standardise", *FAST)
    assert result.exit_code == 2
    assert "error: mlp-L0-seed0 diverged: the loss was no longer finite by step 6. " in result.stderr
    assert ("The other cells are there" in result.stderr, "next: relish evaluate" in result.stdout) == (False, False)


def test_as_a_real_process(cache, tmp_path):
    words = [sys.executable, "-m", "relish", "train", str(cache), "--out", "runs", *map(str, FAST)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/relish-L3-seed0/model.safetensors").exists()


def test_memory_stays_flat_however_large_the_cache(tmp_path):
    """Eight times the rows add less than a tenth of their bytes to the peak of a training process."""
    resource = pytest.importorskip("resource")
    assert resource
    small = write_cache(tmp_path / "small", sizes={"train": 500, "dev": 50}, hidden=2048)
    large = write_cache(tmp_path / "large", sizes={"train": 4000, "dev": 50}, hidden=2048)
    peaks, sizes = [], []
    for cache in (small, large):
        code = (
            "import resource, sys\n"
            "from relish.cli import app\n"
            "app(sys.argv[1:], standalone_mode=False)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        )
        words = [
            "train",
            str(cache),
            "--out",
            f"{cache}-runs",
            "--head",
            "linear",
            *map(str, FAST),
            "--batch-size",
            "64",
        ]
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, env=environment
        )
        peaks.append(int(done.stdout.split()[-1]) * 1024)
        sizes.append(sum(path.stat().st_size for path in cache.glob("*.h5")))
    assert sizes[1] - sizes[0] > 80e6
    assert peaks[1] - peaks[0] < 0.1 * (sizes[1] - sizes[0])
