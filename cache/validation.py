"""Which rows tell the best epoch: a split of their own, or some that are held out of train.

Here, since heads and adapters must hold out the same rows: those that an adapter has learned are no validation rows of
heads on its states.
"""

import numpy as np

VALIDATION_NAMES = ("validation", "val", "dev", "trial")
"""What the split is called that early stopping looks at; the first that is there."""


def held_out(rows: int, share: float) -> np.ndarray:
    """(n,) int64 ascending, which of so many rows are held out; the same ones each time, and one at least."""
    return np.sort(np.random.default_rng(0).permutation(rows)[: max(1, round(share * rows))])
