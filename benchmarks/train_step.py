"""One training step of RELISH against the plain `nn.MultiheadAttention` form, and against what the machine can do.

    python benchmarks/train_step.py --out results/train_step.json

Both take the same batches of 16 rows of random hidden states in bfloat16, padded to T; "full" rows all have T tokens,
"ragged" ones have the lengths of a random batch of STS-B, scaled so that
the longest has T. The plain form (rival.py) is trained in a plain loop:
every slot projected and attended to under a mask, torch's default AdamW. Ours is the step that `relish train` takes.

The floor is the time of the products of the attention and of the feed-forward layers, forward and backward, and of the
cheaper way of reading (projecting each real token, or folding the projection into the queries), at the speed of one
large product, and of the optimizer's 28 bytes per parameter at the speed of a copy of as many bytes. Both speeds are
measured in turn with the rivals. Torch's own number of threads; the shapes that have a goal are run on one thread too.
"""

import statistics
from collections.abc import Callable
from itertools import cycle

from lengths import draw_lengths
from measure import Rival, arguments, median_of, race, save, table

ROWS, LATENT, HEADS = 16, 256, 8
GOALS = {(576, 52): 3.5, (4096, 64): 2.0, (2048, 256): 3.5}
BATCHES = 4
ROUND_SECONDS = 0.6  # of the plain form at three steps, about


def batches(D: int, T: int, ragged: bool) -> list:
    import numpy as np
    import torch

    draw, made = np.random.default_rng(0), []
    for _ in range(BATCHES):
        chosen = draw.choice(draw_lengths(100_000), ROWS)
        lengths = (chosen * T / chosen.max()).round().astype(int) if ragged else np.full(ROWS, T)
        mask = torch.arange(T) < torch.from_numpy(lengths)[:, None]
        made.append(((torch.randn(ROWS, T, D) * mask.unsqueeze(-1)).bfloat16(), mask, torch.randn(ROWS)))
    return made


def plain(D: int, T: int, depth: int, ragged: bool, steps: int) -> Callable[[], float]:
    from rival import PlainRelish, train_plainly

    step = train_plainly(PlainRelish(D, depth), cycle(batches(D, T, ragged)))
    return lambda: [step() for _ in range(steps)][-1]


def ours(D: int, T: int, depth: int, ragged: bool, steps: int) -> Callable[[], float]:
    from torch import nn

    from relish.train.adamw import AdamW
    from relish.train.data import TrainBatch
    from relish.train.head import RelishHead
    from relish.train.step import take_step

    head = RelishHead(hidden_size=D, depth=depth).train()
    optimizer, source = AdamW(head, weight_decay=1.0), cycle(batches(D, T, ragged))
    loss_of = nn.MSELoss()

    def run() -> float:
        return [take_step(head, optimizer, loss_of, TrainBatch(*next(source)), lr=3e-4) for _ in range(steps)][
            -1
        ].item()

    return run


def speeds(D: int, depth: int) -> Callable[[], list[float]]:
    """FLOP/s of a large product, and bytes/s of a copy that moves as many bytes as the optimizer does."""
    import torch

    size = 28 * parameters_of(D, depth) // 8
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    source, target = torch.randn(size), torch.empty(size)

    return lambda: [2 * 2048**3 / median_of(lambda: a @ b), 8 * size / median_of(lambda: target.copy_(source))]


def floors(D: int, T: int, depth: int, ragged: bool, flops: float, bandwidth: float) -> tuple[float, float]:
    """Seconds that the products of a step take at least, and the optimizer's bytes."""
    tokens = sum(int(mask.sum()) for _, mask, _ in batches(D, T, ragged)) / BATCHES
    projected = 4 * tokens * D * LATENT + depth * 12 * tokens * HEADS * LATENT
    folded = depth * (8 * tokens * HEADS * D + 12 * ROWS * HEADS * D * LATENT)
    products = min(projected, folded) + depth * 6 * ROWS * 12 * LATENT**2
    return products / flops, 28 * parameters_of(D, depth) / bandwidth


def parameters_of(D: int, depth: int) -> int:
    return D * LATENT + depth * (12 * LATENT**2 + 13 * LATENT) + 3 * LATENT


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--depths", default="1,3,5")
    given = parser.parse_args()
    depths = [int(word) for word in given.depths.split(",")]
    shapes = [(D, T, False, None) for D in (576, 2048, 4096) for T in (32, 64, 256)]
    goals = [(D, T, ragged, threads) for D, T in GOALS for ragged in (False, True) for threads in (None, 1)]
    shapes += [shape for shape in goals if shape not in shapes]
    if given.small:
        shapes, depths, given.rounds = [(16, 8, True, 1)], [1, 2], 1
    rows, results = [], []
    for D, T, ragged, threads in shapes:
        steps = 1 if given.small else max(3, round(ROUND_SECONDS / (0.03 + 2.4e-7 * D * T)))
        rivals = [
            Rival(f"{name} {depth}", setup, given_to, threads=threads)
            for depth in depths
            for name, setup, given_to in (
                ("plain", plain, (D, T, depth, ragged, steps)),
                ("ours", ours, (D, T, depth, ragged, steps)),
                ("speeds", speeds, (D, depth)),
            )
        ]
        figures = race(rivals, rounds=given.rounds)
        for depth in depths:
            theirs, own = figures[f"plain {depth}"], figures[f"ours {depth}"]
            flops, bandwidth = map(statistics.median, zip(*figures[f"speeds {depth}"].values, strict=True))
            least = sum(floors(D, T, depth, ragged, flops, bandwidth))
            ratio = statistics.median(a / b for a, b in zip(theirs.wall, own.wall, strict=True))
            results.append(
                {
                    "D": D,
                    "T": T,
                    "depth": depth,
                    "rows": "ragged" if ragged else "full",
                    "threads": threads,
                    "steps_per_round": steps,
                    "gflops": flops / 1e9,
                    "copy_gb_per_s": bandwidth / 1e9,
                    "plain": theirs.to_json(),
                    "ours": own.to_json(),
                    "ratio": round(ratio, 3),
                    "floor_s": least,
                    "ours_over_floor": round(own.median / steps / least, 3),
                    "goal": GOALS.get((D, T)) if depth == 3 else None,
                }
            )
            rows.append(
                (
                    D,
                    T,
                    "ragged" if ragged else "full",
                    threads or "all",
                    depth,
                    f"{1e3 * theirs.median / steps:.1f}",
                    f"{1e3 * own.median / steps:.1f}",
                    f"{ratio:.2f}",
                    f"{results[-1]['ours_over_floor']:.2f}",
                )
            )
            print("  ".join(map(str, rows[-1])), flush=True)
    save(given.out, {"batch": ROWS, "results": results})
    print(table(("D", "T", "rows", "threads", "L", "plain, ms", "ours, ms", "plain ÷ ours", "ours ÷ floor"), rows))


if __name__ == "__main__":
    main()
