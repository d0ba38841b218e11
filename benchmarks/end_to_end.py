"""From which grid on the cache pays, in time: against running the LLM again in every epoch of every cell.

    python benchmarks/end_to_end.py DATA/stsb/train.csv --out end_to_end.json
    python benchmarks/end_to_end.py --small

Measured on a sample of STS-B's training rows with SmolLM2-135M-Instruct (float32, CPU, last layer), each rival in a
process of its own and in turn:

- x: seconds a row for extraction, from the rows to the committed cache;
- f: seconds a row for the forward pass alone at its best batch shape, the least that recomputing costs;
- m: seconds a row for the statistics that all cells share; relish takes them from 65,536 tokens at most, and here every
  row is charged for them;
- t: seconds a row and epoch for training a head of three steps by `relish train`'s own loop; reading the cache and
  validation on a tenth of the rows are part of it.

For R rows, N cells and E epochs the cache takes R (x + m + N E t), recomputing R N E (f + t). They meet at
N = (x + m) / (E f). Left out on both sides: loading the LLM, saving cells, the principal axes that a process of heads
begins with, and the LLM on validation rows. Left out to the rival's favour: the pass that its statistics would take.
"""

import statistics
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

from clock import Clock
from measure import Figures, Rival, arguments, race, save, table
from passes import SHAPES, all_shapes, extracted, floor, models, named, relish
from texts import sample

ROWS = 5749
EPOCHS = 5
CELLS = (1, 3, 15)


def training(cache: Path, home: Path) -> Callable[[], float]:
    """Seconds a row and epoch."""
    from relish.cache.reader import open_cache
    from relish.train.grid import train_heads
    from relish.train.settings import TrainSettings

    fresh = (home / f"runs-{number}" for number in count())
    settings = TrainSettings(epochs=2 * EPOCHS, patience=2 * EPOCHS, device="cpu")
    clock = Clock()

    def work() -> float:
        (metrics,) = train_heads(cache, next(fresh), settings, listener=clock).cells.values()
        trained = open_cache(cache).manifest.splits["train"].rows - metrics["val_rows"]
        return statistics.median(clock.epochs) / trained

    work()
    clock.epochs.clear()
    return work


def reading(cache: Path) -> Callable[[], None]:
    """The rows of the sample that the inputs' moments are taken from, checksums included."""
    import numpy as np

    from relish.cache.reader import open_cache
    from relish.train.data import Rows, feature_moments
    from relish.train.shared import shared_tokens

    def work() -> None:
        split = open_cache(cache).split("train")
        feature_moments(Rows(split, np.arange(len(split))), None, skip=shared_tokens(split))

    work()
    return work


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("data", nargs="?", type=Path, help="STS-B's train.csv; not needed with --small")
    parser.add_argument("--sample", type=int, default=160, help="rows of the sample")
    given = parser.parse_args()
    if given.data is None and not given.small:
        parser.error("give STS-B's train.csv, or --small")
    rows = sample(None, 48) if given.small else sample(given.data, given.sample)
    rounds = 2 if given.small else given.rounds
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        (built,) = race([Rival("models", models, (home, given.small))], rounds=1, warm_up=0).values()
        model, _ = built.value
        some = rows[::2]
        (shapes,) = race([Rival("shapes", all_shapes, (model, some, 2))], rounds=1, warm_up=0).values()
        shape = min(SHAPES, key=lambda one: min(shapes.value[one]))
        (there,) = race([Rival("cache", extracted, (model, rows, home / "one"))], rounds=1, warm_up=0).values()
        cache = Path(there.value)
        figures = race(
            [
                Rival("extraction", relish, (model, rows, 1.0, home / "all")),
                Rival("forward pass", floor, (model, rows, shape)),
                Rival("reading", reading, (cache,)),
                Rival("training", training, (cache, home)),
            ],
            rounds=rounds,
            warm_up=0,
        )
    cost = costs(figures, len(rows))
    x, f, m, t = (cost[name] for name in "xfmt")
    print(f"{len(rows)} rows, {figures['extraction'].value['tokens']:,} tokens, {rounds} rounds, medians\n")
    print(
        table(
            ["", "ms a row"],
            [
                ["x: extraction into the cache", f"{x * 1e3:.2f}"],
                [f"f: bare forward pass ({named(shape)})", f"{f * 1e3:.2f}"],
                ["m: reading the cache once", f"{m * 1e3:.3f}"],
                ["t: training a head, an epoch", f"{t * 1e3:.3f}"],
            ],
        )
    )
    grids = [grid(cost, cells, EPOCHS) for cells in CELLS]
    shown = [
        [one["cells"], _clock(one["cache_s"]), _clock(one["recompute_s"]), f"{one['factor']:.1f}"] for one in grids
    ]
    print(f"\n{ROWS:,} rows, {EPOCHS} epochs:\n")
    print(table(["cells", "with the cache", "recomputing", "factor"], shown))
    even = {epochs: (x + m) / (epochs * f) for epochs in (1, EPOCHS)}
    written = paired(figures["extraction"], figures["forward pass"]) - 1
    print(f"\nthe cache pays from {even[EPOCHS]:.2f} cells on: {EPOCHS} epochs are {EPOCHS} passes of the LLM.")
    print(
        f"With one epoch it would be {even[1]:.2f} cells: beside a forward pass, writing the cache takes {written:.1%}"
    )
    print(f"and reading it once {m / f:.1%}.")
    save(
        given.out,
        {
            "rows": len(rows),
            "rounds": rounds,
            "small": given.small,
            "seconds_a_row": cost,
            "stsb": {"rows": ROWS, "epochs": EPOCHS, "grids": grids},
            "writing_over_forward": written,
            "break_even_cells": {str(epochs): cells for epochs, cells in even.items()},
            "figures": {name: one.to_json() for name, one in figures.items()},
        },
    )


def costs(figures: dict[str, Figures], rows: int) -> dict[str, float]:
    """x, f, m and t."""
    return {
        "x": figures["extraction"].median / rows,
        "f": figures["forward pass"].median / rows,
        "m": figures["reading"].median / rows,
        "t": figures["training"].value,
    }


def paired(one: Figures, other: Figures) -> float:
    """How many times the other's time the one takes: the median over rounds, whose two stand side by side."""
    return statistics.median(mine / its for mine, its in zip(one.wall, other.wall, strict=True))


def grid(cost: dict[str, float], cells: int, epochs: int) -> dict[str, float]:
    """Seconds of a grid, both ways."""
    cache = ROWS * (cost["x"] + cost["m"] + cells * epochs * cost["t"])
    recompute = ROWS * cells * epochs * (cost["f"] + cost["t"])
    return {"cells": cells, "cache_s": cache, "recompute_s": recompute, "factor": recompute / cache}


def _clock(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    main()
