"""Caches for benchmarks, through relish's own writer: of random or given hidden states, or cut from a real one."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from relish.cache.identity import Identity
from relish.cache.reader import open_cache
from relish.cache.writer import CacheWriter, SplitRows


def random_cache(folder: Path, *, hidden_size: int, lengths: dict[str, np.ndarray]) -> Path:
    """Random hidden states whose label is, but for noise, a linear function of their mean.

    Args:
        folder: for the cache.
        hidden_size: D.
        lengths: tokens of each row of each split.
    """
    writer = CacheWriter(folder, identity=_identity(hidden_size), label_range=(0.0, 5.0), task=None, made_by={})
    for number, (name, sizes) in enumerate(lengths.items()):
        draw = np.random.default_rng(number)
        centre = torch.from_numpy(draw.standard_normal((len(sizes), hidden_size), dtype=np.float32)) / 2
        noise = draw.standard_normal(len(sizes)) / 4
        target = np.clip(2.5 + centre[:, :4].sum(dim=1).numpy() + noise, 0, 5).astype(np.float64)

        def states(row: int, sizes: np.ndarray = sizes, centre: Tensor = centre, number: int = number) -> Tensor:
            generator = torch.Generator().manual_seed(1_000_000 * number + row)
            return (centre[row] + torch.randn(int(sizes[row]), hidden_size, generator=generator)).bfloat16()[None]

        _write_split(writer, name, sizes, target, states)
    return folder


def cache_of(
    folder: Path, lengths: Sequence[int], width: int, states: Callable[[int], Tensor], *, shard_rows: int = 4096
) -> Path:
    """A cache of one split, train, with given hidden states and random labels.

    Args:
        folder: for the cache; a finished one is left as it is, an interrupted one goes on.
        lengths: N tokens of each row.
        width: D.
        states: gives a row's bfloat16 hidden states (1, n, D).
        shard_rows: most rows in a shard.
    """
    writer = CacheWriter(folder, identity=_identity(width), label_range=(0.0, 5.0), task=None, made_by={})
    target = np.random.default_rng(0).uniform(0, 5, len(lengths))
    _write_split(writer, "train", np.asarray(lengths), target, states, shard_rows)
    return folder


def cut_cache(cache: Path, folder: Path, *, layer: int | None, rows: int) -> Path:
    """The first so many rows of a cache's training split at one layer, and all of its validation split."""
    opened = open_cache(cache)
    position = opened.layer_position(layer)
    identity = _identity(opened.hidden_size, layer=opened.layers[position])
    writer = CacheWriter(folder, identity=identity, label_range=opened.label_range, task=None, made_by={})
    name = next(name for name in ("validation", "val", "dev", "trial") if name in opened.splits)
    for split in (opened.split("train", layer=layer), opened.split(name, layer=layer)):
        count = min(rows, len(split)) if split.name == "train" else len(split)

        def states(row: int, split=split) -> Tensor:
            return split.read([row]).hidden

        _write_split(writer, split.name, split.lengths[:count], split.target[:count], states)
    return folder


def _write_split(
    writer: CacheWriter,
    name: str,
    lengths: np.ndarray,
    target: np.ndarray,
    states: Callable[[int], Tensor],
    shard_rows: int = 4096,
) -> None:
    draw = np.random.default_rng(0)  # as many different ids as a tokenizer gives: an archive compresses them
    tokens = [draw.integers(0, 49152, length).astype(np.int32) for length in lengths]
    rows = SplitRows([str(row) for row in range(len(lengths))], target, tokens, 0, f"{name} {len(lengths)}")
    split = writer.split(name, rows, shard_rows=shard_rows)
    for number in split.pending():
        with split.shard(number) as shard:
            for position, row in enumerate(split.members(number)):
                shard.write(position, states(int(row)))


def _identity(hidden_size: int, layer: int = 1) -> Identity:
    return Identity(
        model="benchmark",
        revision=None,
        weights="none",
        config="none",
        tokenizer="none",
        prompt="{text}",
        chat_template=False,
        max_length=8192,
        truncate=False,
        layers=(layer,),
        hidden_size=hidden_size,
        trust_remote_code=False,
        dtype="bfloat16",
        compute_dtype="float32",
        transformers="none",
    )
