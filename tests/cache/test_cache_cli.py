import json
import os
import subprocess
import sys

import pytest

from relish.cache.manifest import load_manifest


@pytest.fixture
def cache(make, tmp_path):
    return make.write(tmp_path / "c", {"train": make.rows(), "test": make.rows(seed=1, truncated=2)}, layers=(1, 3))


def refused(result, sentence):
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.strip() == f"error: {sentence}"


def test_info_shows_the_cache_on_one_screen(run_cli, cache, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = run_cli("cache", "info", cache)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["split", "rows", "tokens", "longest", "shards", "MB", "padding"]
    assert lines[1].split()[:5] == ["train", "10", "382", "60", "4"]
    assert "60 (2 cut)" in lines[2]
    assert max(map(len, lines)) <= 100
    for fact in ("label range", "0 to 5", "org/model", "[1, 3]", "bfloat16", "Text: {text}"):
        assert fact in result.stdout


def test_info_shows_a_prompt_of_many_lines_on_one(run_cli, make, tmp_path):
    folder = make.write(tmp_path / "c", prompt="Rate:\n{text}\nScore:")
    assert r"Rate:\n{text}\nScore:" in run_cli("cache", "info", folder).stdout


def test_info_as_json(run_cli, cache, make):
    result = run_cli("cache", "info", cache, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    figures = json.loads(result.stdout)
    assert figures["identity"] == json.loads(json.dumps(make.identity(layers=(1, 3)).to_json()))
    assert figures["label_range"] == [0, 5]
    assert figures["splits"]["test"] == {
        "rows": 10,
        "tokens": 382,
        "longest": 60,
        "truncated": 2,
        "skipped": [],
        "shards": 4,
        "planned": 4,
        "complete": True,
        "bytes": sum(path.stat().st_size for path in cache.glob("test-*.h5")),
        "padding_overhead": round(389 / 382, 4),
    }
    assert figures["bytes"] == sum(path.stat().st_size for path in cache.glob("*.h5"))


def test_info_says_how_far_an_unfinished_split_is(run_cli, make, tmp_path):
    make.fill(make.open_writer(tmp_path / "c"), "train", make.rows(), stop_after=1)
    assert "1 of 4" in run_cli("cache", "info", tmp_path / "c").stdout
    assert json.loads(run_cli("cache", "info", tmp_path / "c", "--json").stdout)["splits"]["train"]["complete"] is False


def test_verify_says_that_all_is_well(run_cli, cache):
    result = run_cli("cache", "verify", cache)
    assert (result.exit_code, result.stdout) == (0, f"{cache}: 8 shards, every byte as it was written\n")


def test_verify_names_each_bad_shard_and_exits_with_1(run_cli, cache, make):
    make.flip(cache / "train-00000.h5", load_manifest(cache).splits["train"].shards[0].offset)
    os.truncate(cache / "test-00001.h5", 100)
    result = run_cli("cache", "verify", cache)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"the shard {cache / 'train-00000.h5'} is damaged: the hidden states of row ")
    assert lines[1].startswith(f"the shard {cache / 'test-00001.h5'} has 100 bytes, ")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere paths are Unicode")
def test_a_path_that_is_no_unicode_is_printed_with_escapes(cache, tmp_path):
    moved = cache.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    done = subprocess.run(
        [sys.executable, "-m", "relish", "cache", "verify", moved],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/caf\\udce9: 8 shards, every byte as it was written\n"


def test_merge_makes_one_cache(run_cli, make, tmp_path):
    make.write(tmp_path / "a", {"train": make.rows()})
    make.write(tmp_path / "b", {"test": make.rows(seed=1)})
    result = run_cli("cache", "merge", tmp_path / "all", tmp_path / "a", tmp_path / "b")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'all'}: splits train, test\n")


@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_folder_that_is_no_cache_is_refused(run_cli, tmp_path, command):
    refused(
        run_cli("cache", command, tmp_path),
        f"{tmp_path} is not a relish cache: it has no manifest.json. Make one with: relish extract {tmp_path} …",
    )


def test_merging_different_caches_is_refused(run_cli, cache, make, tmp_path):
    other = make.write(tmp_path / "other", layers=(2,))
    refused(
        run_cli("cache", "merge", tmp_path / "all", cache, other),
        f"the cache {cache}, against {other}, was made with something else: layers is (1, 3) there and (2,) here. "
        "Only caches of one identity can be merged.",
    )
