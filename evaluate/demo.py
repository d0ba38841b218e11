"""`relish demo`: the whole pipeline on a small real LLM and rated tweets."""

import csv
from collections.abc import Callable
from pathlib import Path
from shlex import quote

import numpy as np

from ..cache.errors import require_extra
from ..extract.pipeline import extract_cache
from ..extract.progress import Progress
from ..extract.settings import ExtractSettings
from ..train.grid import train_heads
from ..train.progress import Listener
from ..train.settings import TrainSettings
from .assets import rated_tweets, smollm2
from .results import evaluate_runs
from .summary import Results

SPLITS = {"train": 1800, "dev": 300, "test": 500}
"""Tweets in each split."""
PROMPT = "How positive or negative is this tweet, from -4 to 4?\nTweet: {text}\nRating:"


def run_demo(
    folder: Path, *, say: Callable[[str], None], progress: Progress | None, listener: Listener | None
) -> Results:
    """Fetch, extract, train and evaluate; run again, it uses what is there.

    Args:
        folder: gets the data, the cache, the runs and the report.
        say: hears what happens, with the command that does the same.
        progress: hears of the extraction.
        listener: hears of the training.

    Raises:
        RelishError: if the archives cannot be fetched, or `folder` holds something else.
    """
    for module, extra in (("transformers", "extract"), ("matplotlib", "report"), ("jinja2", "report")):
        require_extra(module, extra, "The demo")  # before the work, not after it
    say("about four minutes on two idle cores, after fetching SmolLM2-135M-Instruct (93 MB, once) and the rated tweets")
    model = smollm2()
    data = _write_splits(folder / "data", rated_tweets())
    cache, runs, report = (quote(str(folder / name)) for name in ("cache", "runs", "report"))
    files = " ".join(f"--data {quote(f'{split}={path}')}" for split, path in data.items())
    say(
        f"$ relish extract {cache} --model {quote(str(model))} {files} --prompt {quote(PROMPT)} --label-range=-4,4 "
        "--layers 0.5"
    )
    settings = ExtractSettings(model=model, data=data, prompt=PROMPT, label_range=(-4.0, 4.0), layers=(0.5,))
    extract_cache(folder / "cache", settings, progress=progress)
    say(f"$ relish train {cache} --out {runs} --head ridge,linear,mlp,relish --depths 1-3 --seeds 0-1")
    grid = TrainSettings(heads=("ridge", "linear", "mlp", "relish"), depths=(1, 2, 3), seeds=(0, 1))
    train_heads(folder / "cache", folder / "runs", grid, listener=listener)
    say(f"$ relish evaluate {runs} --out {report}")
    return evaluate_runs(folder / "runs", out=folder / "report")


def _write_splits(folder: Path, rows: list[tuple[str, float]]) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(len(rows))
    paths, begin = {}, 0
    for split, count in SPLITS.items():
        paths[split] = folder / f"{split}.csv"
        with paths[split].open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text", "score"])
            for row in order[begin : begin + count]:
                writer.writerow([row, *rows[row]])
        begin += count
    return paths
