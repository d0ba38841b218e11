"""What an LLM wrote as its answer, read as a number."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A minus belongs to the number unless it joins it to what stands before, as in "GPT-4" and "3-4".
_NUMBER = re.compile(r"(?:(?<![\w.,)])[-\u2212\u2013])?(?:\d+(?:[.,]\d+)?|(?<![\w.,])\.\d+)")
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-", ",": "."})
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def parse_score(text: str) -> float | None:
    """The first number of a text: "4", "4.5", "Score: 3", "-2"; None if there is none, as in "four".

    A comma between digits is a decimal comma ("4,5" is 4.5, "4, 5" is 4); of "4/5" and "3-4" the first number counts;
    exponents are not read ("1e3" is 1).
    """
    found = _NUMBER.search(text)
    return None if found is None else float(found[0].translate(_MINUS))


@dataclass(frozen=True, eq=False)
class ParsedAnswers:
    """The numbers in answers to N rows, S answers to each."""

    values: NDArray[np.float64]
    """(N, S), within the label range; NaN where an answer is no number."""
    no_number: int
    """Answers that are none."""
    clipped: int
    """Answers outside the label range, which became its nearest end."""


def parse_answers(answers: Sequence[Sequence[str]], label_range: tuple[float, float]) -> ParsedAnswers:
    """Read S answers to each of N rows; where labels reach 1,000, "1,250" is no decimal fraction."""
    if max(map(abs, label_range)) >= 1000:
        answers = [[_THOUSANDS.sub("", text) for text in of_row] for of_row in answers]
    parsed = [[parse_score(text) for text in of_row] for of_row in answers]
    values = np.array([[np.nan if value is None else value for value in of_row] for of_row in parsed], dtype=np.float64)
    inside = np.clip(values, *label_range)
    missing = np.isnan(values)
    return ParsedAnswers(inside, int(missing.sum()), int((inside != values).sum() - missing.sum()))
