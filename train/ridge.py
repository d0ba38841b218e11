"""Ridge regression in closed form, from one pass over pooled rows: memory is D², however many rows there are."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

ALPHAS = tuple(10.0**power for power in range(-2, 7))
"""Penalties tried, for standardised features; the validation split picks one."""


@dataclass
class Moments:
    """Running sums over rows, in float64, of features x (D,) and target y."""

    rows: int
    x: np.ndarray
    y: float
    xx: np.ndarray
    xy: np.ndarray

    @classmethod
    def of(cls, batches: Iterable[tuple[np.ndarray, np.ndarray]], width: int) -> "Moments":
        """Sum over batches of features (B, D) and targets (B,)."""
        sums = cls(0, np.zeros(width), 0.0, np.zeros((width, width)), np.zeros(width))
        for features, target in batches:
            features = features.astype(np.float64)
            sums.rows += len(features)
            sums.x += features.sum(axis=0)
            sums.y += float(target.sum())
            sums.xx += features.T @ features
            sums.xy += features.T @ target
        return sums


def solve_ridge(sums: Moments, alphas: tuple[float, ...] = ALPHAS) -> list[tuple[np.ndarray, float]]:
    """Weights (D,) and intercept for each penalty, on raw features.

    Minimises Σ (y − w·z − b)² + α |w|² for features z standardised by the same rows, the intercept free of penalty;
    one eigendecomposition serves all penalties.
    """
    mean = sums.x / sums.rows
    covariance = sums.xx - np.outer(sums.x, mean)
    scale = np.sqrt(np.maximum(np.diag(covariance) / sums.rows, 0.0))
    scale[scale <= 1e-6 * np.abs(mean)] = 1.0  # a constant feature's deviation is rounding noise
    scale[scale == 0] = 1.0
    values, vectors = np.linalg.eigh(covariance / np.outer(scale, scale))
    moment = vectors.T @ ((sums.xy - sums.x * (sums.y / sums.rows)) / scale)
    solutions = []
    for alpha in alphas:
        weights = (vectors @ (moment / (np.maximum(values, 0.0) + alpha))) / scale
        solutions.append((weights, sums.y / sums.rows - float(weights @ mean)))
    return solutions
