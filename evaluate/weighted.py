"""Pearson, Spearman and NRMSE for many weightings of the same rows at once, which is all that resampling needs.

A weight says how often a row counts: that is a bootstrap's draw, and, with each row written twice, once for each
method, a permutation's swap. Arrays are (R, N), one weighting a line, since the running sums that ranks are made of are
fast along a line alone. (bootstrap.py has Kendall's tau too, whose plan wants them the other way.)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Sorted:
    """One variable in ascending order, equal values together."""

    order: NDArray[np.int64]  # (N,) rows
    code: NDArray[np.int64]  # (N,) the place of each row's value among the distinct values
    ends: NDArray[np.int64]  # (G,) where in `order` the last of each distinct value is

    @classmethod
    def of(cls, values: Array) -> "_Sorted":
        code = np.unique(values, return_inverse=True)[1]
        order = np.argsort(code, kind="stable")
        return cls(order, code, np.flatnonzero(np.diff(code[order], append=len(values))))

    def ranks(self, drawn: Array) -> tuple[Array, Array]:
        """Centred average ranks of the distinct values (R, G), and Σ of their squares over the rows that count (R,).

        Args:
            drawn: (R, N) weights of the rows in ascending order. The squares are exact: 0 means a constant.
        """
        running = np.cumsum(drawn, axis=1)
        if len(self.ends) < len(self.order):
            running = np.take(running, self.ends, axis=1)
            sizes = running.copy()
            sizes[:, 1:] -= running[:, :-1]
        else:
            sizes = drawn
        total = running[:, -1:].copy()
        running -= (sizes + total) / 2
        return running, np.einsum("rg,rg,rg->r", sizes, running, running)


@dataclass(frozen=True)
class WeightedPair:
    """Gold and predicted scores, with everything that does not depend on the weights."""

    moments: Array
    """(N, 6): y, p, y², p², yp of the centred scores, for Pearson; squared error."""
    y: _Sorted
    p: _Sorted

    @classmethod
    def prepare(
        cls,
        target: Array,
        prediction: Array,
        *,
        for_pearson: Array | None = None,
        for_spearman: Array | None = None,
    ) -> "WeightedPair":
        """Of (N,) gold and predicted scores; where given, others of (N,) stand in for the predictions."""
        error = prediction - target
        linear = prediction if for_pearson is None else for_pearson
        a, b = target - target.mean(), linear - linear.mean()
        moments = np.stack((a, b, a * a, b * b, a * b, error * error), axis=1)
        return cls(moments, _Sorted.of(target), _Sorted.of(prediction if for_spearman is None else for_spearman))

    def gold_ranks(self, weights: Array) -> tuple[Array, Array]:
        """Of the gold scores, for `figures`: centred ranks of the rows (R, N), and Σ of their squares (R,)."""
        ranks, squares = self.y.ranks(np.take(weights, self.y.order, axis=1))
        return np.take(ranks, self.y.code, axis=1), squares

    def figures(self, weights: Array, width: float, gold: tuple[Array, Array] | None = None) -> Array:
        """Pearson, Spearman and NRMSE of each weighting: (3, R); a correlation is NaN where a side is constant.

        Args:
            weights: (R, N); every line adds up to the same number.
            width: of the label range.
            gold: `gold_ranks`, if they are known: (1, N) and (1,) where they are the same for all.
        """
        count = weights[0].sum()
        m1, m2, m11, m22, m12, square = (weights @ self.moments).T / count
        gold_ranks, gold_squares = gold or self.gold_ranks(weights)
        drawn = np.take(weights, self.p.order, axis=1)
        ranks, squares = self.p.ranks(drawn)
        if len(self.p.ends) < len(self.p.order):
            ranks = np.take(ranks, self.p.code[self.p.order], axis=1)
        gold_ranks = np.take(gold_ranks, self.p.order, axis=1)
        if len(gold_ranks) == 1:
            covariance = np.einsum("rn,rn,n->r", drawn, ranks, gold_ranks[0])
        else:
            covariance = np.einsum("rn,rn,rn->r", drawn, ranks, gold_ranks)
        some = (squares > 0) & (gold_squares > 0)
        pearson = _ratio(m12 - m1 * m2, (m11 - m1 * m1) * (m22 - m2 * m2), some)
        return np.stack((pearson, _ratio(covariance, squares * gold_squares, some), np.sqrt(square) / width))


def _ratio(covariance: Array, product: Array, some: NDArray[np.bool_]) -> Array:
    """Covariance ÷ √(product of the variances), NaN where a side is constant."""
    result = np.full(len(covariance), np.nan)
    np.divide(covariance, np.sqrt(np.maximum(product, 0)), out=result, where=some & (product > 0))
    return result
