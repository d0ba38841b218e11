"""How long rows are: like those of STS-B."""

import numpy as np


def draw_lengths(tokens: int, seed: int = 0) -> np.ndarray:
    """Lengths as STS-B's with the preset's prompt, mean 60, 41 to 159: as many rows as hold so many tokens."""
    draw = np.random.default_rng(seed)
    lengths = np.empty(0, dtype=np.int64)
    while lengths.sum() < tokens:
        lengths = np.append(lengths, np.clip(34 + draw.lognormal(3.13, 0.49, 1000), 41, 159).astype(np.int64))
    return lengths[: int(np.searchsorted(lengths.cumsum(), tokens)) + 1]
