"""Tries training recipes on a cache and logs their validation figures, one JSON line per cell; resumable.

    python benchmarks/recipe.py CACHE OUT --layer 15 --recipes base,mse --depths 3 --seeds 0-2
    python benchmarks/recipe.py --table OUT...

The recipe log in this folder was made with it. Only validation splits are looked at, never the test split.
"""

import argparse
import json
import statistics
from math import nan
from pathlib import Path
from typing import Any

from relish.train.grid import train_heads
from relish.train.settings import TrainSettings, parse_layer, parse_range

START = {"epochs": 10, "patience": 3, "weight_decay": 0.01, "loss": "huber"}
"""Where the search began: what a recipe does not name."""

RECIPES: dict[str, dict[str, Any]] = {
    "base": {},
    "raw-inputs": {"standardise": False},
    "mse": {"loss": "mse"},
    "lr1e-4": {"lr": 1e-4},
    "lr2e-4": {"lr": 2e-4},
    "lr3e-4": {"lr": 3e-4},
    "lr5e-4": {"lr": 5e-4},
    "lr1e-3": {"lr": 1e-3},
    "lr3e-3": {"lr": 3e-3},
    "lr1e-2": {"lr": 1e-2},
    "lr3e-2": {"lr": 3e-2},
    "batch8": {"batch_size": 8},
    "batch32": {"batch_size": 32},
    "batch32-lr5e-4": {"batch_size": 32, "lr": 5e-4},
    "drop0.1": {"dropout": 0.1},
    "drop0.2": {"dropout": 0.2},
    "drop0.3": {"dropout": 0.3},
    "decay0": {"weight_decay": 0.0},
    "decay0.1": {"weight_decay": 0.1},
    "decay0.3": {"weight_decay": 0.3},
    "decay1": {"weight_decay": 1.0},
    "epochs5": {"epochs": 5},
    "e5-decay1": {"epochs": 5, "weight_decay": 1.0},
    "e5-decay3": {"epochs": 5, "weight_decay": 3.0},
    "e5-lr5e-4": {"epochs": 5, "lr": 5e-4},
    "e5-lr1e-4": {"epochs": 5, "lr": 1e-4},
    "e5-lr3e-5": {"epochs": 5, "lr": 3e-5},
    "e5-decay1-lr5e-4": {"epochs": 5, "weight_decay": 1.0, "lr": 5e-4},
    "e5-decay1-drop0.1": {"epochs": 5, "weight_decay": 1.0, "dropout": 0.1},
    "e5-decay1-batch8": {"epochs": 5, "weight_decay": 1.0, "batch_size": 8},
    "e5-decay1-mse": {"epochs": 5, "weight_decay": 1.0, "loss": "mse"},
    "e5-decay3-mse": {"epochs": 5, "weight_decay": 3.0, "loss": "mse"},
    "e5-decay5-mse": {"epochs": 5, "weight_decay": 5.0, "loss": "mse"},
    "e5-decay20-mse": {"epochs": 5, "weight_decay": 20.0, "loss": "mse"},
    "e5-decay1-lr1e-4": {"epochs": 5, "weight_decay": 1.0, "lr": 1e-4},
    **{f"e{n}-own": {"epochs": n, "patience": n, "weight_decay": None, "loss": "mse"} for n in (5, 10, 15, 20, 40)},
    "e4-decay1": {"epochs": 4, "weight_decay": 1.0},
    "e8-decay1": {"epochs": 8, "weight_decay": 1.0},
    "warmup0.2": {"warmup": 0.2},
    "latent128": {"latent_size": 128},
    "heads4": {"num_heads": 4},
    "heads16": {"num_heads": 16},
}


def run(arguments: argparse.Namespace) -> None:
    for name in arguments.recipes.split(","):
        settings = TrainSettings(
            heads=tuple(arguments.head.split(",")),
            depths=parse_range(arguments.depths, "--depths"),
            seeds=parse_range(arguments.seeds, "--seeds"),
            layer=arguments.layer,
            threads=arguments.threads,
            device="cpu",
            **{**START, **RECIPES[name]},
        )
        result = train_heads(arguments.paths[0], arguments.paths[1] / f"layer{arguments.layer}" / name, settings)
        for cell, metrics in result.cells.items():
            print(name, cell, json.dumps(metrics["val"]["pearson"]), json.dumps(metrics["val"]["nrmse"]), flush=True)


def table(folders: list[Path]) -> None:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for folder in folders:
        for path in sorted(folder.glob("layer*/*/*/metrics.json")):
            head, depth, _ = path.parent.name.rsplit("-", 2)
            key = (folder.name, path.parts[-4], path.parts[-3], head, depth)
            groups.setdefault(key, []).append(json.loads(path.read_text(encoding="utf-8")))
    print("| data | layer | recipe | head | seeds | val Pearson | val NRMSE | best epoch | s per cell |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for (data, layer, recipe, head, depth), cells in groups.items():
        pearson = [nan if cell["val"]["pearson"] is None else cell["val"]["pearson"] for cell in cells]
        nrmse = [cell["val"]["nrmse"] for cell in cells]
        epochs = ", ".join(str(cell.get("best_epoch", "–")) for cell in cells)
        seconds = statistics.median(cell["seconds"] for cell in cells)
        name = f"{head} {depth}" if depth != "L0" else head
        print(
            f"| {data} | {layer.removeprefix('layer')} | {recipe} | {name} | {len(cells)} | "
            f"{mean_sd(pearson)} | {mean_sd(nrmse)} | "
            f"{epochs} | {seconds:.0f} |"
        )


def mean_sd(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--recipes", default="base")
    parser.add_argument("--head", default="relish")
    parser.add_argument("--depths", default="3")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--layer", type=parse_layer)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if given.table:
        table(given.paths)
    else:
        run(given)
