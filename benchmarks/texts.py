"""The texts that benchmarks run: rows of STS-B through the preset's prompt, or made of a few words."""

from pathlib import Path
from random import Random

from backbones import WORDS

from relish.extract.settings import ExtractSettings
from relish.extract.sources import load_texts

Row = dict[str, object]


def sample(table: Path | None, count: int, seed: str | int = 0) -> list[Row]:
    """`count` rows of STS-B's training table, evenly spaced over it; without, rows of words drawn by the seed."""
    if table is None:
        draw = Random(seed)

        def sentence() -> str:
            return " ".join(draw.choice(WORDS) for _ in range(draw.randint(4, 12)))

        return [{"sentence1": sentence(), "sentence2": sentence(), "score": draw.uniform(0, 5)} for _ in range(count)]
    from relish.extract.tables import read_rows

    rows = list(read_rows(table))
    return [rows[number * len(rows) // count] for number in range(count)]


def settings(model: Path, rows: list[Row], **more: object) -> ExtractSettings:
    """An extraction of these rows as STS-B, in float32 on the CPU."""
    return ExtractSettings(model=model, task="stsb", data={"train": rows}, device="cpu", **more)


def texts(rows: list[Row]) -> list[str]:
    """What the backbone is to read, as `relish extract` makes it."""
    return load_texts(settings(Path(), rows), None).splits["train"].texts
