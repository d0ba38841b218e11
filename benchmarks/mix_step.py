"""One training step of RELISH on a learned mix of three layers, against ELMo's mix before the plain form.

    python benchmarks/mix_step.py --out results/mix_step.json

Batches are those of train_step.py, of three layers: 16 rows of random hidden states in bfloat16, L = 3, on one thread,
as each process of a grid has. The plain form standardises and sums the layers in float32, padding included, and then is
rival.py's. Beside both, our step on a single layer.
"""

import statistics
from collections.abc import Callable
from itertools import cycle

from measure import Rival, arguments, race, save, table
from train_step import batches

LAYERS, DEPTH = 3, 3
ROUND_SECONDS = 1.0  # of the plain form, about


def stacked(D: int, T: int, ragged: bool) -> list:
    """Batches of (B, K, T, D), mask and target."""
    return [(hidden.unsqueeze(1).repeat(1, LAYERS, 1, 1), *rest) for hidden, *rest in batches(D, T, ragged)]


def plain(D: int, T: int, ragged: bool, steps: int) -> Callable[[], float]:
    import torch
    from rival import PlainRelish, train_plainly
    from torch import Tensor, nn

    class PlainMix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(LAYERS, 1, D))
            self.register_buffer("scale", torch.ones(LAYERS, 1, D))
            self.weights = nn.Parameter(torch.zeros(LAYERS))
            self.head = PlainRelish(D, DEPTH)

        def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
            shares = torch.softmax(self.weights, dim=0).view(LAYERS, 1, 1)
            return self.head((shares * (hidden - self.mean) / self.scale).sum(dim=1), mask)

    step = train_plainly(PlainMix(), cycle(stacked(D, T, ragged)))
    return lambda: [step() for _ in range(steps)][-1]


def ours(D: int, T: int, ragged: bool, steps: int, *, mixed: bool = True) -> Callable[[], float]:
    from torch import nn

    from relish.train.adamw import AdamW
    from relish.train.data import TrainBatch
    from relish.train.head import RelishHead
    from relish.train.mix import MixedHead
    from relish.train.step import take_step

    head = RelishHead(hidden_size=D, depth=DEPTH)
    head = (MixedHead(head, LAYERS) if mixed else head).train()
    optimizer, source = AdamW(head, weight_decay=1.0), cycle((stacked if mixed else batches)(D, T, ragged))
    loss_of = nn.MSELoss()

    def run() -> float:
        losses = [take_step(head, optimizer, loss_of, TrainBatch(*next(source)), lr=3e-4) for _ in range(steps)]
        return losses[-1].item()

    return run


def single(D: int, T: int, ragged: bool, steps: int) -> Callable[[], float]:
    return ours(D, T, ragged, steps, mixed=False)


def main() -> None:
    given = arguments(__doc__).parse_args()
    shapes = [(D, T, ragged) for D, T in ((576, 52), (576, 256), (2048, 256)) for ragged in (False, True)]
    if given.small:
        shapes, given.rounds = [(16, 8, True)], 1
    rows, results = [], []
    for D, T, ragged in shapes:
        steps = 1 if given.small else max(2, round(ROUND_SECONDS / (0.03 + 1.2e-6 * D * T)))
        rivals = {"plain": plain, "ours": ours, "single": single}
        figures = race(
            [Rival(name, setup, (D, T, ragged, steps), threads=1) for name, setup in rivals.items()],
            rounds=given.rounds,
        )
        ratio = statistics.median(a / b for a, b in zip(figures["plain"].wall, figures["ours"].wall, strict=True))
        shape = {"D": D, "T": T, "rows": "ragged" if ragged else "full"}
        results.append({**shape, "steps_per_round": steps, "ratio": round(ratio, 3)})
        results[-1] |= {name: one.to_json() for name, one in figures.items()}
        times = (f"{1e3 * one.median / steps:.1f}" for one in figures.values())
        rows.append((*shape.values(), *times, f"{ratio:.2f}"))
        print("  ".join(map(str, rows[-1])), flush=True)
    save(given.out, {"layers": LAYERS, "depth": DEPTH, "results": results})
    print(table(("D", "T", "rows", "plain, ms", "ours, ms", "ours on one layer, ms", "plain ÷ ours"), rows))


if __name__ == "__main__":
    main()
