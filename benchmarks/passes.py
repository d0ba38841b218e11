"""The two sides of both benchmarks of extraction: relish, and the bare forward passes, the floor."""

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from backbones import smollm2_folder, tiny_model
from texts import Row, settings, texts

MAX_LENGTH = 256
WARM_UP = 4
SHAPES: tuple[int | None, ...] = (None, 256, 512, 1024, 2048, 4096)
"""Token slots of a batch, padding included; None: only rows of one length together, which leaves no padding."""


def models(home: Path, small: bool) -> Callable[[], tuple[Path, Path]]:
    """The backbone, and one that is as wide, or tiny, for the question of memory.

    For a process of its own: what this one holds in memory would count as its children's.
    """

    def work() -> tuple[Path, Path]:
        if small:
            tiny = tiny_model(home / "tiny")
            return tiny, tiny
        return smollm2_folder(), tiny_model(home / "wide", hidden_size=576, layers=1)

    return work


def relish(model: Path, rows: list[Row], layer: int | float, home: Path) -> Callable[[], dict[str, Any]]:
    from relish.extract import pipeline
    from relish.extract.sink import ShardSink
    from relish.extract.sources import load_texts

    waited = {"put": 0.0, "end": 0.0}

    class TimedSink(ShardSink):
        """Notes how long the forward passes wait for the writing, and how long the writing goes on after the last."""

        def put(self, *batch: Any) -> None:
            started = time.perf_counter()
            super().put(*batch)
            waited["put"] += time.perf_counter() - started

        def __exit__(self, *error: Any) -> None:
            started = time.perf_counter()
            super().__exit__(*error)
            waited["end"] += time.perf_counter() - started

    pipeline.ShardSink = TimedSink
    chosen = settings(model, rows, layers=(layer,), max_length=longest(model))
    backbone = pipeline.open_backbone(chosen)
    backbone.load()
    fresh = (home / f"{layer}-{len(rows)}-{number}" for number in count())

    def work(some: int = len(rows)) -> dict[str, Any]:
        waited.update(put=0.0, end=0.0)
        data = load_texts(settings(model, rows[:some]), None)
        done = pipeline.fill_cache(next(fresh), data, backbone, chosen)
        return {"tokens": done.tokens, "waited_s": waited["put"], "last_commit_s": waited["end"]}

    work(WARM_UP)
    return work


def extracted(model: Path, rows: list[Row], home: Path) -> Callable[[], str]:
    """A cache to train from."""
    work = relish(model, rows, 1.0, home)

    def once() -> str:
        work()
        return str(home / f"1.0-{len(rows)}-1")

    return once


def floor(model: Path, rows: list[Row], shape: int | None) -> Callable[[], dict[str, Any]]:
    forward, tokens = _bare(model, rows)
    batches = _batches(tokens, shape)
    forward(batches[-1])

    def work() -> dict[str, Any]:
        for batch in batches:
            forward(batch)
        return {"tokens": sum(map(len, tokens))}

    return work


def all_shapes(model: Path, rows: list[Row], rounds: int) -> Callable[[], dict[int | None, list[float]]]:
    """Seconds of each batch shape."""
    forward, tokens = _bare(model, rows)

    def work() -> dict[int | None, list[float]]:
        seconds: dict[int | None, list[float]] = {shape: [] for shape in SHAPES}
        for number in range(rounds + 1):
            for shape in SHAPES:
                started = time.perf_counter()
                for batch in _batches(tokens, shape):
                    forward(batch)
                if number:  # the first is the warm-up
                    seconds[shape].append(time.perf_counter() - started)
        return seconds

    return work


def longest(model: Path) -> int:
    """Most tokens that a row may have."""
    from transformers import AutoConfig

    return min(MAX_LENGTH, AutoConfig.from_pretrained(model).max_position_embeddings)


def _bare(model: Path, rows: list[Row]) -> tuple[Callable[[list[np.ndarray]], None], list[np.ndarray]]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from relish.extract.heap import keep_freed_memory

    keep_freed_memory()
    backbone, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    tokens = [np.array(tokens) for tokens in tokenizer(texts(rows))["input_ids"]]

    def forward(batch: list[np.ndarray]) -> None:
        ids = np.zeros((len(batch), max(map(len, batch))), dtype=np.int64)
        for number, row in enumerate(batch):
            ids[number, : len(row)] = row
        with torch.inference_mode():
            backbone(input_ids=torch.from_numpy(ids), use_cache=False)

    return forward, sorted(tokens, key=len, reverse=True)


def _batches(tokens: list[np.ndarray], shape: int | None) -> list[list[np.ndarray]]:
    """Batches of rows that are sorted by length."""
    batches: list[list[np.ndarray]] = []
    for row in tokens:
        last = batches[-1] if batches else []
        fits = last and (len(last[0]) == len(row) if shape is None else (len(last) + 1) * len(last[0]) <= shape)
        if fits:
            last.append(row)
        else:
            batches.append([row])
    return batches


def named(shape: int | None) -> str:
    return "rows of one length" if shape is None else f"{shape} token slots"
