from pathlib import Path

import numpy as np
import pytest
import torch

from relish.cache.identity import Identity
from relish.cache.writer import CacheWriter, SplitRows

HIDDEN = 24
SIZES = {"train": 96, "dev": 32, "test": 32}


def write_cache(
    folder: Path,
    *,
    sizes: dict[str, int] | None = None,
    hidden: int = HIDDEN,
    layers: tuple[int, ...] = (2,),
    label=None,
    fill=None,
    times: float = 1.0,
    label_range: tuple[float, float] = (0.0, 5.0),
) -> Path:
    """A cache of random hidden states whose target is a linear function of the mean of some dimensions."""
    identity = Identity(
        model="m",
        revision=None,
        weights="w",
        config="c",
        tokenizer="t",
        prompt="{text}",
        chat_template=False,
        max_length=64,
        truncate=False,
        layers=layers,
        hidden_size=hidden,
        trust_remote_code=False,
        dtype="bfloat16",
        compute_dtype="float32",
        transformers="5",
    )
    writer = CacheWriter(folder, identity=identity, label_range=label_range, task=None, made_by={})
    for number, (name, size) in enumerate((sizes or SIZES).items()):
        draw = np.random.default_rng(number)
        tokens = [draw.integers(1, 50, draw.integers(2, 12)).astype(np.int32) for _ in range(size)]
        torch.manual_seed(number)
        states = [torch.randn(len(layers), len(row), hidden) for row in tokens]
        target = np.array([float(s[-1].mean(0)[:4].sum()) for s in states])
        target = np.clip(2.5 + target, 0, 5) if label is None else np.full(size, label)
        rows = SplitRows([f"{name}-{i}" for i in range(size)], target, tokens, 0, f"{name}{size}")
        split = writer.split(name, rows, shard_rows=40)
        for shard in split.pending():
            with split.shard(shard) as out:
                for position, row in enumerate(split.members(shard)):
                    values = times * states[row] if fill is None else torch.full_like(states[row], fill)
                    out.write(position, values.bfloat16())
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "cache")
