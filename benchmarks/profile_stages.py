"""Where the time goes: the operations of an extraction and of a training step, beside what the machine can do at most.

    python benchmarks/profile_stages.py --out results/profile.json

torch's profiler over the forward passes of SmolLM2-135M-Instruct on rows of random words (extract), and over a few
steps of 16 full rows at L = 3 (train), with torch's own number of threads. Shares are of the main thread's time; "the
rest" is Python and dispatch. The floors are arithmetic (multiply-adds at the speed of a product of 2048³) and bytes
(what is written, or what the optimizer reads and writes, at the speed of a copy), as train_step.py has them.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import arguments, median_of, save, table
from passes import longest
from texts import Row, sample, settings, texts
from train_step import GOALS, floors, ours, speeds

DEPTH, STEPS, TOP = 3, 10, 6


def settled(D: int) -> list[float]:
    """The machine's speeds, the second time they are asked for."""
    measure = speeds(D, DEPTH)
    measure()
    return measure()


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Share of each operation in the wall time of some work, the largest first, and of what is no operation."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begun = time.perf_counter()
        work()
        wall = 1e6 * (time.perf_counter() - begun)
    found = sorted(profiler.key_averages(), key=lambda one: -one.self_cpu_time_total)
    total = sum(one.self_cpu_time_total for one in found)
    scale = max(wall, total)  # a profiled thread that only waits is none of the work
    top = {one.key: one.self_cpu_time_total / scale for one in found[:TOP]}
    return {
        **top,
        "other operations": total / scale - sum(top.values()),
        "the rest": 1 - total / scale,
    }


def training(D: int, T: int) -> dict[str, Any]:
    """A step of 16 full rows."""
    flops, bandwidth = settled(D)
    step = ours(D, T, DEPTH, False, 1)
    step()
    arithmetic, moved = floors(D, T, DEPTH, False, flops, bandwidth)
    return {
        "work": f"a step, D = {D}, T = {T}",
        "gflops": flops / 1e9,
        "copy_gb_per_s": bandwidth / 1e9,
        "measured_s": median_of(step, 5 * STEPS),
        "arithmetic_s": arithmetic,
        "bytes_s": moved,
        "shares": shares(lambda: [step() for _ in range(STEPS)]),
    }


def extraction(model: Path, rows: list[Row]) -> dict[str, Any]:
    """The forward passes of `relish extract`, nothing written."""
    from relish.extract.batches import Budget, run_in_batches
    from relish.extract.pipeline import open_backbone

    flops, bandwidth = settled(4096)
    backbone = open_backbone(settings(model, rows, max_length=longest(model)))
    backbone.load()
    tokens = sorted(backbone.encode(texts(rows), special_tokens=True), key=len, reverse=True)
    lengths = [len(row) for row in tokens]

    def work() -> None:
        for _ in run_in_batches(
            lengths,
            Budget(backbone.default_batch_tokens),
            lambda batch: backbone.hidden_states(tokens[batch.start : batch.stop]),
        ):
            pass

    work()
    weights = backbone.parameters - backbone.config.vocab_size * backbone.hidden_size
    return {
        "work": f"{sum(lengths)} tokens of {len(tokens)} rows",
        "gflops": flops / 1e9,
        "copy_gb_per_s": bandwidth / 1e9,
        "measured_s": median_of(work),
        "arithmetic_s": 2 * weights * sum(lengths) / flops,
        "bytes_s": 2 * backbone.hidden_size * sum(lengths) / bandwidth,
        "shares": shares(work),
    }


def main() -> None:
    given = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.small:
            from backbones import tiny_model

            model, shapes = tiny_model(Path(scratch) / "tiny"), [(16, 8)]
        else:
            from backbones import smollm2_folder

            model, shapes = smollm2_folder(), list(GOALS)
        found = [extraction(model, sample(None, 8 if given.small else 32))]
    found += [training(D, T) for D, T in shapes]
    shown = [
        [
            one["work"],
            f"{one['gflops']:.0f}",
            *(f"{1e3 * one[key]:.1f}" for key in ("measured_s", "arithmetic_s", "bytes_s")),
            f"{one['measured_s'] / (one['arithmetic_s'] + one['bytes_s']):.2f}",
            ", ".join(f"{name.removeprefix('aten::')} {share:.0%}" for name, share in one["shares"].items()),
        ]
        for one in found
    ]
    print(table(["", "GFLOP/s", "ms", "arithmetic, ms", "bytes, ms", "ms ÷ both", "where it goes"], shown))
    save(given.out, {"stages": found})


if __name__ == "__main__":
    main()
