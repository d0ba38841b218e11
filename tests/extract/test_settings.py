import dataclasses
import math

import pytest

from relish.cache.errors import SettingsError
from relish.extract.settings import ExtractSettings, parse_data, parse_label_range, parse_layers

RANGE = "the label range must go from a smaller to a larger number, not from "


def settings(**changes):
    return ExtractSettings(**{"model": "m", "data": {"train": "a.csv"}, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, not 'int8'"),
        ({"compute_dtype": "fp8"}, "compute_dtype must be one of auto, bfloat16, float16, float32, not 'fp8'"),
        ({"max_length": 0}, "max_length must be at least 1, not 0"),
        ({"batch_tokens": -1}, "batch_tokens must be at least 1, not -1"),
        ({"shard_rows": 0}, "shard_rows must be at least 1, not 0"),
        ({"layers": 0.5}, "layers takes several values; got 0.5: give (0.5,) for one"),
        ({"readouts": "greedy"}, "readouts takes several values; got 'greedy': give ('greedy',) for one"),
        ({"layers": (-1,)}, "a layer is an index from 0 on or a fraction of the depth up to 1.0, not -1"),
        ({"layers": (2, 1.5)}, "a layer is an index from 0 on or a fraction of the depth up to 1.0, not 1.5"),
        ({"layers": (math.nan,)}, "a layer is an index from 0 on or a fraction of the depth up to 1.0, not nan"),
        ({"label_range": (5.0, 0.0)}, RANGE + "5.0 to 0.0"),
        ({"label_range": (1.0, 1.0)}, RANGE + "1.0 to 1.0"),
        (
            {"label_range": (0.0, math.inf)},
            RANGE + "0.0 to inf",
        ),
        (
            {"label_range": (math.nan, 5.0)},
            RANGE + "nan to 5.0",
        ),
        ({"data": {1: "a.csv"}}, "a split's name is text, not 1"),
        ({"hub": "org/data"}, "rows come either from files (data) or from the hub, not from both"),
        ({"data": {}}, "no rows to read: give --data SPLIT=FILE, --hub ID, or a --task preset"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(SettingsError) as caught:
        settings(**changes)
    assert str(caught.value) == message


def test_one_source_of_rows_is_enough():
    settings()
    settings(task="stsb")
    settings(data={}, task="stsb")
    settings(data={}, hub="org/data")


def test_settings_are_frozen_and_given_by_name():
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings().dtype = "float16"
    with pytest.raises(TypeError):
        ExtractSettings("m")


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("last", (1.0,)),
        ("12", (12,)),
        ("0", (0,)),
        ("0.5", (0.5,)),
        (".25", (0.25,)),
        ("0.5,last", (0.5, 1.0)),
        (" 3 , 0.5", (3, 0.5)),
        ("1", (1,)),
        ("1.0", (1.0,)),
    ],
)
def test_layers_are_read(text, layers):
    found = parse_layers(text)
    assert found == layers
    assert list(map(type, found)) == list(map(type, layers))


@pytest.mark.parametrize(("text", "word"), [("first", "first"), ("", ""), ("1,", ""), ("1-3", "1-3"), ("a.b", "a.b")])
def test_layers_of_another_form_are_refused(text, word):
    with pytest.raises(SettingsError) as caught:
        parse_layers(text)
    assert str(caught.value) == f"--layers takes 'last', indices or fractions such as 12,0.5; not {word!r}"


def test_a_label_range_is_read():
    assert parse_label_range("0,5") == (0.0, 5.0)
    assert parse_label_range(" -1.5 , 2e2 ") == (-1.5, 200.0)


@pytest.mark.parametrize("text", ["5", "0,5,9", "low,high", "", "0-5"])
def test_a_label_range_of_another_form_is_refused(text):
    with pytest.raises(SettingsError) as caught:
        parse_label_range(text)
    assert str(caught.value) == f"--label-range takes two numbers such as 0,5; not {text!r}"


def test_data_is_read():
    assert parse_data(["train=a.csv", "test=b=c.csv"]) == {"train": "a.csv", "test": "b=c.csv"}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["a.csv"], "--data takes SPLIT=FILE such as train=train.csv; not 'a.csv'"),
        (["=a.csv"], "--data takes SPLIT=FILE such as train=train.csv; not '=a.csv'"),
        (["train="], "--data takes SPLIT=FILE such as train=train.csv; not 'train='"),
        (["train=a.csv", "train=b.csv"], "--data names the split 'train' twice"),
    ],
)
def test_data_of_another_form_is_refused(pairs, message):
    with pytest.raises(SettingsError) as caught:
        parse_data(pairs)
    assert str(caught.value) == message
