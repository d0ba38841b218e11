"""What a cache's own checks cost: opening it, opening a split, first and later reads, and verifying every byte.

    python benchmarks/checks.py CACHE --layer 20 --out checks.json
    python benchmarks/checks.py --small

Medians over rounds, in one process on one thread, with the cache in the system's page cache. A first pass over the
training split takes each row's CRC-32 over all layers; a later one reads the rows and nothing else. Both read random
batches of 32.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from caches import random_cache
from measure import arguments, save, table

from relish.cache.reader import Split, open_cache
from relish.cache.verify import verify_cache


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_all(split: Split) -> None:
    order = np.random.default_rng(0).permutation(len(split))
    for begin in range(0, len(order), 32):
        split.read(order[begin : begin + 32])


def measure(folder: Path, layer: int | None, rounds: int) -> dict[str, Any]:
    cache = open_cache(folder)
    read_all(cache.split("train", layer=layer))  # brings it into memory
    times: dict[str, list[float]] = {name: [] for name in ("open_cache", "split", "first", "later", "verify")}
    for _ in range(rounds):
        times["open_cache"].append(seconds(lambda: open_cache(folder)))
        times["split"].append(seconds(lambda: cache.split("train", layer=layer)))
        split = cache.split("train", layer=layer)
        times["first"].append(seconds(lambda split=split: read_all(split)))
        times["later"].append(seconds(lambda split=split: read_all(split)))
        times["verify"].append(seconds(lambda: verify_cache(cache)))
    records = [shard for split in cache.manifest.splits.values() for shard in split.shards]
    train = cache.manifest.splits["train"]
    states = int(split.lengths.sum()) * cache.hidden_size * 2  # bfloat16
    return {
        "tokens": train.tokens,
        "shards": len(train.shards),
        "layers": len(cache.layers),
        "bytes": sum(record.bytes for record in records),
        "seconds": {name: round(median(values), 5) for name, values in times.items()},
        "first_gb_s": round(states * len(cache.layers) / median(times["first"]) / 1e9, 2),
        "later_gb_s": round(states / median(times["later"]) / 1e9, 2),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("cache", type=Path, nargs="?")
    parser.add_argument("--layer", type=int)
    given = parser.parse_args()
    if given.cache is None and not given.small:
        parser.error("give a cache, or --small")
    with tempfile.TemporaryDirectory() as home:
        if given.small:
            lengths = {"train": np.full(64, 8), "dev": np.full(8, 8)}
            given.cache = random_cache(Path(home) / "cache", hidden_size=16, lengths=lengths)
        result = measure(given.cache, given.layer, 2 if given.small else given.rounds)
    save(given.out, result)
    took = result["seconds"]
    rows = [
        ("open_cache", f"{1e3 * took['open_cache']:.1f} ms", ""),
        ("cache.split", f"{1e3 * took['split']:.1f} ms", f"{result['shards']} shards, {result['tokens']:,} tokens"),
        ("first pass", f"{took['first']:.2f} s", f"{result['first_gb_s']} GB/s of {result['layers']} layers"),
        ("later pass", f"{took['later']:.2f} s", f"{result['later_gb_s']} GB/s of one layer"),
        ("verify", f"{took['verify']:.2f} s", f"{result['bytes'] / 1e9:.2f} GB"),
    ]
    print(table(("relish", "time", "of"), rows))


if __name__ == "__main__":
    main()
