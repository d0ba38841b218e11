"""Folders and file systems that are unlike others."""

import errno
import json
import os
from pathlib import Path

import pytest

from relish.cache import lock
from relish.cache.reader import open_cache
from relish.cache.verify import verify_cache
from relish.extract.backbone import Backbone
from relish.extract.pipeline import extract_cache
from relish.extract.settings import ExtractSettings

from ..disk import read_only


@pytest.fixture
def extract(run_cli, tiny_model, tiny_rows, tmp_path):
    table = tmp_path / "train.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(12)), encoding="utf-8")

    def run(folder, *more):
        fixed = ("--label-range", "0,5", "--device", "cpu", "--shard-rows", "4")
        return run_cli("extract", folder, "--model", tiny_model("llama"), "--data", f"train={table}", *fixed, *more)

    return run


def whole(folder):
    assert verify_cache(open_cache(folder)) == []
    assert len(open_cache(folder).split("train")) == 12


def refused(result, *parts):
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("name", ["with spaces", "кэш-缓存-ذاكرة", "quote'\"s & $x", "c" * 200])
def test_a_path_of_any_characters(extract, tmp_path, name):
    assert extract(tmp_path / name / "c").exit_code == 0
    whole(tmp_path / name / "c")


def test_a_relative_path_after_a_change_of_folder(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    real = Backbone.hidden_states

    def wander(self, rows):
        os.chdir(tmp_path / "b")
        return real(self, rows)

    monkeypatch.setattr(Backbone, "hidden_states", wander)
    rows = [{"text": "a film", "score": 1}, {"text": "a play so dull", "score": 2}]
    fixed = {"label_range": (0.0, 5.0), "device": "cpu", "shard_rows": 1}
    extract_cache("c", ExtractSettings(model=tiny_model("llama"), data={"train": rows}, **fixed))
    assert list((tmp_path / "b").iterdir()) == []
    monkeypatch.chdir(tmp_path / "a")
    split = open_cache("c").split("train")
    os.chdir(tmp_path / "b")
    assert split.read([0, 1]).hidden.isfinite().all()
    split.close()


def test_a_cache_folder_that_is_a_link(extract, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert extract(tmp_path / "link").exit_code == 0
    assert (tmp_path / "link").is_symlink()
    whole(tmp_path / "real")
    assert "everything was there already" in extract(tmp_path / "link").stdout


def test_a_read_only_folder(extract, tmp_path):
    with read_only(tmp_path / "c") as folder:
        for place in (folder, folder / "new"):
            refused(
                extract(place),
                f"error: {place} cannot be written (Read-only file system); make the folder writable, or choose "
                "another one",
            )


def test_a_finished_cache_on_a_read_only_file_system_is_read(extract, run_cli, tmp_path):
    extract(tmp_path / "c")
    with read_only(tmp_path / "c") as folder:
        whole(folder)
        assert run_cli("cache", "verify", folder).exit_code == 0
        assert "everything was there already" in extract(folder).stdout
        refused(
            run_cli("cache", "repair", folder),
            f"error: {folder} cannot be written (Read-only file system); make the folder writable, or choose another "
            "one",
        )


@pytest.mark.parametrize(
    ("step", "number"),
    [("open", errno.EACCES), ("fsync", errno.EIO), ("replace", errno.EXDEV), ("replace", errno.EACCES)],
)
def test_the_file_system_refuses_midway(extract, tmp_path, monkeypatch, step, number):
    """Permission lost, a disk error, a rename across file systems."""
    folder, real, seen = tmp_path / "c", getattr(os, step), []

    def refuse(*arguments, **options):
        if "train-00001.h5" in str(arguments[0]) or (step == "fsync" and (folder / ".train-00001.h5.tmp").exists()):
            seen.append(arguments)
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, step, refuse)
        result = extract(folder)
    assert seen
    refused(
        result, f"error: {folder / 'train-00001.h5'} cannot be written ({os.strerror(number)}); finished shards are"
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "manifest.copy.json",
        "manifest.json",
        "train-00000.h5",
    ]
    assert extract(folder).exit_code == 0
    whole(folder)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(extract, tmp_path, monkeypatch, caplog, number):
    def none(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock, "_lock", none)
    assert extract(tmp_path / "c").exit_code == 0
    whole(tmp_path / "c")
    assert caplog.messages == [
        f"note: locks are not supported in {tmp_path / 'c'}; make sure that only one process writes there"
    ]


def test_what_a_dead_process_left_behind_is_no_hindrance(extract, tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    for name in (".lock", ".train-00000.h5.tmp", ".manifest.json.tmp", ".manifest.copy.json.tmp", "train-00001.h5"):
        (folder / name).write_bytes(b"left behind")
    assert extract(folder).exit_code == 0
    whole(folder)
    assert not list(folder.glob(".*.tmp"))
    assert Path(folder / ".lock").exists()
