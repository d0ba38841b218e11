"""Where the time goes: the operations of an extraction and of a training step, beside what the machine can do at most.

    python benchmarks/profile_stages.py --out results/profile.json

torch's profiler over the forward passes of SmolLM2-135M-Instruct on rows of random words (extract), and over a few
steps of 16 full rows at L = 3 (train), with torch's own number of threads. Shares are of the main thread's time; "the
rest" is Python and dispatch. The floors are arithmetic (multiply-adds at the speed of a product of 2048³) and bytes
(what is written, or what the optimizer reads and writes, at the speed of a copy of 512 MB).
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from measure import arguments, save, table
from texts import sample, texts
from train_step import GOALS, batches, parameters_of

DEPTH, STEPS, TOP = 3, 10, 6


def speeds() -> tuple[float, float]:
    """FLOP/s of a large product, bytes/s of a large copy."""
    import torch

    a, b, source = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.randn(1 << 26)
    target = torch.empty_like(source)
    return 2 * 2048**3 / median_of(lambda: a @ b), 8 * len(source) / median_of(lambda: target.copy_(source))


def median_of(work: Callable[[], object], times: int = 5) -> float:
    """Median seconds, after one that is not counted."""
    work()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


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


def training(D: int, T: int, flops: float, bandwidth: float) -> dict[str, Any]:
    """A step of 16 full rows."""
    from torch import nn

    from relish.train.adamw import AdamW
    from relish.train.data import TrainBatch
    from relish.train.head import RelishHead
    from relish.train.step import take_step

    head = RelishHead(hidden_size=D, depth=DEPTH).train()
    optimizer, source, loss_of = AdamW(head, weight_decay=1.0), cycle(batches(D, T, False)), nn.HuberLoss()

    def step() -> None:
        take_step(head, optimizer, loss_of, TrainBatch(*next(source)), lr=3e-4).item()

    seconds = median_of(step, 5 * STEPS)
    tokens, latent, queries = 16 * T, 256, 8
    projected = 4 * tokens * D * latent + DEPTH * 12 * tokens * queries * latent
    folded = DEPTH * (8 * tokens * queries * D + 12 * 16 * queries * D * latent)
    return {
        "work": f"a step, D = {D}, T = {T}",
        "measured_s": seconds,
        "arithmetic_s": (min(projected, folded) + DEPTH * 6 * 16 * 12 * latent**2) / flops,
        "bytes_s": 28 * parameters_of(D, DEPTH) / bandwidth,
        "shares": shares(lambda: [step() for _ in range(STEPS)]),
    }


def extraction(model: Path, rows: list[dict[str, Any]], flops: float, bandwidth: float) -> dict[str, Any]:
    """Forward passes, all of one size."""
    import numpy as np
    from transformers import AutoModel, AutoTokenizer

    from relish.extract.backbone import Backbone
    from relish.extract.files import find_backbone

    backbone = Backbone(
        find_backbone(model, gguf_file=None, revision=None),
        layers=(),
        compute_dtype="float32",
        device="cpu",
        trust_remote_code=False,
    )
    backbone.load()
    tokens = [np.array(ids) for ids in AutoTokenizer.from_pretrained(model)(texts(rows))["input_ids"]]
    tokens = sorted(tokens, key=len)
    size = max(1, backbone.default_batch_tokens // len(tokens[-1]))
    groups = [tokens[begin : begin + size] for begin in range(0, len(tokens), size)]

    def work() -> None:
        for group in groups:
            backbone.hidden_states(group)

    layers = AutoModel.from_pretrained(model)
    weights = sum(p.numel() for p in layers.parameters()) - layers.get_input_embeddings().weight.numel()
    count = sum(map(len, tokens))
    return {
        "work": f"{count} tokens of {len(tokens)} rows",
        "measured_s": median_of(work),
        "arithmetic_s": 2 * weights * count / flops,
        "bytes_s": 2 * backbone.hidden_size * count / bandwidth,
        "shares": shares(work),
    }


def main() -> None:
    given = arguments(__doc__).parse_args()
    flops, bandwidth = speeds()
    with tempfile.TemporaryDirectory() as scratch:
        if given.small:
            from backbones import tiny_model

            model, shapes = tiny_model(Path(scratch) / "tiny"), [(16, 8)]
        else:
            from backbones import smollm2_folder

            model, shapes = smollm2_folder(), list(GOALS)
        found = [extraction(model, sample(None, 8 if given.small else 32), flops, bandwidth)]
    found += [training(D, T, flops, bandwidth) for D, T in shapes]
    print(f"{flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s\n")
    shown = [
        [
            one["work"],
            *(f"{1e3 * one[key]:.1f}" for key in ("measured_s", "arithmetic_s", "bytes_s")),
            f"{one['measured_s'] / (one['arithmetic_s'] + one['bytes_s']):.2f}",
            ", ".join(f"{name.removeprefix('aten::')} {share:.0%}" for name, share in one["shares"].items()),
        ]
        for one in found
    ]
    print(table(["", "ms", "arithmetic, ms", "bytes, ms", "ms ÷ both", "where it goes"], shown))
    save(given.out, {"gflops": flops / 1e9, "copy_gb_per_s": bandwidth / 1e9, "stages": found})


if __name__ == "__main__":
    main()
