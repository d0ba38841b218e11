"""Any order of writing, dying, resuming, damage, repair, merging and verifying: what is listed is always right."""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import h5py
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from relish.cache import writer as writer_module
from relish.cache.errors import CacheError
from relish.cache.lock import LOCK
from relish.cache.manifest import load_manifest
from relish.cache.merge import merge_caches
from relish.cache.reader import open_cache
from relish.cache.repair import repair_cache
from relish.cache.verify import verify_cache

SPLITS = {"train": (0, (58, 30, 60, 29, 59, 1, 30, 57, 28, 30)), "test": (1, (7, 7, 9, 2, 30))}
BAD = {"train": {1, 7}, "test": {3}}  # rows that cannot be stored
STEPS = ("open", "posix_fallocate", "pwrite", "fsync", "replace", "close")


class Died(BaseException):
    """Stands for the end of the process: nothing after it happens, no clean-up either."""


@pytest.fixture(scope="module")
def machine(make):
    whole = Path(tempfile.mkdtemp()) / "whole"

    class Caches(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.home = Path(tempfile.mkdtemp())
            self.folder = self.home / "c-0"
            self.damaged = set()
            self.merges = 0

        def teardown(self):
            shutil.rmtree(self.home)

        def write(self, folder, names, stop_after=None):
            writer = make.open_writer(folder)
            for name in names:
                seed, lengths = SPLITS[name]
                rows = make.rows(lengths, seed=seed)
                values = make.states(rows, make.identity())
                split = writer.split(name, rows, shard_rows=2)
                pending = split.pending()[:stop_after]
                if not pending and not writer.lost_manifest:
                    continue
                with writer.writing():
                    for number in pending:
                        with split.shard(number) as shard:
                            for position, row in enumerate(split.members(number)):
                                if row in BAD[name]:
                                    shard.skip(position, "NaN")
                                else:
                                    shard.write(position, values[row])
                        self.damaged.discard(f"{name}-{number:05d}.h5")

        @property
        def listed(self):
            if not (self.folder / "manifest.json").exists():
                return {}
            splits = load_manifest(self.folder).splits
            return {shard.file: shard for split in splits.values() for shard in split.shards}

        @rule(name=st.sampled_from(sorted(SPLITS)), shards=st.integers(1, 6))
        def write_some(self, name, shards):
            self.write(self.folder, [name], shards)

        @rule(name=st.sampled_from(sorted(SPLITS)), step=st.integers(1, 120))
        def die_while_writing(self, name, step):
            left, real = step, {call: getattr(os, call) for call in STEPS if hasattr(os, call)}
            held = []

            def counted(call):
                def run(*arguments, **options):
                    nonlocal left
                    left -= 1
                    if left <= 0 and call != "close":
                        raise Died
                    return real[call](*arguments, **options)

                return run

            # A process that dies cleans nothing up.
            with pytest.MonkeyPatch.context() as patch:
                for call in real:
                    patch.setattr(os, call, counted(call))
                patch.setattr(writer_module.ShardWriter, "abandon", lambda shard: held.append(shard))
                patch.setattr(Path, "unlink", lambda *_arguments, **_options: None)
                with suppress(Died):
                    self.write(self.folder, [name])
            for shard in held:
                if shard._descriptor is not None:
                    os.close(shard._descriptor)

        @precondition(lambda self: set(self.listed) - self.damaged)
        @rule(data=st.data(), fault=st.sampled_from(["flip", "cut", "delete"]))
        def damage(self, data, fault):
            name = data.draw(st.sampled_from(sorted(set(self.listed) - self.damaged)))
            path = self.folder / name
            if fault == "delete":
                path.unlink()
            elif fault == "cut":
                os.truncate(path, data.draw(st.integers(0, path.stat().st_size - 1)))
            else:
                make.flip(path, data.draw(st.integers(0, path.stat().st_size - 1)), data.draw(st.integers(0, 7)))
            self.damaged.add(name)

        @precondition(lambda self: (self.folder / "manifest.json").exists())
        @rule(fault=st.sampled_from(["delete", "cut", "flip"]))
        def damage_the_manifest_and_repair(self, fault):
            path = self.folder / "manifest.json"
            before = set(self.listed)
            if fault == "delete":
                path.unlink()
            elif fault == "cut":
                os.truncate(path, path.stat().st_size - 1)
            else:
                make.flip(path, path.stat().st_size // 2)
            with pytest.raises(CacheError):
                open_cache(self.folder)
            done = repair_cache(self.folder)
            assert {shard.file for shard in done.dropped} == self.damaged & {shard.file for shard in done.dropped}
            assert set(self.listed) >= before - self.damaged
            self.damaged -= {shard.file for shard in done.dropped}

        @precondition(lambda self: (self.folder / "manifest.json").exists())
        @rule()
        def repair(self):
            done = repair_cache(self.folder)
            assert {shard.file for shard in done.dropped} == self.damaged
            self.damaged = set()

        @precondition(lambda self: (self.folder / "manifest.json").exists())
        @rule()
        def merge(self):
            self.merges += 1
            out = self.home / f"c-{self.merges}"
            if self.damaged:
                with pytest.raises(CacheError, match="nothing was merged"):
                    merge_caches(out, [self.folder])
                assert [path.name for path in out.iterdir()] == [LOCK]
            else:
                merge_caches(out, [self.folder])
                self.folder = out

        @rule()
        def finish(self):
            """Repair and the same extraction: the end is that of an unbroken run, byte for byte."""
            if (self.folder / "manifest.json").exists():
                self.repair()
            self.write(self.folder, list(SPLITS))
            assert not self.damaged
            if not whole.exists():
                self.write(whole, list(SPLITS))
            for path in whole.glob("*.h5"):
                assert (self.folder / path.name).read_bytes() == path.read_bytes(), path.name
            ours, theirs = load_manifest(self.folder), load_manifest(whole)
            assert ours == theirs
            assert verify_cache(open_cache(self.folder)) == []

        @invariant()
        def verify_names_exactly_what_is_damaged(self):
            if not (self.folder / "manifest.json").exists():
                return
            found = [one for one in verify_cache(open_cache(self.folder)) if "is not finished" not in one]
            assert len(found) == len(self.damaged)
            for name in self.damaged:
                assert any(name in sentence for sentence in found)

    return Caches


# With 2, 3 or 4 rows a shard these are cut into as many shards or fewer, of which some are alike.
CUT = (30, 30, 30, 30, 9, 9, 9, 2, 2, 2)
UNFIT = {1, 2, 3, 8}  # rows that cannot be stored: with 3 rows a shard, all of the second


@pytest.fixture(scope="module")
def cuts(make):
    class Cuts(RuleBasedStateMachine):
        """Two caches of the same rows, with any number of rows a shard; they are merged, and lose shards."""

        def __init__(self):
            super().__init__()
            self.home = Path(tempfile.mkdtemp())
            self.folders = [self.home / "a", self.home / "b"]
            self.merges = 0

        def teardown(self):
            shutil.rmtree(self.home)

        @property
        def records(self):
            there = [folder for folder in self.folders if (folder / "manifest.json").exists()]
            return {folder: load_manifest(folder).splits["train"] for folder in there}

        @rule(which=st.integers(0, 1), shard_rows=st.integers(1, 5), shards=st.integers(1, 9))
        def write(self, which, shard_rows, shards):
            folder, rows = self.folders[which], make.rows(CUT)
            writer = make.open_writer(folder)
            known = self.records.get(folder)
            if known is not None and known.shard_rows != shard_rows:
                begun = f"begun with --shard-rows {known.shard_rows}, and this is {shard_rows}; go on with"
                with pytest.raises(CacheError, match=begun):
                    writer.split("train", rows, shard_rows=shard_rows)
                return
            values = make.states(rows, make.identity())
            split = writer.split("train", rows, shard_rows=shard_rows)
            for number in split.pending()[:shards]:
                with split.shard(number) as shard:
                    for position, row in enumerate(split.members(number)):
                        if row in UNFIT:
                            shard.skip(position, "NaN")
                        else:
                            shard.write(position, values[row])

        @precondition(lambda self: any(record.shards for record in self.records.values()))
        @rule(data=st.data())
        def lose_shards_and_repair(self, data):
            folders = sorted(folder for folder, record in self.records.items() if record.shards)
            folder = data.draw(st.sampled_from(folders), label="folder")
            names = [record.file for record in self.records[folder].shards]
            lost = data.draw(st.sets(st.sampled_from(names), min_size=1), label="lost")
            for name in lost:
                (folder / name).unlink()
            assert {record.file for record in repair_cache(folder).dropped} == lost

        @precondition(lambda self: len(self.records) == 2)
        @rule(turned=st.booleans(), into=st.integers(0, 1))
        def merge(self, turned, into):
            self.merges += 1
            out = self.home / f"merged-{self.merges}"
            before = self.records
            merge_caches(out, self.folders[::-1] if turned else self.folders)
            taken = load_manifest(out).splits["train"]
            assert taken in before.values()
            for record in before.values():
                assert taken.complete or not record.complete
                assert taken.complete or taken.covered >= record.covered
            self.folders[into] = out

        @invariant()
        def each_row_is_there_once(self):
            for folder, record in self.records.items():
                rows = [row.row for row in record.skipped]
                for shard in record.shards:
                    with h5py.File(folder / shard.file, "r") as file:
                        rows += file["row"][()].tolist()
                assert len(set(rows)) == len(rows) == record.covered
                assert UNFIT & set(rows) == {row.row for row in record.skipped}
                found = verify_cache(open_cache(folder))
                if record.complete:
                    assert sorted(rows) == list(range(len(CUT)))
                    assert found == []
                    assert set(open_cache(folder).split("train").row.tolist()) == set(range(len(CUT))) - UNFIT
                else:
                    assert len(found) == 1
                    assert "is not finished" in found[0]

    return Cuts


def test_any_order_of_events(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=15, stateful_step_count=15))


def test_any_cut_into_shards(cuts):
    run_state_machine_as_test(cuts, settings=settings(max_examples=12, stateful_step_count=12))
