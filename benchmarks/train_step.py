"""One training step of RELISH against the plain `nn.MultiheadAttention` form, and against what the machine can do.

    python benchmarks/train_step.py --out results/train_step.json

Both take the same batches of 16 rows of random hidden states in bfloat16, padded to T; "full" rows all have T tokens,
"ragged" ones have lengths as a random batch of STS-B has them. The plain form (rival.py) is trained in a plain loop:
every slot projected and attended to under a mask, torch's default AdamW. Ours is the step that `relish train` takes.

The floor is the time of the products of the input projection (real tokens), of the attention and of the feed-forward
layers, forward and backward, at the speed of one large product, and of the optimizer's 28 bytes per parameter at the
speed of a large copy. Projecting is counted even where ours avoids it.
"""

import statistics
import time
from collections.abc import Callable
from itertools import cycle

from measure import Rival, arguments, race, save, table

ROWS, LATENT, HEADS = 16, 256, 8
GOALS = {(576, 52): 3.5, (4096, 64): 2.0, (2048, 256): 3.5}
BATCHES = 4


def batches(D: int, T: int, ragged: bool) -> list:
    import numpy as np
    import torch

    draw, made = np.random.default_rng(0), []
    for _ in range(BATCHES):
        # Around 0.57 of the longest: what random batches of STS-B's prompts have.
        lengths = np.clip((T * draw.beta(4, 3, ROWS)).astype(int), 4, T) if ragged else np.full(ROWS, T)
        lengths[0] = T
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
    from relish.train.loop import take_step

    head = RelishHead(hidden_size=D, depth=depth).train()
    optimizer, source = AdamW(head, weight_decay=1.0), cycle(batches(D, T, ragged))
    loss_of = nn.HuberLoss()

    def run() -> float:
        return [take_step(head, optimizer, loss_of, TrainBatch(*next(source)), lr=3e-4) for _ in range(steps)][
            -1
        ].item()

    return run


def speeds() -> Callable[[], list[float]]:
    """FLOP/s of a large product, and bytes/s of a large copy."""
    import torch

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    source, target = torch.randn(1 << 26), torch.empty(1 << 26)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    return lambda: [2 * 2048**3 / best(lambda: a @ b), 2 * 4 * (1 << 26) / best(lambda: target.copy_(source))]


def floor(D: int, T: int, depth: int, ragged: bool, flops: float, bandwidth: float) -> float:
    tokens = sum(int(mask.sum()) for _, mask, _ in batches(D, T, ragged)) / BATCHES
    products = 4 * tokens * D * LATENT
    products += depth * (12 * tokens * HEADS * LATENT + 6 * ROWS * 12 * LATENT**2)
    parameters = D * LATENT + depth * (12 * LATENT**2 + 13 * LATENT) + 3 * LATENT
    return products / flops + 28 * parameters / bandwidth


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--depths", default="1,3,5")
    given = parser.parse_args()
    depths = [int(word) for word in given.depths.split(",")]
    shapes = [(D, T, False) for D in (576, 2048, 4096) for T in (32, 64, 256)]
    shapes += [(D, T, ragged) for D, T in GOALS for ragged in (False, True) if (D, T, ragged) not in shapes]
    if given.small:
        shapes, depths, given.rounds = [(16, 8, True)], [1, 2], 1
    flops, bandwidth = race([Rival("speeds", speeds)], rounds=given.rounds)["speeds"].value
    rows, results = [], []
    for D, T, ragged in shapes:
        steps = min(20, max(1, round(20 * 576 * 52 / (D * T))))
        rivals = [
            Rival(f"{name} {depth}", setup, (D, T, depth, ragged, steps))
            for depth in depths
            for name, setup in (("plain", plain), ("ours", ours))
        ]
        figures = race(rivals, rounds=given.rounds)
        for depth in depths:
            theirs, own = figures[f"plain {depth}"], figures[f"ours {depth}"]
            least = floor(D, T, depth, ragged, flops, bandwidth)
            ratio = statistics.median(a / b for a, b in zip(theirs.wall, own.wall, strict=True))
            results.append(
                {
                    "D": D,
                    "T": T,
                    "depth": depth,
                    "rows": "ragged" if ragged else "full",
                    "steps_per_round": steps,
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
                    depth,
                    f"{1e3 * theirs.median / steps:.1f}",
                    f"{1e3 * own.median / steps:.1f}",
                    f"{ratio:.2f}",
                    f"{results[-1]['ours_over_floor']:.2f}",
                )
            )
            print("  ".join(map(str, rows[-1])), flush=True)
    save(given.out, {"gflops": flops / 1e9, "copy_gb_per_s": bandwidth / 1e9, "batch": ROWS, "results": results})
    print(table(("D", "T", "rows", "L", "plain, ms", "ours, ms", "plain ÷ ours", "ours ÷ floor"), rows))


if __name__ == "__main__":
    main()
