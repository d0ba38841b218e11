"""Is one method better than another on the same rows? Paired bootstrap, paired permutation test, Holm's correction.

Both tests take the metric's mean over the seeds, and treat a row as one unit: its predictions by all seeds are drawn,
or swapped, together. Both share one arithmetic (weighted.py): with the N rows written twice, once with each method's
prediction, a swap is a choice of which of the two counts.

A correlation does not depend on the predictions' offset and scale, and a swap must not either: two methods whose
predictions lie apart would blur both sides wherever they are mixed, and hide any difference. So standardised
predictions are swapped for Pearson (as by Deutsch, Dror and Roth, A Statistical Analysis of Summarization Evaluation
Metrics Using Resampling Methods, TACL 2021), and, for the same reason, ranks for Spearman.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from ..train.metrics import PAPER_METRICS, checked_pair, label_width
from .bootstrap import draws, quantile_interval
from .weighted import WeightedPair

Array = NDArray[np.float64]
Seed = int | tuple[int, int]
"""Of a head; of the tuning and of the head on its states, where several tunings of an LLM stand for one method."""
ALPHA = 0.05
"""Level at which a difference counts as a win or a loss, after Holm's correction."""
_BLOCK = 65_536  # weights at a time, so that a handful of such arrays fits the processor's caches
_ROUNDING = 1e-12  # of a difference of metrics: ties with the observed one, and with 0, must count as such


@dataclass(frozen=True)
class Difference:
    """One metric of one method less that of another, on the same rows; all NaN where a side is undefined."""

    value: float
    """Of the means over the seeds that were given, in the metric's unit."""
    ci95: tuple[float, float]
    """Percentile bootstrap interval, over rows."""
    p_bootstrap: float
    """Two-sided, of the bootstrap: how far 0 lies in the tail of the resampled differences."""
    p: float
    """Two-sided, of the permutation test."""


def pair_seeds(ours: Sequence[Seed], theirs: Sequence[Seed]) -> tuple[list[int], list[int]]:
    """Which of our predictions is compared with which of theirs: places in `ours` and in `theirs`.

    The same seeds belong together. Where a side has others, as a closed form or a decoded answer has one alone, and as
    where a seed diverged, each is compared with each: the mean over the pairs is then still the difference of the
    means over all seeds.
    """
    if set(ours) == set(theirs):
        return list(range(len(ours))), [list(theirs).index(seed) for seed in ours]
    pairs = list(product(range(len(ours)), range(len(theirs))))
    return [one for one, _ in pairs], [other for _, other in pairs]


def differences(
    target: ArrayLike,
    ours: ArrayLike,
    theirs: ArrayLike,
    label_range: Sequence[float],
    *,
    our_resamples: Array,
    their_resamples: Array,
    permutations: int,
    seed: int = 0,
) -> dict[str, Difference]:
    """Compare two methods by each of PAPER_METRICS.

    Args:
        target: (N,) gold scores.
        ours: (P, N) predictions, in the order of `pair_seeds`.
        theirs: (P, N).
        label_range: the smallest and the largest score the task allows.
        our_resamples: (3, R) means of `resampled_figures` over our seeds, of the same draws for both.
        their_resamples: (3, R).
        permutations: how many swaps are drawn.
        seed: of their drawing.

    Raises:
        RelishError: if a value is not finite, or the label range is empty.
    """
    rows, width = np.asarray(target).size, label_width(label_range)
    pairs = doubled_pairs(target, ours, theirs)
    swapped = [swapped_differences(pairs, width, swaps) for swaps in _swaps(rows, permutations, seed)]
    null = np.concatenate(swapped, axis=1)
    observed = swapped_differences(pairs, width, np.zeros((1, rows)))[:, 0]
    return {
        name: _difference(value, resampled, swapped)
        for name, value, resampled, swapped in zip(
            PAPER_METRICS, observed.tolist(), our_resamples - their_resamples, null, strict=True
        )
    }


def doubled_pairs(target: ArrayLike, ours: ArrayLike, theirs: ArrayLike) -> list[WeightedPair]:
    """For each of P predictions on both sides (P, N) the N rows twice: with ours first, then with theirs.

    Each side is standardised by itself for Pearson, ranked by itself for Spearman, and as it is for the NRMSE.

    Raises:
        RelishError: if a value is not finite.
    """
    gold = np.tile(np.asarray(target, dtype=float), 2)
    pairs = []
    for both in zip(np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float), strict=True):
        checked_gold, values = checked_pair(gold, np.concatenate(both))
        standard, ranks = (np.concatenate([form(one) for one in both]) for form in (_standardised, rankdata))
        pairs.append(WeightedPair.prepare(checked_gold, values, for_pearson=standard, for_spearman=ranks))
    return pairs


def swapped_differences(pairs: Sequence[WeightedPair], width: float, swaps: Array) -> Array:
    """Our mean over the seeds less theirs, for each of PAPER_METRICS, after swapping predictions: (3, R).

    Args:
        pairs: of `doubled_pairs`.
        width: of the label range.
        swaps: (R, N), 1 where a row's predictions change sides, 0 where they stay.
    """
    kept = np.concatenate((1 - swaps, swaps), axis=1)
    moved = 1 - kept
    total = np.zeros((len(PAPER_METRICS), len(swaps)))
    gold = pairs[0].gold_ranks(kept[:1])  # a swap leaves the gold scores of a side as they are
    for both in pairs:
        total += both.figures(kept, width, gold) - both.figures(moved, width, gold)
    return total / len(pairs)


def draw_rows(rows: int, resamples: int, seed: int = 0) -> NDArray[np.uint8]:
    """How often each row is drawn, N out of N with replacement: (R, N), the same as `bootstrap.intervals` draws."""
    drawn = np.empty((resamples, rows), dtype=np.uint8)  # a row is not drawn 256 times, of any N
    for line, counts in zip(drawn, draws(rows, resamples, seed), strict=True):
        line[:] = counts
    return drawn


def resampled_figures(
    target: ArrayLike, predictions: ArrayLike, label_range: Sequence[float], drawn: NDArray[np.uint8]
) -> Array:
    """Each of PAPER_METRICS on resamples of the rows: (S, 3, R) for S seeds' predictions (S, N) and draws (R, N)."""
    width = label_width(label_range)
    pairs = [WeightedPair.prepare(*checked_pair(target, line)) for line in np.asarray(predictions, dtype=float)]
    figures = []
    step = max(1, _BLOCK // drawn.shape[1])
    for start in range(0, len(drawn), step):
        weights = drawn[start : start + step].astype(np.float64)
        gold = pairs[0].gold_ranks(weights)
        figures.append([pair.figures(weights, width, gold) for pair in pairs])
    return np.concatenate(figures, axis=2)


def _standardised(values: Array) -> Array:
    centred = values - values.mean()
    return centred / (np.sqrt(np.mean(centred**2)) or 1.0)


def _swaps(rows: int, permutations: int, seed: int) -> Iterator[Array]:
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // (2 * rows))
    for start in range(0, permutations, step):
        yield rng.integers(2, size=(min(step, permutations - start), rows)).astype(np.float64)


def _difference(observed: float, resampled: Array, swapped: Array) -> Difference:
    if not math.isfinite(observed):
        return Difference(math.nan, (math.nan, math.nan), math.nan, math.nan)
    return Difference(observed, quantile_interval(resampled), bootstrap_p(resampled), permutation_p(observed, swapped))


def bootstrap_p(resampled: Array) -> float:
    """Twice the smaller tail beyond 0 of the resampled differences (R,), plus one in count and total; at most 1."""
    resampled = resampled[np.isfinite(resampled)]
    tail = min(np.count_nonzero(resampled <= _ROUNDING), np.count_nonzero(resampled >= -_ROUNDING))
    return min(1.0, 2 * (tail + 1) / (len(resampled) + 1))


def permutation_p(observed: float, swapped: Array) -> float:
    """Share of swaps (R,) with a difference as large as observed, which counts as one more (Phipson & Smyth 2010).

    A swap that leaves a correlation undefined counts as large.
    """
    large = ~(np.abs(swapped) < abs(observed) - _ROUNDING)
    return (np.count_nonzero(large) + 1) / (len(swapped) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests (Holm 1979), in the order given; NaN stays, and is no member.

    With the m values in ascending order, the i-th (from 0) becomes the largest of (m - j) p_j over j ≤ i, at most 1.
    """
    order = sorted((place for place, p in enumerate(p_values) if not math.isnan(p)), key=lambda place: p_values[place])
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
