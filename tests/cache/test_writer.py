import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relish.cache.errors import CacheError
from relish.cache.info import padding_overhead
from relish.cache.manifest import load_manifest
from relish.cache.reader import open_cache
from relish.cache.writer import cut_into_shards


def overhead(lengths, shards):
    return sum(lengths[shard].max() * len(shard) for shard in shards) / lengths.sum()


# Resuming


@pytest.mark.parametrize("stop_after", range(4))
@pytest.mark.parametrize("layers", [(3,), (1, 3)], ids=str)
def test_resuming_gives_the_bytes_of_an_unbroken_run(make, tmp_path, stop_after, layers):
    rows = make.rows()
    whole = make.write(tmp_path / "whole", {"train": rows}, layers=layers)
    broken, identity = tmp_path / "broken", make.identity(layers=layers)
    split = make.fill(make.open_writer(broken, identity), "train", rows, stop_after=stop_after)
    assert not split.record.complete
    split = make.fill(make.open_writer(broken, identity), "train", rows)
    assert split.record.complete
    assert make.contents(broken) == make.contents(whole)


def test_what_a_killed_process_leaves_behind_is_written_over(make, tmp_path):
    whole, broken, rows = make.write(tmp_path / "whole"), tmp_path / "broken", make.rows()
    make.fill(make.open_writer(broken), "train", rows, stop_after=1)
    (broken / ".train-00001.h5.tmp").write_bytes(b"half a shard")
    (broken / "train-00001.h5").write_bytes(b"a shard that the manifest does not list")
    (broken / ".manifest.json.tmp").write_bytes(b"{")
    make.fill(make.open_writer(broken), "train", rows)
    assert make.contents(broken) == make.contents(whole)


def test_a_process_killed_before_its_first_manifest_can_be_run_again(make, tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / ".train-00000.h5.tmp").write_bytes(b"half a shard")
    (folder / "train-00000.h5").write_bytes(b"not listed")
    assert make.contents(make.write(folder)) == make.contents(make.write(tmp_path / "whole"))


def test_shards_that_are_there_are_not_written_again(make, tmp_path):
    folder = make.write(tmp_path / "c")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    split = make.fill(make.open_writer(folder), "train", make.rows())
    assert list(split.pending()) == []
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_split_is_added_beside_those_that_are_there(make, tmp_path):
    folder = make.write(tmp_path / "c")
    before = make.contents(folder)
    make.fill(make.open_writer(folder), "test", make.rows(seed=1))
    after = make.contents(folder)
    assert open_cache(folder).splits == ("train", "test")
    assert {name: after[name] for name in before if name.endswith(".h5")} == {
        name: data for name, data in before.items() if name.endswith(".h5")
    }


# What is refused


def test_other_rows_are_refused(make, tmp_path):
    folder = make.write(tmp_path / "c")
    with pytest.raises(CacheError) as caught:
        make.open_writer(folder).split("train", make.rows((3, 2), seed=1), shard_rows=4)
    assert str(caught.value) == (
        f"the split 'train' of the cache {folder} was made from other rows (10 there, 2 here; ids, texts, targets, "
        "their order or their tokens differ). Give the file it was made from, or choose another split name or folder"
    )


def test_another_identity_is_refused(make, tmp_path):
    folder = make.write(tmp_path / "c")
    with pytest.raises(CacheError) as caught:
        make.open_writer(folder, make.identity(prompt="Review: {text}"))
    assert str(caught.value) == (
        f"the cache {folder} was made with something else: prompt is 'Text: {{text}}' there and 'Review: {{text}}' "
        "here. Extract into another folder, or use the same settings to go on."
    )


def test_another_label_range_is_refused(make, tmp_path):
    folder = make.write(tmp_path / "c")
    with pytest.raises(CacheError) as caught:
        make.open_writer(folder, label_range=(1.0, 5.0))
    assert str(caught.value) == (
        f"the cache {folder} has the label range (0.0, 5.0), not (1.0, 5.0). "
        "Extract into another folder, or use the same settings to go on."
    )


@pytest.mark.parametrize("done", [1, 2, 4])
def test_another_cut_into_shards_is_refused(make, tmp_path, done):
    folder, rows = tmp_path / "c", make.rows((5,) * 8)
    make.fill(make.open_writer(folder), "train", rows, shard_rows=2, stop_after=done)
    with pytest.raises(CacheError) as caught:
        make.open_writer(folder).split("train", rows, shard_rows=4)
    assert str(caught.value) == (
        f"the split 'train' of the cache {folder} was begun with --shard-rows 2, and this is 4; go on with "
        "--shard-rows 2"
    )


def test_another_cut_that_begins_alike_is_refused_as_well(make, tmp_path):
    # The first row is much longer than the others, so it is a shard of its own whatever shard_rows says.
    folder, rows = tmp_path / "c", make.rows((60, *(5,) * 8))
    make.fill(make.open_writer(folder), "train", rows, shard_rows=2, stop_after=1)
    with pytest.raises(CacheError, match="begun with --shard-rows 2, and this is 8"):
        make.open_writer(folder).split("train", rows, shard_rows=8)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "-x", "a\n"])
def test_a_split_name_that_is_no_file_name_is_refused(make, tmp_path, name):
    with pytest.raises(CacheError) as caught:
        make.open_writer(tmp_path / "c").split(name, make.rows(), shard_rows=4)
    assert str(caught.value) == f"a split's name may hold letters, digits, '.', '-' and '_'; got {name!r}"


def test_a_folder_of_other_files_is_refused(make, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError) as caught:
        make.open_writer(tmp_path)
    assert str(caught.value) == f"{tmp_path} holds other files and is not a relish cache; choose a new or empty folder"
    with pytest.raises(CacheError, match="notes.txt is a file; a cache is a folder. Choose another name"):
        make.open_writer(tmp_path / "notes.txt")
    assert list(tmp_path.iterdir()) == [tmp_path / "notes.txt"]


# Failing


def test_nothing_is_written_before_the_first_shard(make, tmp_path):
    writer = make.open_writer(tmp_path / "c")
    writer.split("train", make.rows(), shard_rows=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_shard_whose_block_raises_leaves_no_file(make, tmp_path, error):
    rows = make.rows()
    folder = tmp_path / "c"
    make.fill(make.open_writer(folder), "train", rows, stop_after=1)
    before = make.contents(folder)
    split = make.open_writer(folder).split("train", rows, shard_rows=4)

    def stop():
        with split.shard(1) as shard:
            shard.write(0, make.states(rows, make.identity())[split.members(1)[0]])
            raise error

    with pytest.raises(error):
        stop()
    assert make.contents(folder) == before
    assert list(split.pending()) == [1, 2, 3]
    assert len(load_manifest(folder).splits["train"].shards) == 1


# How rows are cut into shards


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=400),
    shard_rows=st.integers(1, 500),
)
def test_every_row_is_in_one_shard_the_longest_first(lengths, shard_rows):
    lengths = np.array(lengths)
    shards = cut_into_shards(lengths, shard_rows)
    together = np.concatenate(shards)
    assert sorted(together.tolist()) == list(range(len(lengths)))
    assert (np.diff(lengths[together]) <= 0).all()
    assert all(1 <= len(shard) <= shard_rows for shard in shards)


@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["uniform", "lognormal", "pareto", "constant", "two"]),
    count=st.integers(2000, 8000),
)
@settings(max_examples=30)
def test_padding_stays_under_five_percent_whatever_the_lengths(seed, kind, count):
    draw = np.random.default_rng(seed)
    lengths = {
        "uniform": lambda: draw.integers(1, 512, count),
        "lognormal": lambda: draw.lognormal(4, 0.7, count),
        "pareto": lambda: 10 * (1 + draw.pareto(1.5, count)),
        "constant": lambda: np.full(count, 37),
        "two": lambda: draw.choice([5, 500], count),
    }[kind]()
    lengths = np.clip(lengths, 1, 8192).astype(np.int64)
    shards = cut_into_shards(lengths, 4096)
    assert overhead(lengths, shards) <= 1.05
    assert len(shards) < 300


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_padding_stays_under_five_percent_on_sts_b(shared_data, split):
    with next(shared_data.glob(f"stsb/*{split}*.csv")).open(encoding="utf-8", newline="") as file:
        lengths = np.array([20 + (len(row["sentence1"]) + len(row["sentence2"])) // 4 for row in csv.DictReader(file)])
    assert len(lengths) > 1000
    shards = cut_into_shards(lengths, 4096)
    assert overhead(lengths, shards) <= 1.05
    assert lengths.max() * len(lengths) / lengths.sum() > 1.5  # what padding all rows alike would cost
    assert len(shards) < 50


def test_the_padding_that_is_reported_is_the_padding_there_is(make, tmp_path):
    rows = make.rows()
    folder = make.write(tmp_path / "c", {"train": rows})
    lengths = np.array([len(tokens) for tokens in rows.tokens])
    shards = cut_into_shards(lengths, 4)
    assert padding_overhead(load_manifest(folder).splits["train"].shards) == overhead(lengths, shards)


def test_two_new_names_that_differ_in_case_are_refused(make, tmp_path):
    writer = make.open_writer(tmp_path / "c")
    writer.split("train", make.rows(), shard_rows=4)
    with pytest.raises(CacheError, match="the cache has a split 'train'; 'Train' would be the same file on some"):
        writer.split("Train", make.rows(seed=1), shard_rows=4)
