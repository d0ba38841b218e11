"""A grid of depths and seeds in one command of relish, against the rival's training of one cell after another.

    python benchmarks/grid.py CACHE --layer 20 --out grid.json            the rival's time from a sample
    python benchmarks/grid.py CACHE --layer 20 --full --out grid.json     the rival trains every cell
    python benchmarks/grid.py --small                                     a tiny cache, to see that it runs

Ours is `relish train CACHE --out RUNS --depths 1-5 --seeds 0-2`, one process from start to end. The rival is
rival_cell.py once per cell, each a process with torch's own number of threads; its figures are compared with ours too.
A seed draws the same initial weights and batches on both sides, so figures part only as far as rounding errors grow.
Every cell of the rival finds the principal axes that they begin with, every process of ours: less than a second each.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from caches import cut_cache, random_cache
from measure import HERE, cpu_seconds, peak_mb, save, table

from relish.train.settings import EPOCHS, parse_range

SAMPLE = 100  # steps
METRICS = ("pearson", "nrmse")
SMALL = {"train": 96, "dev": 32}


def ours(cache: Path, runs: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The one command: wall time, memory, and the figures of each cell."""
    command = [sys.executable, "-m", "relish", "train", cache, "--out", runs, "--epochs", given.epochs, "--json"]
    command += ["--depths", given.depths, "--seeds", given.seeds, "--device", "cpu"]
    command += [] if given.layer is None else ["--layer", given.layer]
    wall, cpu, said = timed(command)
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        # Of this process's children and theirs: none of the rival's is there yet.
        "largest_process_mb": round(peak_mb(resource.RUSAGE_CHILDREN)),
        "cells": [
            {
                **{name: cell[name] for name in ("depth", "seed", "epochs", "seconds")},
                **{name: cell["val"][name] for name in METRICS},
            }
            for cell in said["cells"]
        ],
    }


def rival(cache: Path, folder: Path, given: argparse.Namespace, mine: list[dict[str, Any]]) -> dict[str, Any]:
    """One process per cell: their wall time together, and the figures of each cell, or what a sample says of the time.

    A sample is of one seed for each depth: the process's time without the steps and the validation that it took, and
    as many epochs as relish's cells of that depth took on average, since both would stop early at the same epoch.
    """
    depths, seeds = parse_range(given.depths, "--depths"), parse_range(given.seeds, "--seeds")
    cells: list[dict[str, Any]] = []
    for depth in depths:
        for seed in seeds if given.full else seeds[:1]:
            command = [sys.executable, HERE / "rival_cell.py", cache, "--depth", depth, "--seed", seed]
            command += ["--epochs", given.epochs, *([] if given.layer is None else ["--layer", given.layer])]
            command += ["--out", folder / f"L{depth}-seed{seed}.pt"] if given.full else ["--sample", SAMPLE]
            wall, cpu, said = timed(command)
            if not given.full:
                epochs = statistics.mean(cell["epochs"] for cell in mine if cell["depth"] == depth)
                wall += epochs * said["epoch_s"] - said["sampled_s"]
            cells.append(
                {"depth": depth, "seed": seed, "wall_s": wall, **({"cpu_s": cpu} if given.full else {}), **said}
            )
            print(f"rival L{depth} seed{seed}: {wall:.1f} s{'' if given.full else ' (extrapolated)'}", file=sys.stderr)
    share = 1 if given.full else len(seeds)
    return {
        "wall_s": share * sum(cell["wall_s"] for cell in cells),
        "extrapolated": not given.full,
        "cells": cells,
    }


def timed(command: list[Any]) -> tuple[float, float, dict[str, Any]]:
    """Wall and CPU seconds of a process and its children, with torch's own threads, and the JSON that it printed."""
    free = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    before, started = cpu_seconds(), time.perf_counter()
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True, env=free)
    return time.perf_counter() - started, cpu_seconds() - before, json.loads(done.stdout)


def spread(cells: list[dict[str, Any]], depth: int, name: str) -> str:
    """Mean ± standard deviation over seeds."""
    values = [cell[name] for cell in cells if cell["depth"] == depth and name in cell]
    if not values:
        return "–"
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def report(result: dict[str, Any]) -> str:
    """Markdown."""
    mine, other = result["relish"], result["rival"]
    rows = []
    for depth in sorted({cell["depth"] for cell in mine["cells"]}):
        wall = statistics.mean(cell["wall_s"] for cell in other["cells"] if cell["depth"] == depth)
        figures = [spread(side["cells"], depth, name) for name in METRICS for side in (mine, other)]
        rows.append([depth, *figures, f"{wall:.1f}"])
    header = ["L", "Pearson, relish", "Pearson, rival", "NRMSE, relish", "NRMSE, rival", "rival, s per cell"]
    how = (
        f"extrapolated from {SAMPLE} steps and one validation at each depth"
        if other["extrapolated"]
        else "every cell trained"
    )
    return (
        f"{table(header, rows)}\n\n"
        f"{len(mine['cells'])} cells, {result['rows']} training rows, {result['epochs']} epochs, validation figures. "
        f"Wall time: relish {mine['wall_s']:.1f} s, rival {other['wall_s']:.1f} s ({how}): {result['factor']:.2f} ×. "
        f"The largest of relish's processes took {mine['largest_process_mb']} MB."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, nargs="?", help="a cache, such as STS-B's")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--rows", type=int, help="only the first so many training rows")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--depths", default="1-5")
    parser.add_argument("--seeds", default="0-2")
    parser.add_argument("--full", action="store_true", help="train every cell of the rival")
    parser.add_argument("--small", action="store_true", help="a tiny cache and grid, both sides in full")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    given = parser.parse_args()
    if (given.cache is None) != given.small:
        parser.error("name a cache, or --small")
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        if given.small:
            given.full, given.depths, given.seeds, given.epochs = True, "1-2", "0", 2
            lengths = {name: np.random.default_rng(0).integers(4, 24, size) for name, size in SMALL.items()}
            given.cache = random_cache(folder / "cache", hidden_size=32, lengths=lengths)
        elif given.rows is not None:
            given.cache, given.layer = cut_cache(given.cache, folder / "cut", layer=given.layer, rows=given.rows), None
        for shard in given.cache.glob("*.h5"):
            shard.read_bytes()  # from memory for both
        mine = ours(given.cache, folder / "runs", given)
        other = rival(given.cache, folder, given, mine["cells"])
        result = {
            "benchmark": "grid",
            "rows": json.loads((given.cache / "manifest.json").read_text())["splits"]["train"]["rows"],
            "epochs": given.epochs,
            "factor": other["wall_s"] / mine["wall_s"],
            "relish": mine,
            "rival": other,
        }
    save(given.out, result)
    print(report(result))


if __name__ == "__main__":
    main()
