"""From a cache's readouts to rows of the table: greedy decoding, regression-aware inference (RAIL), a tuned head.

RAIL: Lukasik, Narasimhan, Menon, Yu and Kumar, Regression-aware Inference with LLMs, EMNLP Findings 2024.
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cache.errors import CacheError
from ..cache.reader import FeatureCache, Split
from ..cache.readouts import REGRESSION, Readout, load_readouts
from .answers import parse_answers
from .summary import CellPredictions

Array = NDArray[np.float64]
TUNED = "tuned-head"
"""The head that was trained with an adapter."""


def readout_cells(cache: FeatureCache, split: Split) -> tuple[list[CellPredictions], list[str]]:
    """A cell for each way to turn each readout of a split into scores.

    Args:
        cache: an open cache.
        split: the rows to score; of those that the readouts know more of, the rows in it count.

    Returns:
        The cells: greedy-0shot; rail-samples-0shot (mean) and rail-samples-median-0shot; rail-0shot (posterior mean),
        rail-sum-0shot (not normalised) and rail-median-0shot; and so on for other numbers of shots; tuned-head, what
        the head predicts that was trained with the adapter. And a sentence for each readout that is left out since it
        is unfinished or damaged.
    """
    readouts, left_out = load_readouts(cache.folder, cache.manifest, split.name)
    cells: list[CellPredictions] = []
    stand_in = _stand_in(cache, split) if readouts else (0.0, "")
    for readout in readouts:
        answers = [readout.answers[row] for row in split.row]
        if readout.kind == REGRESSION:
            cells.append(CellPredictions(TUNED, 0, 0, 0, np.array(answers), seconds_per_1000_rows=_per_1000(readout)))
        elif readout.kind == "candidates":
            cells += _enumerated(readout, answers)
        else:
            cells += _decoded(readout, answers, cache.label_range, *stand_in)
    return cells, [f"Left out: {sentence}." for sentence in left_out]


def posterior_mean(log_p: ArrayLike, scores: ArrayLike) -> Array:
    """Σ p y, with p = exp(log_p) normalised over the C candidate scores: least expected squared error.

    Args:
        log_p: (N, C) log-probabilities.
        scores: (C,) the candidates y.

    Returns:
        (N,).
    """
    return _normalised(log_p) @ np.asarray(scores, dtype=np.float64)


def unnormalised_sum(log_p: ArrayLike, scores: ArrayLike) -> Array:
    """Σ exp(log_p) y as RAIL and RAFT write it: probability beside the grid draws the sum to zero. Shapes as before."""
    return np.exp(np.asarray(log_p, dtype=np.float64)) @ np.asarray(scores, dtype=np.float64)


def posterior_median(log_p: ArrayLike, scores: ArrayLike) -> Array:
    """The smallest candidate up to which half of the normalised probability lies: least expected absolute error.

    Args:
        log_p: (N, C) log-probabilities.
        scores: (C,) the candidates, ascending.

    Returns:
        (N,), each one of the candidates.
    """
    # A half that is one up to rounding counts as one.
    reached = _normalised(log_p).cumsum(axis=1) >= 0.5 - 1e-12
    return np.asarray(scores, dtype=np.float64)[reached.argmax(axis=1)]


def answers_note(name: str, answers: dict[str, Any]) -> str:
    """What a table says about the answers behind a cell; empty if there is nothing to say."""
    parts = []
    if answers["shots_used"] != answers["shots"]:
        parts.append(f"{answers['shots_used']} examples, since the context or the training split has no more")
    if "no_number" in answers:
        lost, of = answers["no_number"], answers["answers"]
        text = f"{lost:,} of {of:,} answers were no number"
        if answers["replaced_rows"]:
            rows = f"{answers['replaced_rows']:,} rows" if answers["replaced_rows"] > 1 else "1 row"
            text += f", and {rows} got {answers['replaced_by']:.3g}, {answers['replaced_by_what']}"
        parts += [text, f"{answers['clipped']:,} outside the label range were clipped"]
    return f"{name}: {'; '.join(parts)}." if parts else ""


def _decoded(
    readout: Readout, answers: list[Any], label_range: tuple[float, float], instead: float, what: str
) -> list[CellPredictions]:
    greedy = readout.kind == "greedy"
    parsed = parse_answers([[answer] if greedy else answer for answer in answers], label_range)
    lost = np.isnan(parsed.values).all(axis=1)
    facts = {
        "answers": parsed.values.size,
        "no_number": parsed.no_number,
        "replaced_rows": int(lost.sum()),
        "replaced_by": instead,
        "replaced_by_what": what,
        "clipped": parsed.clipped,
    }
    ways = {"greedy": np.nanmean} if greedy else {"rail-samples": np.nanmean, "rail-samples-median": np.nanmedian}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of rows without any number
        values = {name: np.where(lost, instead, way(parsed.values, axis=1)) for name, way in ways.items()}
    return [_cell(name, readout, line, facts) for name, line in values.items()]


def _enumerated(readout: Readout, answers: list[Any]) -> list[CellPredictions]:
    scores = readout.settings["candidates"]
    ways = {"rail": posterior_mean, "rail-sum": unnormalised_sum, "rail-median": posterior_median}
    return [_cell(name, readout, way(answers, scores), {}) for name, way in ways.items()]


def _cell(name: str, readout: Readout, values: Array, facts: dict[str, Any]) -> CellPredictions:
    per_thousand = _per_1000(readout)
    about = {"shots": readout.shots, "shots_used": readout.shots_used, "seconds_per_1000_rows": per_thousand}
    answers = {**about, **facts}
    note = answers_note(name, answers).removeprefix(f"{name}: ")
    full = f"{name}-{readout.shots}shot"
    return CellPredictions(full, 0, 0, 0, values, answers=answers, seconds_per_1000_rows=per_thousand, note=note)


def _per_1000(readout: Readout) -> float:
    return 1000 * readout.seconds / len(readout.rows)


def _stand_in(cache: FeatureCache, split: Split) -> tuple[float, str]:
    """What takes the place of an answer that is no number, and what it is."""
    try:
        target = cache.split("train", layer=cache.layers[0]).target
    except CacheError:
        target = np.array([np.nan])
    if np.isnan(target).all():
        low, high = cache.label_range
        return (low + high) / 2, "the middle of the label range"
    return float(np.nanmean(target)), "the mean label of the training split"


def _normalised(log_p: ArrayLike) -> Array:
    values = np.asarray(log_p, dtype=np.float64)
    p = np.exp(values - values.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)
