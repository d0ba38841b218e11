import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from relish.cache.dtypes import storage_dtype
from relish.cache.identity import Identity
from relish.cache.lock import LOCK
from relish.cache.writer import CacheWriter, SplitRows

WIDTH = 6
# In shards of at most four rows: 60 59 58 57, 30 30 30 29, 28, 1; the first two hold padding.
LENGTHS = (58, 30, 60, 29, 59, 1, 30, 57, 28, 30)
RANGE = (0.0, 5.0)


def identity(**changes: Any) -> Identity:
    fields: dict[str, Any] = {
        "model": "org/model",
        "revision": "abc",
        "weights": "w" * 64,
        "config": "c" * 64,
        "tokenizer": "t" * 64,
        "prompt": "Text: {text}",
        "chat_template": False,
        "max_length": 64,
        "truncate": False,
        "layers": (3,),
        "hidden_size": WIDTH,
        "trust_remote_code": False,
        "dtype": "bfloat16",
        "compute_dtype": "float32",
        "transformers": "5.0.0",
    }
    return Identity(**{**fields, **changes})


def rows(lengths=LENGTHS, *, seed: int = 0, **changes: Any) -> SplitRows:
    draw = np.random.default_rng(seed)
    tokens = [draw.integers(1, 1000, n).astype(np.int32) for n in lengths]
    target = draw.uniform(*RANGE, len(lengths))
    target[::4] = np.nan
    ids = [f"ид-{seed}-{number}" if number % 3 == 0 else f"{seed}-{number}" for number in range(len(lengths))]
    fingerprint = hashlib.sha256(repr((seed, tuple(lengths))).encode()).hexdigest()
    fields = {"ids": ids, "target": target, "tokens": tokens, "truncated": 0, "fingerprint": fingerprint}
    return SplitRows(**{**fields, **changes})


def states(given: SplitRows, made_by: Identity) -> list[torch.Tensor]:
    """The (K, n, D) hidden states of each row, the same at every call."""
    draw = torch.Generator().manual_seed(len(given.tokens))
    return [
        torch.randn(len(made_by.layers), len(tokens), made_by.hidden_size, generator=draw)
        .add(0.5)
        .to(storage_dtype(made_by.dtype).torch)
        for tokens in given.tokens
    ]


def open_writer(folder: Path, made_by: Identity | None = None, label_range=RANGE) -> CacheWriter:
    return CacheWriter(
        folder, identity=made_by or identity(), label_range=label_range, task=None, made_by={"relish": "0"}
    )


def fill(writer: CacheWriter, name: str, given: SplitRows, *, shard_rows: int = 4, stop_after: int | None = None):
    """Write the shards of a split that are not there yet, at most `stop_after` of them."""
    values = states(given, writer.manifest.identity)
    split = writer.split(name, given, shard_rows=shard_rows)
    for number in split.pending()[:stop_after]:
        with split.shard(number) as shard:
            for position, row in enumerate(split.members(number)):
                shard.write(position, values[row])
    return split


def write(folder: Path, splits: dict[str, SplitRows] | None = None, *, shard_rows: int = 4, **changes: Any) -> Path:
    """A whole cache."""
    writer = open_writer(folder, identity(**changes))
    for name, given in (splits or {"train": rows()}).items():
        fill(writer, name, given, shard_rows=shard_rows)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a cache, but for its lock, which says nothing."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != LOCK}


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """What the tests of the cache make caches with."""
    return SimpleNamespace(
        WIDTH=WIDTH,
        identity=identity,
        rows=rows,
        states=states,
        open_writer=open_writer,
        fill=fill,
        write=write,
        contents=contents,
        flip=flip,
    )
