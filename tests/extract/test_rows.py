import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relish.cache.errors import DataError
from relish.extract.rows import Columns, SplitData, guess_text_column, label_range_of, load_split, resolve_columns
from relish.extract.tasks import TASKS

TEXT_AND_Y = Columns(texts={"text": "text"}, target="y", id=None)
TEXT_AND_ID = Columns(texts={"text": "text"}, target=None, id="id")


def load(rows, columns=TEXT_AND_Y, prompt="Text: {text}", label_range=None):
    return load_split(rows, columns, prompt, source="train.csv", label_range=label_range)


# Which column is what


def test_without_a_task_the_fields_are_columns_and_the_rest_is_guessed():
    columns = resolve_columns(["ID", "Essay text", "Rating", "note"], prompt="Essay: {Essay text}\nScore:")
    assert columns == Columns(texts={"Essay text": "Essay text"}, target="Rating", id="ID")


def test_columns_given_by_name_are_taken_over_the_guess_and_the_task():
    available = ["sentence1", "sentence2", "score", "mine", "key"]
    task = TASKS["stsb"]
    columns = resolve_columns(available, prompt=task.prompt, task=task, target_column="mine", id_column="key")
    assert (columns.target, columns.id) == ("mine", "key")
    columns = resolve_columns(available, prompt="{sentence1}", target_column="mine", id_column="key")
    assert (columns.target, columns.id) == ("mine", "key")


def test_a_prompt_of_ones_own_may_name_further_columns_beside_the_tasks_fields():
    columns = resolve_columns(
        ["genre", "sentence_A", "sentence_B", "relatedness_score"],
        prompt="{genre}: {sentence1} / {sentence2}",
        task=TASKS["sick"],
    )
    assert columns.texts == {"genre": "genre", "sentence1": "sentence_A", "sentence2": "sentence_B"}


def test_a_column_plays_one_part():
    assert resolve_columns(["label", "score"], prompt="{label}").target == "score"
    assert resolve_columns(["text", "id", "y"], prompt="{text}", target_column="id").id is None


def test_of_several_ids_the_most_usual_is_taken():
    assert resolve_columns(["index", "id", "text", "y"], prompt="{text}").id == "id"


def test_a_target_that_is_not_needed_may_be_absent_or_unclear():
    assert resolve_columns(["text"], prompt="{text}", need_target=False).target is None
    assert resolve_columns(["text", "score", "label"], prompt="{text}", need_target=False).target is None
    assert resolve_columns(["text", "score"], prompt="{text}", need_target=False).target == "score"


@pytest.mark.parametrize(
    ("available", "options", "message"),
    [
        (["a", "b"], {}, r"^the prompt names the column 'text', but data\.csv has: a, b$"),
        (
            ["text", "points"],
            {},
            r"^data\.csv has: text, points; none is called score, label, .*, y: name it with --target-column$",
        ),
        (
            ["text", "label", "score"],
            {},
            r"^data\.csv has: text, label, score; several may be the target \(score, label\): name it with --target-c",
        ),
        (["text", "y"], {"target_column": "z"}, r"^--target-column names the column 'z', but data\.csv has: text, y$"),
        (["text", "y"], {"id_column": "z"}, r"^--id-column names the column 'z', but data\.csv has: text, y$"),
    ],
)
def test_a_column_that_is_missing_or_unclear_is_named_with_the_way_out(available, options, message):
    with pytest.raises(DataError, match=message):
        resolve_columns(available, prompt="{text}", source="data.csv", **options)


@pytest.mark.parametrize(
    ("available", "message"),
    [
        (
            ["translation", "mean"],
            "the task wmt-en-zh reads 'source' from the column 'original' or 'source' or 'transl",
        ),
        (["original", "translation"], r"has: original, translation; none is called mean: name it with --target-column"),
    ],
)
def test_a_column_that_a_task_misses_is_named(available, message):
    task = TASKS["wmt-en-zh"]
    with pytest.raises(DataError, match=message):
        resolve_columns(available, prompt=task.prompt, task=task)


def test_the_text_column_is_guessed_or_asked_for():
    assert guess_text_column(["id", "Review", "stars"]) == "Review"
    with pytest.raises(
        DataError, match=r"^a\.csv has: q, y; none has a usual name for the text: name it with --prompt"
    ):
        guess_text_column(["q", "y"], source="a.csv")
    with pytest.raises(DataError, match=r"several may be the text \(text, review\): name it with --prompt"):
        guess_text_column(["review", "text"])


# The rows


def test_rows_become_ids_texts_and_targets():
    split = load([{"text": " a {b} ", "y": "1.5"}, {"text": "NA", "y": ""}, {"text": "c"}])
    assert split.ids == ["0", "1", "2"]
    assert split.texts == ["Text:  a {b} ", "Text: NA", "Text: c"]
    assert split.targets.dtype == np.float64
    np.testing.assert_array_equal(split.targets, [1.5, math.nan, math.nan])


@pytest.mark.parametrize("cell", ["2", " 2.0 ", "2e0", 2, 2.0, Decimal("2.0")])
def test_a_target_may_be_any_kind_of_number(cell):
    assert load([{"text": "a", "y": cell}]).targets.tolist() == [2.0]


@pytest.mark.parametrize("cell", [None, "", "  ", math.nan])
def test_a_blank_target_is_an_unlabelled_row(cell):
    assert math.isnan(load([{"text": "a", "y": cell}], label_range=(0, 5)).targets[0])


@pytest.mark.parametrize(("cell", "row_id"), [("x 1", "x 1"), (7, "7"), (7.0, "7"), (7.5, "7.5"), ("7.0", "7.0")])
def test_ids_become_text(cell, row_id):
    assert load([{"text": "a", "id": cell}, {"text": "b", "id": cell}], TEXT_AND_ID).ids == [row_id, row_id]


@pytest.mark.parametrize("bounds", [(0, 5), (-5, 0)])
def test_the_label_range_includes_its_ends(bounds):
    rows = [{"text": "a", "y": bound} for bound in bounds]
    assert load(rows, label_range=bounds).targets.tolist() == list(bounds)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "", "y": 1}, "has an empty text in column 'text'"),
        ({"text": " \n\u3000", "y": 1}, "has an empty text in column 'text'"),
        ({"text": None, "y": 1}, "has no text in column 'text'"),
        ({"y": 1}, "has no text in column 'text'"),
        ({"text": 5, "y": 1}, "has 5 in column 'text', which is not text"),
        ({"text": ["a"], "y": 1}, "has ['a'] in column 'text', which is not text"),
        (
            {"text": "a\ud800", "y": 1},
            "holds '\\ud800' in column 'text', half of a surrogate pair, which is no character",
        ),
        (
            {"text": "a", "y": "good"},
            "has the target 'good' in column 'y', which is not a number; leave the cell blank",
        ),
        ({"text": "a", "y": "nan"}, "has the target 'nan' in column 'y', which is not a number"),
        ({"text": "a", "y": "3,5"}, "has the target '3,5' in column 'y', which is not a number"),
        ({"text": "a", "y": "1_0"}, "has the target '1_0' in column 'y', which is not a number"),
        ({"text": "a", "y": True}, "has the target True in column 'y', which is not a number"),
        ({"text": "a", "y": [1]}, "has the target [1] in column 'y', which is not a number"),
        ({"text": "a", "y": "inf"}, "has the target 'inf' in column 'y', which is not finite"),
        ({"text": "a", "y": "1e999"}, "has the target '1e999' in column 'y', which is not finite"),
        ({"text": "a", "y": 10**400}, "in column 'y', which is not finite"),
        (
            {"text": "a", "y": "5.5"},
            "has the target 5.5 in column 'y', outside the label range [0, 5]; if the target is right, give its range "
            "with --label-range, in a new folder if the cache has another one",
        ),
        ({"text": "a", "y": np.float32(5.0000005)}, "has the target 5.000000476837158 in column 'y', outside the"),
        ({"text": "a", "y": -0.25}, "has the target -0.25 in column 'y', outside the label range [0, 5]"),
    ],
)
def test_a_cell_that_cannot_be_used_is_named_with_its_row_and_column(row, message):
    with pytest.raises(DataError) as error:
        load([{"text": "a", "y": 1}, row], label_range=(0, 5))
    assert str(error.value).startswith("row 1 of train.csv ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("row_id", "message"),
    [
        (None, "has no id in column 'id'; fill it, or name another one with --id-column"),
        (" ", "has no id in column 'id'"),
        (math.nan, "has no id in column 'id'"),
        ([1], r"has \[1\] in column 'id', which is neither text nor a number"),
        ("a\0b", "has an id with a NUL character in column 'id', which HDF5 cannot store"),
        ("\udfff", "half of a surrogate pair"),
    ],
)
def test_an_id_that_cannot_be_stored_is_refused(row_id, message):
    with pytest.raises(DataError, match=f"^row 0 of train.csv .*{message}"):
        load([{"text": "a", "id": row_id}], TEXT_AND_ID)


class NAType:
    """As pandas has it: neither true nor false, and unlike itself."""

    def __eq__(self, other):
        return self

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = None


def test_values_of_numpy_and_pandas():
    rows = [
        {"text": "a", "y": np.float32(1), "id": np.int64(7)},
        {"text": "b", "y": NAType(), "id": np.float64(8)},
        {"text": "c", "y": np.int64(2), "id": 2**60 + 1},
    ]
    split = load(rows, Columns(texts={"text": "text"}, target="y", id="id"))
    assert split.ids == ["7", "8", str(2**60 + 1)]
    np.testing.assert_array_equal(split.targets, [1, math.nan, 2])
    with pytest.raises(DataError, match="row 0 of train.csv has no id"):
        load([{"text": "a", "id": NAType()}], TEXT_AND_ID)
    with pytest.raises(DataError, match="row 0 of train.csv has no text"):
        load([{"text": NAType(), "id": 1}], TEXT_AND_ID)


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match=r"^train\.csv has no rows$"):
        load([])


# The fingerprint and the range

examples = st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3), st.sampled_from([0.0, 1.0, 0.1])), max_size=3)


def split_of(rows):
    ids, texts, targets = ([row[i] for row in rows] for i in range(3))
    return SplitData(ids=ids, texts=texts, targets=np.array(targets, dtype=np.float64))


@given(examples, examples)
def test_fingerprints_are_equal_exactly_if_the_examples_are(a, b):
    assert (split_of(a).fingerprint() == split_of(b).fingerprint()) == (a == b)


def test_the_fingerprint_tells_apart_what_joining_would_confuse():
    variants = [
        [("a", "bc", 1.0)],
        [("ab", "c", 1.0)],
        [("a", "bc", 1.0), ("d", "e", 2.0)],
        [("d", "e", 2.0), ("a", "bc", 1.0)],
        [("a", "bc", math.nan)],
        [("a", "bc", 1.0000000000000002)],
    ]
    assert len({split_of(rows).fingerprint() for rows in variants}) == len(variants)


def test_the_fingerprint_never_changes_between_releases():
    assert (
        split_of([("0", "Text: é", 1.5), ("1", "b", math.nan)]).fingerprint()
        == "463b24368952279fb445c3a900fba3e458fa70d6c8e99c0b9c000453f805b10e"
    )


def test_the_label_range_is_that_of_the_labelled_rows():
    assert label_range_of(np.array([3.0, math.nan, -1.0])) == (-1.0, 3.0)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([math.nan, math.nan], "no row has a target, so there is no label range; give one with --label-range"),
        ([], "no row has a target"),
        ([2.0, 2.0, math.nan], "every target is 2, so there is no label range; give one with --label-range"),
    ],
)
def test_a_label_range_needs_two_different_targets(targets, message):
    with pytest.raises(DataError, match=message):
        label_range_of(np.array(targets, dtype=np.float64))
