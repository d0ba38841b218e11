import json
from dataclasses import replace

import pytest

from relish.cache.errors import CacheError, DamagedCacheError
from relish.cache.lock import LOCK
from relish.cache.manifest import load_manifest
from relish.cache.merge import merge_caches
from relish.cache.pack import pack_cache
from relish.cache.reader import open_cache
from relish.cache.readouts import (
    Readout,
    load_part,
    load_readouts,
    part_files,
    part_path,
    part_rows,
    pending_parts,
    readout_names,
    save_part,
)
from relish.cache.unpack import unpack_cache
from relish.cache.verify import verify_cache

ROWS = 600  # three parts
AGAIN = "run the same relish extract command again, with --readouts"


@pytest.fixture
def folder(make, tmp_path):
    """A cache with one split of 600 rows."""
    return make.write(tmp_path / "c", {"test": make.rows([3] * ROWS)}, shard_rows=ROWS)


def planned(folder, **changes):
    manifest = load_manifest(folder)
    plan = Readout(
        identity=manifest.identity,
        split="test",
        fingerprint=manifest.splits["test"].fingerprint,
        kind="greedy",
        shots=8,
        shots_used=7,
        settings={"examples": "abc", "new_tokens": 16},
    )
    return replace(plan, **changes)


def write(folder, numbers=range(3), answer=str, **changes):
    plan = planned(folder, **changes)
    for number in numbers:
        rows = part_rows(ROWS, number)
        answers = tuple(answer(row) for row in rows)
        save_part(folder, replace(plan, rows=tuple(rows), ids=tuple(map(str, rows)), answers=answers, seconds=1.5))
    return plan


def damage(path):
    """One letter of the file becomes another."""
    path.write_text(path.read_text(encoding="utf-8").replace('"seconds": 1.5', '"seconds": 1.6'), encoding="utf-8")


def edit(path, **changes):
    """What another program could do: change the content and seal it again."""
    part = load_part(path)
    path.unlink()
    save_part(path.parent.parent, replace(part, **changes))


def test_what_is_written_is_read_in_the_order_of_the_rows(folder):
    write(folder, [2, 0, 1])
    write(folder, kind="samples", shots=0, answer=lambda row: [str(row), "x"])
    write(folder, kind="candidates", shots=0, answer=lambda row: [-float(row), -0.25])
    found, wrong = load_readouts(folder, load_manifest(folder), "test")
    assert wrong == []
    assert [one.name for one in found] == ["samples-0shot", "candidates-0shot", "greedy-8shot"]
    samples, candidates, greedy = found
    assert greedy.rows == tuple(range(ROWS))
    assert greedy.answers == tuple(map(str, range(ROWS)))
    assert (greedy.shots, greedy.shots_used, greedy.seconds) == (8, 7, 4.5)
    assert samples.answers[599] == ["599", "x"]
    assert candidates.answers[10] == [-10.0, -0.25]
    assert verify_cache(open_cache(folder)) == []


def test_a_part_is_json_that_says_all_about_itself(folder):
    write(folder)
    value = json.loads((folder / "readouts/test.greedy-8shot-00001.json").read_text(encoding="utf-8"))
    assert (value["format"], value["version"], value["split"], value["kind"]) == ("relish readout", 1, "test", "greedy")
    assert value["identity"] == load_manifest(folder).identity.to_json()
    assert value["rows"] == list(range(256, 512))
    assert list(value)[-1] == "sha256"


def test_names_of_splits_may_look_like_those_of_readouts(make, tmp_path):
    odd = "a.greedy-0shot-00000.json"
    folder = make.write(tmp_path / "c", {odd: make.rows([3] * 4)})
    manifest = load_manifest(folder)
    plan = Readout(manifest.identity, odd, manifest.splits[odd].fingerprint, "samples", 0, 0, {})
    save_part(folder, replace(plan, rows=(0, 1, 2, 3), ids=("",) * 4, answers=(["1"],) * 4))
    assert readout_names(folder, odd) == ["samples-0shot"]
    assert readout_names(folder, "a") == []
    assert len(load_readouts(folder, manifest, odd)[0]) == 1


def test_finished_parts_are_kept_and_damaged_ones_asked_for_again(folder):
    plan = write(folder, [0, 2])
    assert pending_parts(folder, plan, ROWS) == [1]
    damage(part_path(folder, "test", "greedy-8shot", 0))
    assert pending_parts(folder, plan, ROWS) == [0, 1]
    assert pending_parts(folder, planned(folder, kind="samples"), ROWS) == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shots_used": 5}, "shots_used is 7 there and 5 here"),
        ({"fingerprint": "other"}, "fingerprint is '[0-9a-f]{64}' there and 'other' here"),
        ({"settings": {"examples": "abc", "new_tokens": 9}}, "new_tokens is 16 there and 9 here"),
        ({"settings": {"examples": "x", "new_tokens": 16}}, "examples is 'abc' there and 'x' here"),
        ({"settings": {"new_tokens": 16}}, "examples is 'abc' there and None here"),
        (
            {"settings": {"examples": list(range(1000)), "new_tokens": 16}},
            r"examples is 'abc' there and \[0, 1, 2[ ,0-9]{40,60}….{20} here",
        ),
    ],
)
def test_parts_of_other_settings_are_refused_with_both_values(folder, changes, said):
    write(folder, [1])
    with pytest.raises(CacheError, match=f"test.greedy-8shot-00001.json was made with something else: {said}; delete"):
        pending_parts(folder, planned(folder, **changes), ROWS)


def test_parts_of_another_identity_are_refused_by_name(folder):
    write(folder, [1])
    other = replace(load_manifest(folder).identity, prompt="Rate: {text}")
    with pytest.raises(
        CacheError, match=r"prompt is 'Text: \{text\}' there and 'Rate: \{text\}' here\. Delete .*readouts"
    ):
        pending_parts(folder, planned(folder, identity=other), ROWS)


def test_what_is_missing_or_damaged_is_named_and_the_rest_is_read(folder):
    write(folder, [0, 2])
    write(folder, shots=0)
    damage(part_path(folder, "test", "greedy-0shot", 1))
    write(folder, kind="samples", shots=0, answer=lambda row: ["1"])
    found, wrong = load_readouts(folder, load_manifest(folder), "test")
    assert [one.name for one in found] == ["samples-0shot"]
    assert wrong == [
        f"{folder}/readouts/test.greedy-0shot-00001.json is not as relish wrote it: it was edited or damaged; {AGAIN}",
        f"the readout greedy-8shot of the split 'test' of the cache {folder} is not finished (2 of 3 parts); {AGAIN}",
    ]
    assert verify_cache(open_cache(folder)) == wrong


def test_parts_that_do_not_belong_together_are_not_read(folder):
    write(folder)
    path = part_path(folder, "test", "greedy-8shot", 1)
    edit(path, shots_used=5)
    assert "shots_used is 5 there and 7 here" in load_readouts(folder, load_manifest(folder), "test")[1][0]
    edit(path, shots_used=7, fingerprint="f")
    assert "was made from other rows than the split 'test'; delete it" in verify_cache(open_cache(folder))[0]
    edit(path, identity=replace(load_manifest(folder).identity, revision="other"))
    assert "revision is 'abc' there and 'other' here" in verify_cache(open_cache(folder))[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"answers": (1,) * 256},
        {"answers": ("1",) * 255},
        {"kind": "samples", "answers": (["1", "2"],) * 255 + (["1"],)},
        {"kind": "candidates", "answers": ([0.5, "1"],) * 256},
        {"kind": "regression", "answers": (0.5,) * 255 + ([0.5],)},
    ],
)
def test_answers_of_another_type_or_number_are_damage(folder, changes):
    plan = planned(folder, **{"rows": tuple(range(256)), "ids": ("",) * 256, **changes})
    save_part(folder, plan)
    with pytest.raises(DamagedCacheError, match="is damaged"):
        load_part(part_path(folder, "test", plan.name, 0))


def test_another_version_is_refused(folder, monkeypatch):
    monkeypatch.setattr("relish.cache.readouts.VERSION", 2)
    write(folder, [0])
    monkeypatch.undo()
    with pytest.raises(CacheError, match="has format version 2, and this relish reads version 1"):
        load_part(part_path(folder, "test", "greedy-8shot", 0))


def test_merging_carries_them_and_takes_the_more_complete_one(folder, make, tmp_path):
    write(folder)
    write(folder, [0], shots=0)
    other = make.write(
        tmp_path / "other", {"dev": make.rows([4] * 5, seed=1), "test": make.rows([3] * ROWS)}, shard_rows=ROWS
    )
    write(other, [0, 1], shots=0)
    write(other, [0], shots_used=1)
    merge_caches(tmp_path / "all", [folder, other])
    assert [path.name for path in part_files(tmp_path / "all")] == [
        "test.greedy-0shot-00000.json",
        "test.greedy-0shot-00001.json",
        "test.greedy-8shot-00000.json",
        "test.greedy-8shot-00001.json",
        "test.greedy-8shot-00002.json",
    ]
    assert load_readouts(tmp_path / "all", load_manifest(tmp_path / "all"), "test")[0][0].shots_used == 7


def test_nothing_is_merged_where_one_is_damaged(folder, tmp_path):
    write(folder)
    damage(part_path(folder, "test", "greedy-8shot", 1))
    with pytest.raises(CacheError, match="test.greedy-8shot-00001.json is not as relish wrote it"):
        merge_caches(tmp_path / "all", [folder])
    assert [path.name for path in (tmp_path / "all").iterdir()] == [LOCK]


def test_packing_and_unpacking_give_them_back_byte_for_byte(folder, tmp_path):
    pytest.importorskip("hdf5plugin")
    write(folder)
    write(folder, shots=0)
    pack_cache(folder, tmp_path / "packed")
    unpack_cache(tmp_path / "packed", tmp_path / "back")
    before, after = ([path.read_bytes() for path in part_files(where)] for where in (folder, tmp_path / "back"))
    assert before == after
    assert len(after) == 6
    unpack_cache(tmp_path / "packed", tmp_path / "back")
    for path in part_files(folder)[:3]:
        path.unlink()
    pack_cache(folder, tmp_path / "packed")
    assert [path.name for path in part_files(tmp_path / "packed")] == [path.name for path in part_files(folder)]


def test_info_lists_them_and_verify_names_damage(folder, run_cli):
    write(folder)
    write(folder, [0], shots=0)
    damage(part_path(folder, "test", "greedy-8shot", 1))
    figures = json.loads(run_cli("cache", "info", folder, "--json").stdout)["readouts"]
    assert [(one["name"], one["rows"], one["of"], one["state"], one["shots_used"]) for one in figures] == [
        ("greedy-0shot", 256, 600, "unfinished", 7),
        ("greedy-8shot", 344, 600, "damaged", 7),
    ]
    shown = run_cli("cache", "info", folder).stdout
    assert "greedy-8shot" in shown
    assert "344 of 600" in shown
    result = run_cli("cache", "verify", folder)
    assert result.exit_code == 1
    assert "test.greedy-8shot-00001.json is not as relish wrote it" in result.stdout
