import errno
import os
from pathlib import Path

import pytest

from relish.cache.errors import CacheError
from relish.cache.lock import LOCK, lock_folder
from relish.cache.merge import merge_caches
from relish.cache.reader import open_cache
from relish.cache.verify import verify_cache

from ..disk import fill, small_disk


@pytest.fixture
def parts(make, tmp_path):
    train = make.write(tmp_path / "a", {"train": make.rows()})
    test = make.write(tmp_path / "b", {"test": make.rows(seed=1), "dev": make.rows(seed=2)})
    return train, test


def message(out, caches):
    with pytest.raises(CacheError) as caught:
        merge_caches(out, caches)
    return str(caught.value)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_splits_come_together_byte_for_byte(make, parts, tmp_path):
    merge_caches(tmp_path / "all", list(parts))
    whole = {"train": make.rows(), "test": make.rows(seed=1), "dev": make.rows(seed=2)}
    assert make.contents(tmp_path / "all") == make.contents(make.write(tmp_path / "whole", whole))
    assert verify_cache(open_cache(tmp_path / "all")) == []


def test_the_parts_stay_as_they_are(make, parts, tmp_path):
    before = [make.contents(part) for part in parts]
    merge_caches(tmp_path / "all", list(parts))
    assert [make.contents(part) for part in parts] == before


@pytest.mark.parametrize("turned", [False, True])
def test_of_one_split_in_two_caches_the_finished_is_taken(make, parts, tmp_path, turned):
    make.fill(make.open_writer(tmp_path / "half"), "train", make.rows(), stop_after=1)
    caches = [tmp_path / "half", parts[0]]
    merge_caches(tmp_path / "all", caches[::-1] if turned else caches)
    assert make.contents(tmp_path / "all") == make.contents(parts[0])


def test_an_unfinished_split_can_be_gone_on_with_after_merging(make, parts, tmp_path):
    make.fill(make.open_writer(tmp_path / "half"), "train", make.rows(), stop_after=1)
    merge_caches(tmp_path / "all", [tmp_path / "half"])
    make.fill(make.open_writer(tmp_path / "all"), "train", make.rows())
    assert make.contents(tmp_path / "all") == make.contents(parts[0])


def test_an_empty_folder_may_be_there_already(parts, tmp_path):
    (tmp_path / "all").mkdir()
    merge_caches(tmp_path / "all", list(parts))
    assert open_cache(tmp_path / "all").splits == ("train", "test", "dev")


def test_a_folder_that_holds_something_is_refused(make, parts, tmp_path):
    before = make.contents(parts[0])
    assert message(parts[0], [parts[1]]) == f"{parts[0]} exists and is not an empty folder; merge into a new one"
    assert make.contents(parts[0]) == before


def test_a_folder_that_another_process_writes_into_is_refused(make, parts, tmp_path):
    out = tmp_path / "all"
    with lock_folder(out, CacheError):
        assert message(out, list(parts)) == (
            f"another process is writing into {out}; wait until it is done, or stop it"
        )
    merge_caches(out, list(parts))
    assert open_cache(out).splits == ("train", "test", "dev")


def test_another_identity_is_refused(make, parts, tmp_path):
    other = make.write(tmp_path / "other", layers=(2,))
    assert message(tmp_path / "all", [parts[0], other]) == (
        f"the cache {parts[0]}, against {other}, was made with something else: layers is (3,) there and (2,) here. "
        "Only caches of one identity can be merged."
    )
    assert not (tmp_path / "all").exists()


def test_another_label_range_is_refused(make, parts, tmp_path):
    other = tmp_path / "other"
    make.fill(make.open_writer(other, label_range=(1.0, 5.0)), "test", make.rows(seed=1))
    assert message(tmp_path / "all", [parts[0], other]) == (
        f"{other} has the label range (1.0, 5.0), {parts[0]} has (0.0, 5.0); "
        "only caches of one label range can be merged"
    )


def test_one_split_made_from_different_rows_is_refused(make, parts, tmp_path):
    other = make.write(tmp_path / "other", {"train": make.rows(seed=5)})
    assert message(tmp_path / "all", [parts[0], other]) == (
        f"the split 'train' is in {parts[0]} and in {other}, made from different rows; "
        "extract one of them under another split name"
    )


def test_a_damaged_shard_is_named_and_nothing_is_left(make, parts, tmp_path):
    record = open_cache(parts[1]).manifest.splits["dev"].shards[1]
    make.flip(parts[1] / record.file, record.offset)
    assert message(tmp_path / "all", list(parts)).startswith(
        f"nothing was merged: the shard {parts[1] / record.file} is damaged: the hidden states of row "
    )
    assert names(tmp_path / "all") == [LOCK]
    make.flip(parts[1] / record.file, record.offset)
    merge_caches(tmp_path / "all", list(parts))


def test_a_missing_shard_is_named_and_nothing_is_left(parts, tmp_path):
    (parts[1] / "dev-00001.h5").unlink()
    assert message(tmp_path / "all", list(parts)) == (
        f"nothing was merged: the shard {parts[1] / 'dev-00001.h5'} is missing; "
        f"restore it from a copy, or run: relish cache repair {parts[1]}"
    )
    assert names(tmp_path / "all") == [LOCK]


@pytest.mark.parametrize("turned", [False, True])
def test_the_finished_split_is_taken_though_the_unfinished_has_more_shards(make, tmp_path, turned):
    whole = make.write(tmp_path / "whole")
    make.fill(make.open_writer(tmp_path / "half"), "train", make.rows(), shard_rows=1, stop_after=9)
    assert len(open_cache(tmp_path / "half").manifest.splits["train"].done) > 4
    caches = [tmp_path / "half", whole]
    merge_caches(tmp_path / "all", caches[::-1] if turned else caches)
    assert make.contents(tmp_path / "all") == make.contents(whole)


@pytest.mark.parametrize("turned", [False, True])
def test_of_two_unfinished_the_one_with_more_rows_is_taken(make, tmp_path, turned):
    make.fill(make.open_writer(tmp_path / "many"), "train", make.rows(), shard_rows=1, stop_after=3)
    make.fill(make.open_writer(tmp_path / "more"), "train", make.rows(), shard_rows=4, stop_after=1)
    caches = [tmp_path / "many", tmp_path / "more"]
    merge_caches(tmp_path / "all", caches[::-1] if turned else caches)
    assert make.contents(tmp_path / "all") == make.contents(tmp_path / "more")


@pytest.mark.parametrize("leave", [0, 8_192, 20_480, 28_672])
def test_a_full_disk_is_named_and_nothing_is_left(make, parts, tmp_path, run_cli, leave):
    """In a shard, at the manifest's copy, at the manifest."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        filler = fill(disk, leave)
        result = run_cli("cache", "merge", disk / "all", *parts)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: {disk / 'all'}")
        assert result.stderr.endswith(
            " cannot be written (No space left on device); nothing was merged: free space, and run the same command "
            "again\n"
        )
        assert not (disk / "all").exists() or names(disk / "all") == [LOCK]
        filler.unlink()
        assert run_cli("cache", "merge", disk / "all", *parts).exit_code == 0
        assert verify_cache(open_cache(disk / "all")) == []


@pytest.mark.parametrize("name", ["manifest.copy.json", "manifest.json"])
def test_a_manifest_that_cannot_be_written_leaves_nothing(parts, tmp_path, monkeypatch, name):
    real = Path.replace

    def refuse(path, target):
        if target.name == name:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        assert message(tmp_path / "all", list(parts)) == (
            f"{tmp_path / 'all' / name} cannot be written ({os.strerror(errno.EDQUOT)}); nothing was merged: free "
            "space, and run the same command again"
        )
    assert names(tmp_path / "all") == [LOCK]
