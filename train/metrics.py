"""The six figures that compare predicted scores with gold scores, for one set of predictions."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cache.errors import RelishError

METRICS: tuple[str, ...] = ("pearson", "spearman", "kendall", "nrmse", "rmse", "mae")
"""The order every table and file shows them in."""

PAPER_METRICS: tuple[str, ...] = ("pearson", "spearman", "nrmse")
"""The three that the paper reports: what narrow tables and comparisons have."""

METRIC_NAMES = {
    "pearson": "Pearson",
    "spearman": "Spearman",
    "kendall": "Kendall",
    "nrmse": "NRMSE",
    "rmse": "RMSE",
    "mae": "MAE",
}
"""What people read above a column."""

HIGHER_IS_BETTER = {
    "pearson": True,
    "spearman": True,
    "kendall": True,
    "nrmse": False,
    "rmse": False,
    "mae": False,
}


def score(target: ArrayLike, prediction: ArrayLike, label_range: Sequence[float]) -> dict[str, float]:
    """Compare predictions with gold scores.

    With N rows, gold scores y and predictions p:

    - pearson, spearman, kendall (tau-b, which corrects for ties): scipy.stats, in [-1, 1]; NaN if either side is
      constant or there is only one row, where a correlation has no meaning.
    - rmse = sqrt(mean((p - y)²)) and mae = mean(abs(p - y)), in the label's unit.
    - nrmse = rmse / (label maximum - label minimum), as in the RELISH paper (arXiv 2604.01206).

    Args:
        target: (N,) gold scores.
        prediction: (N,) predicted scores.
        label_range: the smallest and the largest score the task allows, such as (0, 5).

    Returns:
        One float for each name in METRICS, in that order.

    Raises:
        RelishError: if the shapes differ, there are no rows, a value is not finite, or the label range is empty.
    """
    y, p = checked_pair(target, prediction)
    width = label_width(label_range)
    error = p - y
    rmse = float(np.sqrt(np.mean(error * error)))
    pearson, spearman, kendall = _correlations(y, p)
    return {
        "pearson": pearson,
        "spearman": spearman,
        "kendall": kendall,
        "nrmse": rmse / width,
        "rmse": rmse,
        "mae": float(np.mean(np.abs(error))),
    }


def checked_pair(target: ArrayLike, prediction: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as float64 of shape (N,), N ≥ 1, all finite.

    Raises:
        RelishError: if they are not that; the message says how many values are not finite.
    """
    y = np.asarray(target, dtype=np.float64)
    p = np.asarray(prediction, dtype=np.float64)
    if y.ndim != 1 or y.shape != p.shape:
        raise RelishError(f"targets and predictions must both be of shape (N,); got {y.shape} and {p.shape}")
    if y.size == 0:
        raise RelishError("there are no rows to score")
    for name, values in (("targets", y), ("predictions", p)):
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            raise RelishError(
                f"{bad} of {values.size} {name} are not finite (NaN or infinite), so no score can be given"
            )
    return y, p


def label_width(label_range: Sequence[float]) -> float:
    """Label maximum minus label minimum.

    Raises:
        RelishError: unless the range is two finite numbers, the smaller first.
    """
    if len(label_range) != 2:
        raise RelishError(f"the label range must be two numbers (minimum, maximum); got {tuple(label_range)}")
    low, high = (float(bound) for bound in label_range)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise RelishError(f"the label range must be finite with minimum below maximum; got ({low:g}, {high:g})")
    return high - low


def _correlations(y: NDArray[np.float64], p: NDArray[np.float64]) -> tuple[float, float, float]:
    if np.ptp(y) == 0 or np.ptp(p) == 0:
        return math.nan, math.nan, math.nan
    from scipy import stats

    with warnings.catch_warnings():
        # A head that has nearly collapsed gives predictions that differ in the last digits only: a poor figure is the
        # answer there, and a warning would end runs in which warnings are errors.
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        results: list[Any] = [stats.pearsonr(y, p), stats.spearmanr(y, p), stats.kendalltau(y, p)]
    pearson, spearman, kendall = (float(result.statistic) for result in results)
    return pearson, spearman, kendall
