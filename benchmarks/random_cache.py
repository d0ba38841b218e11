"""A cache without any LLM, through relish's own writer: for benchmarks whose figures do not depend on the numbers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from relish.cache.identity import Identity
from relish.cache.writer import CacheWriter, SplitRows


def write_cache(
    folder: Path,
    lengths: Sequence[int],
    width: int,
    states: Callable[[int], torch.Tensor],
    *,
    shard_rows: int = 4096,
) -> Path:
    """A cache of one layer with one split, train.

    Args:
        folder: where to; a cache that is there already is left as it is, an interrupted one goes on.
        lengths: N tokens of each row.
        width: D.
        states: gives a row's bfloat16 hidden states (1, n, D).
        shard_rows: most rows in a shard.
    """
    identity = Identity(
        model="random",
        revision=None,
        weights="0" * 64,
        config="0" * 64,
        tokenizer="0" * 64,
        prompt="{text}",
        chat_template=False,
        max_length=max(lengths),
        truncate=False,
        layers=(1,),
        hidden_size=width,
        trust_remote_code=False,
        dtype="bfloat16",
        compute_dtype="float32",
        transformers="0",
    )
    draw = np.random.default_rng(0)
    rows = SplitRows(
        ids=[str(row) for row in range(len(lengths))],
        target=draw.uniform(0, 5, len(lengths)),
        tokens=[draw.integers(0, 49152, length).astype(np.int32) for length in lengths],
        truncated=0,
        fingerprint="0" * 64,
    )
    writer = CacheWriter(folder, identity=identity, label_range=(0.0, 5.0), task=None, made_by={})
    split = writer.split("train", rows, shard_rows=shard_rows)
    for number in split.pending():
        with split.shard(number) as shard:
            for position, row in enumerate(split.members(number)):
                shard.write(position, states(int(row)))
    return folder
