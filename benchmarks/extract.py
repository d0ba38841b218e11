"""How fast `relish extract` is beside other ways to get hidden states, and beside the bare forward pass.

    python benchmarks/extract.py ../shared/data/stsb/train.csv --out extract.json
    python benchmarks/extract.py --small

SmolLM2-135M-Instruct in float32 on the CPU, last layer, rows of STS-B's training split with the preset's prompt. Each
rival has a process of its own, loads the model once, runs a few rows, and then takes its turn, round after round; what
counts is real tokens per second of wall time.

- relish: `relish.extract_cache` from the rows to the committed cache, but for the loading of the model.
- floor: the forward passes alone, nothing kept; of several batch shapes the best. It is given what relish has to work
  for: tokens at hand, no mask (right padding is behind all that a causal LM looks at), nothing written.
- padded to 256: as in the authors' module, `padding="max_length"` and `output_hidden_states=True`, batches of 32 in the
  order of the file. The LM head, which the module runs too, is left out.
- padded to the longest: the same, `padding="longest"`.
- sentence-transformers: `encode(output_value="token_embeddings")`.
- pipeline: transformers' feature-extraction pipeline as it comes.

Then: layers in the middle, how long the forward passes waited for the writing, and peak memory over the number of rows
(a random backbone of SmolLM2's width and one block). The default sample keeps all of it under 12 minutes on two cores.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from backbones import smollm2_folder, tiny_model
from measure import Figures, Rival, arguments, race, save, table
from texts import Row, sample, settings, texts

MAX_LENGTH = 256
BATCH = 32
WARM_UP = 4
SHAPES: tuple[int | None, ...] = (None, 512, 1024, 2048, 4096, 8192)
"""Token slots of a batch, padding included; None: only rows of one length together, which leaves no padding."""
MEMORY_ROWS = (128, 512, 2048)


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
    chosen = settings(model, rows, layers=(layer,), max_length=_max_length(model))
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


def padded(model: Path, rows: list[Row], padding: str) -> Callable[[], dict[str, Any]]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, backbone = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    everything, length = texts(rows), _max_length(model)

    def work(some: int = len(rows)) -> dict[str, Any]:
        tokens = 0
        for begin in range(0, some, BATCH):
            batch = tokenizer(
                everything[begin : min(begin + BATCH, some)],
                padding=padding,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            with torch.inference_mode():
                states = backbone(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
                ).hidden_states[-1]
            assert states.shape[:2] == batch["attention_mask"].shape
            tokens += int(batch["attention_mask"].sum())
        return {"tokens": tokens}

    work(WARM_UP)
    return work


def sentence_transformers(model: Path, rows: list[Row]) -> Callable[[], dict[str, Any]]:
    from sentence_transformers import SentenceTransformer

    backbone = SentenceTransformer(str(model), device="cpu")
    backbone.max_seq_length = _max_length(model)
    everything = texts(rows)

    def work(some: int = len(rows)) -> dict[str, Any]:
        states = backbone.encode(everything[:some], output_value="token_embeddings", show_progress_bar=False)
        return {"tokens": sum(map(len, states))}

    work(WARM_UP)
    return work


def feature_pipeline(model: Path, rows: list[Row]) -> Callable[[], dict[str, Any]]:
    from transformers import pipeline

    extractor = pipeline("feature-extraction", model=str(model), device="cpu")
    everything = texts(rows)

    def work(some: int = len(rows)) -> dict[str, Any]:
        return {"tokens": sum(len(states[0]) for states in extractor(everything[:some]))}

    work(WARM_UP)
    return work


def _max_length(model: Path) -> int:
    from transformers import AutoConfig

    return min(MAX_LENGTH, AutoConfig.from_pretrained(model).max_position_embeddings)


def _bare(model: Path, rows: list[Row]) -> tuple[Callable[[list[np.ndarray]], None], list[np.ndarray]]:
    import torch
    from transformers import AutoModel, AutoTokenizer

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


def rate(figures: Figures) -> float:
    """Real tokens per second."""
    return figures.value["tokens"] / figures.median


def ratio(one: Figures, other: Figures) -> float:
    """How many times the speed of the other the one has: the median over rounds, whose two stand side by side."""
    return statistics.median(
        (one.value["tokens"] / mine) / (other.value["tokens"] / its)
        for mine, its in zip(one.wall, other.wall, strict=True)
    )


def memory(model: Path, rows: list[Row], home: Path, sizes: tuple[int, ...]) -> dict[int, float]:
    """Peak memory of relish in MB over the number of rows."""
    many = [rows[number % len(rows)] for number in range(max(sizes))]
    rivals = [Rival(str(size), relish, (model, many[:size], 1.0, home / "memory")) for size in sizes]
    return {int(name): figures.peak_mb for name, figures in race(rivals, rounds=1, warm_up=0).items()}


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


def rivals_of(model: Path, rows: list[Row], middle: tuple[int, ...], shape: int | None, home: Path) -> Iterator[Rival]:
    yield Rival("relish", relish, (model, rows, 1.0, home))
    for layer in middle:
        yield Rival(f"relish, layer {layer}", relish, (model, rows, layer, home))
    yield Rival("floor", floor, (model, rows, shape))
    yield Rival(f"padded to {MAX_LENGTH}", padded, (model, rows, "max_length"))
    yield Rival("padded to the longest", padded, (model, rows, "longest"))
    if find_spec("sentence_transformers") is not None:
        yield Rival("sentence-transformers", sentence_transformers, (model, rows))
    else:
        print("sentence-transformers is not installed and left out; the extra bench has it")
    yield Rival("pipeline", feature_pipeline, (model, rows))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("data", nargs="?", type=Path, help="STS-B's train.csv; not needed with --small")
    parser.add_argument("--sample", type=int, default=96, help="rows of the sample")
    given = parser.parse_args()
    if given.data is None and not given.small:
        parser.error("give STS-B's train.csv, or --small")
    rows = sample(None, 16) if given.small else sample(given.data, given.sample)
    rounds = 2 if given.small else given.rounds
    middle, depth = ((1,), 2) if given.small else ((15, 20), 30)
    sizes = (16, 64) if given.small else MEMORY_ROWS
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        (built,) = race([Rival("models", models, (home, given.small))], rounds=1, warm_up=0).values()
        model, wide = built.value
        (shapes,) = race(
            [Rival("shapes", all_shapes, (model, rows[: len(rows) // 2], 2))], rounds=1, warm_up=0
        ).values()
        shape = min(SHAPES, key=lambda one: min(shapes.value[one]))
        figures = race(list(rivals_of(model, rows, middle, shape, home)), rounds=rounds, warm_up=0)
        peaks = memory(wide, rows, home, sizes)
    ours = figures["relish"]
    tokens = {one.value["tokens"] for one in figures.values()}
    assert len(tokens) == 1, f"the rivals read different texts: {tokens} tokens"
    print(f"{len(rows)} rows, {tokens.pop():,} tokens, {rounds} rounds; the floor's batches: {_named(shape)}\n")
    shown = [
        [name, f"{rate(one):,.0f}", f"{ratio(ours, one):.2f}", f"{one.median:.2f}", f"{one.peak_mb:,.0f}"]
        for name, one in figures.items()
    ]
    print(table(["", "tokens/s", "relish is × as fast", "s", "peak MB"], shown))
    print(f"\nthe forward passes waited {ours.value['waited_s'] * 1e3:.0f} ms for the writing;", end=" ")
    print(f"after the last one it took {ours.value['last_commit_s'] * 1e3:.0f} ms")
    for layer in middle:
        share = 1 / ratio(figures[f"relish, layer {layer}"], ours)
        print(
            f"layer {layer} takes {share:.1%} of the last layer's time; its share of the depth is {layer / depth:.1%}"
        )
    print(f"peak memory: {', '.join(f'{size} rows {peak:,.0f} MB' for size, peak in peaks.items())}")
    save(
        given.out,
        {
            "rows": len(rows),
            "rounds": rounds,
            "small": given.small,
            "floor_shape": _named(shape),
            "floor_shapes_s": {_named(one): seconds for one, seconds in shapes.value.items()},
            "rivals": {
                name: {"tokens_per_s": rate(one), "relish_times": ratio(ours, one), **one.to_json()}
                for name, one in figures.items()
            },
            "peak_mb_by_rows": peaks,
        },
    )


def _named(shape: int | None) -> str:
    return "rows of one length" if shape is None else f"{shape} token slots"


if __name__ == "__main__":
    main()
