"""How fast `relish extract` is beside other ways to get hidden states, and beside the bare forward pass.

    python benchmarks/extract.py DATA/stsb/train.csv --out extract.json
    python benchmarks/extract.py DATA/stsb/train.csv --sample 192 --floor --out extract_floor.json
    python benchmarks/extract.py --small

SmolLM2-135M-Instruct in float32 on the CPU, last layer, rows of STS-B's training split with the preset's prompt. Each
rival has a process of its own, loads the model once, runs a few rows, and then takes its turn, round after round; what
counts is real tokens per second of wall time.

- relish: `relish.extract_cache` from the rows to the committed cache, but for the loading of the model.
- floor: the forward passes alone, nothing kept; of several batch shapes the best. It is given what relish has to work
  for: tokens at hand, no mask (right padding is behind all that a causal LM looks at), nothing written; and relish's
  setting of malloc.
- padded to 256: as in the authors' module, `padding="max_length"` and `output_hidden_states=True`, batches of 32 in the
  order of the file; without an LM head.
- padded to the longest: the same, `padding="longest"`.
- sentence-transformers: `encode(output_value="token_embeddings")`.
- pipeline: transformers' feature-extraction pipeline as it comes.

Then: layers in the middle, how long the forward passes waited for the writing, and peak memory over the number of rows
(a random backbone of SmolLM2's width and one block). The default sample keeps all of it under 12 minutes on two cores.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from measure import Figures, Rival, arguments, race, save, table
from passes import MAX_LENGTH, SHAPES, WARM_UP, all_shapes, floor, longest, models, named, relish
from texts import Row, sample, texts

BATCH = 32
MEMORY_ROWS = (128, 512, 2048)


def padded(model: Path, rows: list[Row], padding: str) -> Callable[[], dict[str, Any]]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, backbone = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    everything, length = texts(rows), longest(model)

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
    backbone.max_seq_length = longest(model)
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


def closest(model: Path, rows: list[Row], shape: int | None, home: Path) -> list[Rival]:
    return [Rival("relish", relish, (model, rows, 1.0, home)), Rival("floor", floor, (model, rows, shape))]


def others(model: Path, rows: list[Row], middle: tuple[int, ...], home: Path) -> Iterator[Rival]:
    for layer in middle:
        yield Rival(f"relish, layer {layer}", relish, (model, rows, layer, home))
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
    parser.add_argument("--floor", action="store_true", help="only relish and the floor, on a larger sample")
    given = parser.parse_args()
    if given.data is None and not given.small:
        parser.error("give STS-B's train.csv, or --small")
    rows = sample(None, 16) if given.small else sample(given.data, given.sample)
    rounds = 1 if given.small else given.rounds
    middle, depth = ((1,), 2) if given.small else ((15, 20), 30)
    sizes = (16, 64) if given.small else MEMORY_ROWS
    if given.floor:
        middle, sizes = (), ()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        (built,) = race([Rival("models", models, (home, given.small))], rounds=1, warm_up=0).values()
        model, wide = built.value
        (shapes,) = race([Rival("shapes", all_shapes, (model, rows[::2], 2))], rounds=1, warm_up=0).values()
        shape = min(SHAPES, key=lambda one: min(shapes.value[one]))
        rivals = closest(model, rows, shape, home)
        if not given.floor:
            rivals += others(model, rows, middle, home)
        figures = race(rivals, rounds=rounds, warm_up=0)
        peaks = memory(wide, rows, home, sizes) if sizes else {}
    ours = figures["relish"]
    tokens = {one.value["tokens"] for one in figures.values()}
    assert len(tokens) == 1, f"the rivals read different texts: {tokens} tokens"
    print(f"{len(rows)} rows, {tokens.pop():,} tokens, {rounds} rounds; the floor's batches: {named(shape)}\n")
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
    if peaks:
        print(f"peak memory: {', '.join(f'{size} rows {peak:,.0f} MB' for size, peak in peaks.items())}")
    save(
        given.out,
        {
            "rows": len(rows),
            "rounds": rounds,
            "small": given.small,
            "floor_shape": named(shape),
            "floor_shapes_s": {named(one): seconds for one, seconds in shapes.value.items()},
            "rivals": {
                name: {"tokens_per_s": rate(one), "relish_times": ratio(ours, one), **one.to_json()}
                for name, one in figures.items()
            },
            "peak_mb_by_rows": peaks,
        },
    )


if __name__ == "__main__":
    main()
