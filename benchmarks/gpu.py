"""Training steps on an NVIDIA GPU: plain, compiled, ours, and ours recorded.

    python benchmarks/gpu.py --out results/gpu.json

All take the same batches of 16 rows of random hidden states in bfloat16 from pinned memory; rows have the lengths of
random batches of STS-B, scaled so that the longest has T, and each batch is padded to its own longest row.

- plain: rival.py in a plain loop, torch's default AdamW, the loss fetched after each step.
- plain, tuned: the same module without that fetch, with AdamW(fused=True).
- compiled: the latter under torch.compile(mode="reduce-overhead"), which records CUDA graphs itself; all rows are
  padded to T, since it compiles anew for each length, for a quarter of a minute. Of the first shape only; compiling is
  not timed.
- ours: `take_step`, as on the CPU.
- recorded: what `relish train` does on a GPU (train/recorded.py).

All are in one process and in turn, since two processes would share the GPU.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

from lengths import draw_lengths
from measure import arguments, save, table

ROWS = 16
BATCHES = 16
NAMES = ("plain", "plain, tuned", "compiled", "ours", "recorded")
SHAPES = ((576, 52, 3), (576, 52, 1), (576, 52, 5), (2048, 256, 3), (4096, 64, 3))


def batches(D: int, T: int, device: str) -> list:
    import numpy as np
    import torch

    from relish.train.data import TrainBatch

    draw = np.random.default_rng(0)
    chosen = draw.choice(draw_lengths(100_000), (BATCHES, ROWS))
    made = []
    for lengths in (chosen * T / chosen.max()).round().clip(1).astype(int):
        mask = torch.arange(lengths.max()) < torch.from_numpy(lengths)[:, None]
        hidden = (torch.randn(ROWS, lengths.max(), D) * mask.unsqueeze(-1)).bfloat16()
        batch = TrainBatch(hidden, mask, torch.randn(ROWS))
        made.append(TrainBatch(*(part.pin_memory() for part in batch)) if device == "cuda" else batch)
    return made


def plain(D: int, depth: int, source: list, device: str) -> Callable[[], object]:
    from rival import PlainRelish, train_plainly

    def placed() -> Iterator[Any]:
        for batch in cycle(source):
            yield tuple(part.to(device) for part in batch)

    return train_plainly(PlainRelish(D, depth).to(device), placed())


def tuned(D: int, depth: int, source: list, device: str, *, compiled: bool = False) -> Callable[[], object]:
    import torch
    from rival import PlainRelish
    from torch import nn
    from torch.nn.functional import pad

    longest = max(batch.mask.shape[1] for batch in source)
    head = PlainRelish(D, depth).to(device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-4, weight_decay=1.0, fused=True)
    loss_of = nn.MSELoss()

    def loss(hidden: torch.Tensor, mask: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return loss_of(head(hidden.float(), mask), target)

    if compiled:
        loss = torch.compile(loss, mode="reduce-overhead", dynamic=False)
    endless = cycle(source)

    def step() -> None:
        hidden, mask, target = (part.to(device, non_blocking=True) for part in next(endless))
        if compiled:
            more = longest - mask.shape[1]
            hidden, mask = pad(hidden, (0, 0, 0, more)), pad(mask, (0, more))
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        loss(hidden, mask, target).backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()

    return step


def ours(D: int, depth: int, source: list, device: str, *, recorded: bool) -> Callable[[], object]:
    from torch import nn

    from relish.train.adamw import AdamW
    from relish.train.head import RelishHead
    from relish.train.recorded import RecordedSteps
    from relish.train.step import take_step

    head = RelishHead(hidden_size=D, depth=depth).to(device).train()
    optimizer, loss_of, endless = AdamW(head, weight_decay=1.0), nn.MSELoss(), cycle(source)
    if recorded:
        step = RecordedSteps(head, optimizer, loss_of)
        return lambda: step(next(endless), lr=3e-4)
    return lambda: take_step(head, optimizer, loss_of, next(endless), lr=3e-4)


def main() -> None:
    parser = arguments(__doc__)
    given = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not given.small:
        parser.error("there is no CUDA device")
    shapes, steps = (SHAPES, 48) if not given.small else (((16, 8, 1),), 2)
    rows, results = [], []
    for D, T, depth in shapes:
        source = batches(D, T, device)
        ways = {"plain": plain(D, depth, source, device), "plain, tuned": tuned(D, depth, source, device)}
        if device == "cuda" and not results:
            ways["compiled"] = tuned(D, depth, source, device, compiled=True)
        ways["ours"] = ours(D, depth, source, device, recorded=False)
        if device == "cuda":
            ways["recorded"] = ours(D, depth, source, device, recorded=True)
        times = time_in_turn(ways, device, steps, given.rounds)
        medians = {name: 1e3 * statistics.median(values) / steps for name, values in times.items()}
        results.append({"D": D, "T": T, "depth": depth, "step_ms": medians, "rounds_s": times})
        rows.append((D, T, depth, *(f"{medians[way]:.2f}" if way in medians else "" for way in NAMES)))
        print("  ".join(map(str, rows[-1])), flush=True)
    where = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    save(given.out, {"batch": ROWS, "gpu": where, "steps_per_round": steps, "results": results})
    print(where, table(("D", "T", "L", *(f"{name}, ms" for name in NAMES)), rows), sep="\n")


def time_in_turn(ways: dict[str, Callable[[], object]], device: str, steps: int, rounds: int) -> dict[str, list[float]]:
    """Wall seconds of so many steps, once per round; a first round is not kept."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + rounds):
        for name, step in ways.items():
            wait()
            started = time.perf_counter()
            for _ in range(steps):
                step()
            wait()
            if number:
                times[name].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
