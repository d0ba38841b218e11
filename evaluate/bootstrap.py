"""Percentile bootstrap intervals over rows: how much would the figures move with another sample of test rows?

A resample is written as multiplicities: w (N,) says how often each row was drawn. All six metrics are then sums
weighted by w, computed for a block of R resamples at once, where scipy would be called for every resample and seed.
Arrays are laid out (N, R), rows first, so that picking and adding rows moves whole lines of memory.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cache.errors import RelishError
from ..train.metrics import METRICS, checked_pair, label_width

Array = NDArray[np.float64]
_BLOCK_ELEMENTS = 2_000_000  # of an (N, R) array: 16 MB each, about ten of them alive at once


def intervals(
    target: ArrayLike,
    predictions: ArrayLike,
    label_range: Sequence[float],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % intervals of each metric's mean over the seeds (percentile bootstrap, Efron 1979).

    Rows are drawn N out of N with replacement, the same rows for every metric and every seed; two heads given the same
    rows and the same `seed` see the same resamples too. The interval covers the sampling of the rows; the spread
    between training seeds is reported apart, as a standard deviation.

    Args:
        target: (N,) gold scores.
        predictions: (S, N), one line for each training seed.
        label_range: the smallest and the largest score the task allows.
        resamples: how many times the rows are drawn.
        seed: of the drawing.

    Returns:
        (low, high) for each name in METRICS, in the metric's unit: the 2.5 % and 97.5 % quantiles. Resamples in which a
        correlation has no meaning (a constant side) are left out; (NaN, NaN) if that is all of them.

    Raises:
        RelishError: if shapes do not fit, a value is not finite, or the label range is empty.
    """
    lines = np.asarray(predictions, dtype=np.float64)
    if lines.ndim != 2 or lines.shape[0] == 0:
        raise RelishError(f"predictions must be of shape (seeds, N) with at least one seed; got {lines.shape}")
    width = label_width(label_range)
    pairs = [_Pair.prepare(*checked_pair(target, line)) for line in lines]
    rows = lines.shape[1]

    means = np.zeros((len(METRICS), resamples))
    start = 0
    for weights in _blocks(rows, resamples, seed):
        stop = start + weights.shape[1]
        for pair in pairs:
            means[:, start:stop] += pair.metrics(weights, width) / len(pairs)
        start = stop
    return {name: quantile_interval(line) for name, line in zip(METRICS, means, strict=True)}


def draws(rows: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """For each resample how often each row is drawn, N out of N with replacement: (N,), adding up to N."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(rows, size=rows), minlength=rows)


def _blocks(rows: int, resamples: int, seed: int) -> Iterator[Array]:
    """Draws side by side, in blocks (N, R)."""
    drawn = draws(rows, resamples, seed)
    block = min(64, max(1, _BLOCK_ELEMENTS // rows))
    while some := list(islice(drawn, block)):
        yield np.stack(some, axis=1).astype(np.float64)


def quantile_interval(values: Array) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the values that are finite; (NaN, NaN) if none is."""
    values = values[np.isfinite(values)]
    if values.size == 0:
        return math.nan, math.nan
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True)
class _Groups:
    """Equal values of one variable, in ascending order."""

    code: NDArray[np.int64]  # (N,) the place of each row's value among the distinct values
    order: NDArray[np.int64]  # (N,) rows sorted by value
    starts: NDArray[np.int64]  # (G,) where each distinct value begins in `order`

    @classmethod
    def of(cls, values: NDArray[np.float64] | NDArray[np.int64]) -> "_Groups":
        code = np.unique(values, return_inverse=True)[1]
        order = np.argsort(code, kind="stable")
        starts = np.flatnonzero(np.diff(code[order], prepend=-1))
        return cls(code, order, starts)

    def sizes(self, weights: Array) -> Array:
        """How many drawn rows have each distinct value: (G, R)."""
        return np.add.reduceat(weights[self.order], self.starts, axis=0)


@dataclass(frozen=True)
class _Pair:
    """Gold and predicted scores of one seed, with everything that does not depend on the resample."""

    moments: Array  # (N, 7): y, p, y², p², yp of the centred scores; squared and absolute error
    y: _Groups
    p: _Groups
    both: _Groups
    levels: "list[_Level]"

    @classmethod
    def prepare(cls, target: Array, prediction: Array) -> "_Pair":
        error = prediction - target
        a, b = target - target.mean(), prediction - prediction.mean()
        y, p = _Groups.of(target), _Groups.of(prediction)
        both = _Groups.of(y.code * len(p.starts) + p.code)
        moments = np.stack((a, b, a * a, b * b, a * b, error * error, np.abs(error)), axis=1)
        return cls(moments, y, p, both, _levels(y.code, p.code))

    def metrics(self, weights: Array, width: float) -> Array:
        """All metrics of each resample: (6, R), in the order of METRICS."""
        rows = len(weights)
        m1, m2, m11, m22, m12, square, absolute = self.moments.T @ weights / rows
        y_sizes, p_sizes = self.y.sizes(weights), self.p.sizes(weights)
        # Ordered pairs of drawn rows whose values differ, exact in float64: zero says that the side is constant.
        y_pairs = rows * rows - np.sum(y_sizes * y_sizes, axis=0)
        p_pairs = rows * rows - np.sum(p_sizes * p_sizes, axis=0)
        constant = (y_pairs == 0) | (p_pairs == 0)

        pearson = _ratio(m12 - m1 * m2, m11 - m1 * m1, m22 - m2 * m2, constant)
        y_ranks, p_ranks = _centred_ranks(y_sizes, rows), _centred_ranks(p_sizes, rows)
        covariance = np.einsum("nr,nr,nr->r", weights, y_ranks[self.y.code], p_ranks[self.p.code])
        y_variance = np.einsum("gr,gr,gr->r", y_sizes, y_ranks, y_ranks)
        p_variance = np.einsum("gr,gr,gr->r", p_sizes, p_ranks, p_ranks)
        spearman = _ratio(covariance, y_variance, p_variance, constant)

        both_sizes = self.both.sizes(weights)
        untied = y_pairs + p_pairs - (rows * rows - np.sum(both_sizes * both_sizes, axis=0))
        # Untied pairs are concordant or discordant, and `untied` counts each twice: C - D = 2C - (C + D).
        difference = 4 * _concordant(weights, self.levels) - untied
        kendall = _ratio(difference, y_pairs, p_pairs, constant)

        rmse = np.sqrt(square)
        return np.stack((pearson, spearman, kendall, rmse / width, rmse, absolute))


def _ratio(covariance: Array, first: Array, second: Array, constant: NDArray[np.bool_]) -> Array:
    """covariance / sqrt(first · second), NaN where `constant`."""
    scale = np.sqrt(np.maximum(first, 0)) * np.sqrt(np.maximum(second, 0))
    result = np.full(len(scale), math.nan)
    return np.divide(covariance, scale, out=result, where=~constant & (scale > 0))


def _centred_ranks(sizes: Array, rows: int) -> Array:
    """Average rank of each distinct value less the mean rank (N + 1) / 2: (G, R)."""
    return np.cumsum(sizes, axis=0) - sizes / 2 - rows / 2


@dataclass(frozen=True)
class _Level:
    """One step of counting concordant pairs; see `_levels`."""

    lower: NDArray[np.int64]  # (Z,) rows whose bit is 0, part by part, each part in ascending prediction
    upper: NDArray[np.int64]  # (O,) rows whose bit is 1
    before: NDArray[np.int64]  # (O,) how many of `lower` come before each of `upper`
    part: NDArray[np.int64]  # (O,) how many of them belong to earlier parts


def _levels(y_code: NDArray[np.int64], p_code: NDArray[np.int64]) -> list[_Level]:
    """Split the concordant pairs by the highest bit in which the two gold codes differ.

    This is the merge count of Knight (1966) turned to bits, so that its plan depends on the data alone and the weights
    can be a block of resamples: O(N log G) for each, G the number of distinct gold scores. Rows are put in ascending
    prediction; within tied predictions in descending gold, so that a tie is never counted as concordant.
    """
    order = np.lexsort((-y_code, p_code))
    code = y_code[order]
    levels = []
    for bit in range(int(code.max()).bit_length()):
        within = np.argsort(code >> (bit + 1), kind="stable")
        part = code[within] >> (bit + 1)
        one = (code[within] >> bit) & 1 == 1
        before = np.cumsum(~one)[one]
        first = np.searchsorted(part[~one], part[one])
        rows = order[within]
        levels.append(_Level(rows[~one], rows[one], before, first))
    return levels


def _concordant(weights: Array, levels: list[_Level]) -> Array:
    """Σ w_i w_j over unordered pairs that gold and prediction put in the same order: (R,)."""
    total = np.zeros(weights.shape[1])
    for level in levels:
        running = np.zeros((len(level.lower) + 1, weights.shape[1]))
        np.cumsum(weights[level.lower], axis=0, out=running[1:])
        smaller = running[level.before]
        smaller -= running[level.part]
        total += np.einsum("nr,nr->r", weights[level.upper], smaller)
    return total
