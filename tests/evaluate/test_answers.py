import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relish.evaluate.answers import parse_answers, parse_score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4", 4),
        ("4.5", 4.5),
        ("4,5", 4.5),
        ("4, 5", 4),
        ("4/5", 4),
        ("4 out of 5", 4),
        ("Score: 3", 3),
        ("The score is 3.5.", 3.5),
        ("4.", 4),
        (".5", 0.5),
        ("-.5", -0.5),
        ("-2", -2),
        ("\u22122.5", -2.5),
        ("\u20133", -3),
        ("3\u20134", 3),
        ("Score:-2", -2),
        ("(-2)", -2),
        ("3-4", 3),
        ("between 3 and 4", 3),
        ("GPT-4 says 2", 4),
        ("1e3", 1),
        ("2.5.1", 2.5),
        ("007", 7),
        ("**4**", 4),
        ("\u0663", 3),
        ("four", None),
        ("", None),
        (".", None),
        ("- x", None),
        ("½", None),
        ("NaN", None),
        ("inf", None),
    ],
)
def test_the_first_number_of_a_text(text, expected):
    assert parse_score(text) == expected


def test_a_comma_may_part_thousands_where_labels_reach_them():
    answers = [["1,250 points", "12,5", "1,250,000", "1,2345", "-1,000"]]
    assert parse_answers(answers, (-2000, 2_000_000)).values.tolist() == [[1250, 12.5, 1_250_000, 1.2345, -1000]]
    assert parse_answers([["1,250"]], (0, 100)).values.tolist() == [[1.25]]


@given(st.text())
def test_any_text_gives_a_number_or_none(text):
    value = parse_score(text)
    assert value is None or not math.isnan(value)
    assert (value is None) == (not any(letter.isdecimal() for letter in text))


@given(st.floats(-1000, 1000).map(lambda value: round(value, 3)), st.sampled_from(["", "Score: ", "\n\n", "about "]))
def test_a_number_that_is_written_is_read(value, before):
    assert parse_score(f"{before}{value:.3f} of 5") == value
    assert parse_score(f"{before}{value:.3f}".replace(".", ",")) == value


def test_answers_beside_the_range_are_clipped_and_counted_and_those_without_a_number_are_marked():
    parsed = parse_answers([["4", "six"], ["-1", "9" * 400], ["5", "0"]], (0.0, 5.0))
    np.testing.assert_array_equal(parsed.values, [[4, np.nan], [0, 5], [5, 0]])
    assert (parsed.no_number, parsed.clipped) == (1, 2)
