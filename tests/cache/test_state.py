"""Any order of writing, dying, resuming, damage, repair, merging and verifying: what is listed is always right."""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relish.cache import writer as writer_module
from relish.cache.errors import CacheError
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
                assert list(out.iterdir()) == []
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


def test_any_order_of_events(machine):
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(machine, settings=settings(max_examples=15, stateful_step_count=15, deadline=None))
