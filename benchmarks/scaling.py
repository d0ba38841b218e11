"""How the cost of training grows with hidden size, row length, depth, rows and cells, one of them varied at a time.

    python benchmarks/scaling.py --out scaling.json        writes scaling.png too
    python benchmarks/scaling.py --small

Everything is trained by `relish.train_heads` on caches of random hidden states that lie in memory. D, T and L: the
median time of a training step of 16 rows, in one process with torch's own threads. Rows: the median time of an epoch.
Cells: the wall time of a whole grid, in as many processes as relish takes by itself. The exponent is the slope of a
line through all points on logarithmic axes; that of the last two points says what becomes of it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from caches import random_cache
from clock import Clock
from measure import save, table

from relish.train.grid import train_heads
from relish.train.settings import TrainSettings

BATCH = 16
STEPS = 4  # of an epoch where steps are timed
EPOCHS = 9
BASE = {"D": 1024, "T": 64, "L": 3}
SWEEPS: dict[str, tuple[int, ...]] = {
    "D": (256, 512, 1024, 2048, 4096),
    "T": (16, 32, 64, 128, 256, 512),
    "L": (1, 2, 3, 4, 6, 8),
    "rows": (250, 500, 1000, 2000, 4000),
    "cells": (1, 2, 4, 8),
}
SMALL: dict[str, tuple[int, ...]] = {
    "D": (16, 32),
    "T": (4, 8),
    "L": (1, 2),
    "rows": (32, 64),
    "cells": (1, 2),
}
TITLES = {
    "D": "hidden size D, a step",
    "T": "tokens per row T, a step",
    "L": "depth L, a step",
    "rows": "training rows, an epoch",
    "cells": "cells, a whole grid",
}


def step_seconds(folder: Path, D: int, T: int, L: int) -> float:
    """The median step. An epoch's first step begins with an empty reader, and the first epoch checks the rows."""
    lengths = {"train": np.full(BATCH * STEPS, T), "dev": np.full(4, T)}
    cache = random_cache(folder / "cache", hidden_size=D, lengths=lengths)
    clock = Clock()
    settings = TrainSettings(depths=(L,), epochs=EPOCHS, patience=EPOCHS, batch_size=BATCH, device="cpu", workers=1)
    train_heads(cache, folder / "runs", settings, listener=clock)
    ends = np.array(clock.steps).reshape(EPOCHS, STEPS)[1:]
    return float(np.median(np.diff(ends, axis=1)))


def epoch_seconds(folder: Path, rows: int, D: int, T: int) -> float:
    """The median epoch, of those after the first."""
    cache = random_cache(folder / "cache", hidden_size=D, lengths={"train": np.full(rows, T), "dev": np.full(4, T)})
    clock = Clock()
    settings = TrainSettings(epochs=4, patience=4, device="cpu", workers=1)
    train_heads(cache, folder / "runs", settings, listener=clock)
    return statistics.median(clock.epochs[1:])


def grid_seconds(folder: Path, cells: int, rows: int, D: int, T: int) -> float:
    """Wall time of a grid of so many seeds, the start of its processes included."""
    cache = random_cache(folder / "cache", hidden_size=D, lengths={"train": np.full(rows, T), "dev": np.full(4, T)})
    settings = TrainSettings(seeds=tuple(range(cells)), epochs=20, patience=20, device="cpu")
    started = time.perf_counter()
    train_heads(cache, folder / "runs", settings)
    return time.perf_counter() - started


def sweep(small: bool) -> list[dict[str, Any]]:
    """Every series: what varies, its values, the seconds, and the two exponents."""
    base = {"D": 32, "T": 8, "L": 1} if small else BASE
    light = {"D": 32, "T": 8} if small else {"D": 256, "T": 16}
    found = []
    for name, values in (SMALL if small else SWEEPS).items():
        seconds = []
        for value in values:
            with tempfile.TemporaryDirectory() as home:
                folder = Path(home)
                if name == "rows":
                    seconds.append(epoch_seconds(folder, value, **light))
                elif name == "cells":
                    seconds.append(grid_seconds(folder, value, 32 if small else 320, **light))
                else:
                    seconds.append(step_seconds(folder, **{**base, name: value}))
            print(f"{name} = {value}: {1000 * seconds[-1]:,.1f} ms", file=sys.stderr, flush=True)
        fixed = {"rows": light, "cells": light}.get(name, {key: base[key] for key in base if key != name})
        x, y = np.log(values), np.log(seconds)
        slope, intercept = np.polyfit(x, y, 1)
        found.append(
            {
                "varied": name,
                "fixed": fixed,
                "values": list(values),
                "seconds": [round(value, 6) for value in seconds],
                "exponent": round(float(slope), 3),
                "factor": float(np.exp(intercept)),
                "last_exponent": round(float((y[-1] - y[-2]) / (x[-1] - x[-2])), 3),
            }
        )
    return found


def plot(path: Path, series: list[dict[str, Any]]) -> None:
    """Small multiples on logarithmic axes, each with its line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(3 * len(series), 3), layout="constrained", dpi=150)
    for axis, one in zip(figure.subplots(1, len(series)), series, strict=True):
        x, y = np.array(one["values"], dtype=float), 1000 * np.array(one["seconds"])
        axis.loglog(x, 1000 * one["factor"] * x ** one["exponent"], color="0.7", linewidth=1)
        axis.loglog(x, y, "o", color="#0072B2", markersize=4)
        axis.set_title(f"{TITLES[one['varied']]}\nexponent {one['exponent']:.2f}", fontsize=9)
        axis.set_xticks(x, [f"{value:g}" for value in x], fontsize=7)
        axis.set_ylim(y.min() / 2, y.max() * 2)  # a cost that does not grow must look flat
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.minorticks_off()
        axis.tick_params(axis="y", labelsize=7)
        axis.grid(alpha=0.3)
    figure.supylabel("ms", fontsize=9)
    figure.savefig(path)


def report(series: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [
        [
            TITLES[one["varied"]],
            ", ".join(f"{name} = {value}" for name, value in one["fixed"].items()),
            f"{one['values'][0]} → {one['values'][-1]}",
            f"{1000 * one['seconds'][0]:,.1f} → {1000 * one['seconds'][-1]:,.1f}",
            f"{one['exponent']:.2f}",
            f"{one['last_exponent']:.2f}",
        ]
        for one in series
    ]
    return table(["cost of", "at", "from → to", "ms", "exponent", "of the last two points"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny version that only shows that it runs")
    parser.add_argument("--out", type=Path, help="write the result as JSON, and the plot beside it as PNG")
    given = parser.parse_args()
    series = sweep(given.small)
    save(given.out, {"benchmark": "scaling", "series": series})
    if given.out is not None:
        plot(given.out.with_suffix(".png"), series)
    print(report(series))


if __name__ == "__main__":
    main()
