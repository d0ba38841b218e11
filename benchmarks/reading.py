"""Which way of reading is faster at which shape: projecting each token once, or folding the projection too.

    python benchmarks/reading.py --out reading.json
    python benchmarks/reading.py --small

A whole training step of relish (train/reading.py's `Projected` against `Direct`) on 16 rows of T tokens, on one thread
and on two, and what `reader_for` picks there. `_ROW` and `_QUERIES` in train/reading.py are chosen by this.
"""

import statistics
from collections.abc import Callable

from measure import Rival, arguments, race, save, table
from train_step import ours

SECONDS = 0.4  # of a round, about


def forced(name: str, D: int, T: int, depth: int, steps: int) -> Callable[[], float]:
    """Steps in which that reader is taken."""
    from relish.train import reading, refine

    refine.reader_for = lambda hidden, mask, weight, bias, **_: getattr(reading, name)(hidden, mask, weight, bias)
    return ours(D, T, depth, False, steps)


def picked(D: int, T: int, depth: int, threads: int) -> str:
    """What the rule picks."""
    import torch

    from relish.train.reading import reader_for

    torch.set_num_threads(threads)
    hidden, mask = torch.zeros(16, T, D, dtype=torch.bfloat16), torch.ones(16, T, dtype=torch.bool)
    weight, bias = torch.zeros(256, D), torch.zeros(256)
    return type(reader_for(hidden, mask, weight, bias, heads=8, depth=depth, training=True)).__name__


def main() -> None:
    given = arguments(__doc__).parse_args()
    shapes = [(D, T, depth) for D in (576, 2048) for T in (64, 128, 256) for depth in (1, 3, 5)]
    if given.small:
        shapes, given.rounds = [(16, 8, 1)], 1
    rows, results = [], []
    for D, T, depth in shapes:
        steps = 1 if given.small else max(2, round(SECONDS * 4e8 / (16 * T * D * (depth + 2))))
        for threads in (1, 2):
            rivals = [
                Rival(name, forced, (name, D, T, depth, steps), threads=threads) for name in ("Projected", "Direct")
            ]
            figures = race(rivals, rounds=given.rounds)
            ratio = statistics.median(
                one / other for one, other in zip(figures["Direct"].wall, figures["Projected"].wall, strict=True)
            )
            results.append({"D": D, "T": T, "depth": depth, "threads": threads, "steps_per_round": steps})
            results[-1] |= {name: one.to_json() for name, one in figures.items()}
            results[-1] |= {"direct_over_projected": round(ratio, 3), "picked": picked(D, T, depth, threads)}
            milliseconds = [f"{1e3 * figures[name].median / steps:.1f}" for name in ("Projected", "Direct")]
            rows.append([D, T, depth, threads, *milliseconds, f"{ratio:.2f}", results[-1]["picked"]])
            print(*rows[-1], flush=True)
    print(table(["D", "T", "L", "threads", "Projected, ms", "Direct, ms", "Direct ÷ Projected", "picked"], rows))
    save(given.out, {"results": results})


if __name__ == "__main__":
    main()
