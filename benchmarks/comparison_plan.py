"""What the comparison runs: the commands of each of its parts."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from commands import Step

from relish.extract.adapter import TUNED

HEADS = "linear,linear-last,mlp,mlp-last,attention,ridge,ridge-mean,relish"
METHODS = ("lora", "raft")
DIVERGED = "the loss was no longer finite"
"""What `relish tune` says where a rate is no rate to take."""


@dataclass(frozen=True)
class Plan:
    """What is run for every data set and backbone."""

    rows: dict[str, int]
    layers: str = "0.5,0.75,last"
    """Of the LLM, frozen and fine-tuned; with several, heads learn from their mix too."""
    shots: str = "0,128"
    depths: str = "1-5"
    """On the mix of the layers."""
    depth: str = "3"
    """On each single layer; and where Huber is compared with squared error, at the middle one."""
    tuned_depths: str = "1,3,5"
    seeds: str = "0-2"
    rates: tuple[str, ...] = ("3e-4", "1e-3", "2e-3")
    """Learning rates that each method of tuning has to choose from on each data set, by its validation rows. Heads have
    one rate and weight decay for all, found by one search for each (recipe-log.md)."""
    tune: tuple[str, ...] = ()
    """More options of `relish tune`."""
    train: tuple[str, ...] = ()
    """More options of `relish train`."""
    compute: tuple[str, ...] = ()
    """More options of all commands that run the LLM."""


@dataclass(frozen=True)
class Cell:
    """One data set and backbone."""

    home: Path
    tag: str
    model: Path
    source: list[str]
    """The options that say which texts which LLM reads."""

    def step(self, name: str, words: list[str], *needs: str) -> Step:
        """A command of this cell, after others of it."""
        return Step(f"{self.tag}-{name}", words, tuple(f"{self.tag}-{other}" for other in needs))

    def tune(self, adapter: str, method: str, *words: str, needs: tuple[str, ...] = ()) -> Step:
        """A training of the LLM."""
        own = ["tune", str(self.home / adapter), *self.source, "--method", method, *words]
        return self.step(f"tune-{adapter}", own, *needs)

    def extract(self, cache: str, *words: str, needs: tuple[str, ...] = ()) -> Step:
        """The LLM's passes over the texts."""
        return self.step(
            f"extract-{cache}", ["extract", str(self.home / f"{cache}-cache"), *self.source, *words], *needs
        )

    def heads(self, name: str, cache: str, *words: str) -> list[Step]:
        """A training and its evaluation."""
        runs, report = str(self.home / f"{name}-runs"), str(self.home / f"{name}-report")
        train = ["train", str(self.home / f"{cache}-cache"), "--out", runs, *words]
        return [
            self.step(f"train-{name}", train, f"extract-{cache}"),
            self.step(f"evaluate-{name}", ["evaluate", runs, "--out", report], f"train-{name}"),
        ]


def frozen_steps(cell: Cell, plan: Plan) -> list[Step]:
    """Heads on the frozen LLM: at each layer, and on the mix of them; Huber in place of squared error."""
    layers = resolved(cell.model, plan.layers)
    found = [cell.extract("frozen", "--layers", plan.layers), *each_layer(cell, "frozen", plan.depths, plan)]
    single = [layer for layer in layers if layer != "mix"]
    middle = ["--head", "relish", "--depths", plan.depth, "--seeds", plan.seeds, "--layer", single[len(single) // 2]]
    return [*found, *cell.heads("loss", "frozen", *middle, "--loss", "huber", *plan.train)]


def prompted_steps(cell: Cell, plan: Plan) -> list[Step]:
    """What the LLM answers, beside its embeddings, which cost next to nothing; to the validation rows too, by whose
    figures the best rival is chosen."""
    cache, report = str(cell.home / "prompted-cache"), str(cell.home / "prompted-report")
    answers = ["--layers", "0", "--readouts", "greedy,samples,candidates", "--shots", plan.shots]
    return [
        cell.step("extract-prompted", ["extract", cache, *cell.source, *answers]),
        cell.step("evaluate-prompted", ["evaluate", cache, "--out", report], "extract-prompted"),
    ]


def tuned_steps(cell: Cell, plan: Plan) -> list[Step]:
    """Adapters at each rate, heads on the LLM with the best, and what the LLM that was tuned to answer does answer."""
    found = []
    for method in METHODS:
        folders = _by_rate(cell.home, plan, method)
        tunings = [cell.tune(f"{method}-{rate}", method, "--lr", rate, *plan.tune) for rate in folders]
        found += [replace(tune, may_fail=DIVERGED) for tune in tunings]
        needs = tuple(f"tune-{method}-{rate}" for rate in folders)
        found += _on_tuned(cell, plan, method, method, needs, partial(_best_adapter, folders))
    return found


def seeded_steps(cell: Cell, plan: Plan, seed: str, first: Path) -> list[Step]:
    """The same with one more tuning, of another seed, at the rate that is best with the first one, whose tune.json lie
    below `first`; `relish compare` pools them."""
    found = []
    for method in METHODS:
        folders, name = _by_rate(first, plan, method), f"{method}-seed{seed}"
        needs = tuple(f"tune-{method}-{rate}" for rate in folders)
        tune = cell.tune(name, method, "--seed", seed, *plan.tune, needs=needs)
        found.append(replace(tune, late=partial(_best_rate, folders)))
        found += _on_tuned(cell, plan, method, name, (f"tune-{name}",), partial(cell.home.joinpath, name))
    return found


def _by_rate(home: Path, plan: Plan, method: str) -> dict[str, Path]:
    return {rate: home / f"{method}-{rate}" for rate in plan.rates}


def _best_adapter(folders: dict[str, Path]) -> Path:
    return folders[_best(folders)]


def _best_rate(folders: dict[str, Path]) -> list[str]:
    return ["--lr", _best(folders)]


def _on_tuned(
    cell: Cell, plan: Plan, method: str, cache: str, needs: tuple[str, ...], adapter: Callable[[], Path]
) -> list[Step]:
    """Heads on the states of a tuned LLM, whose adapter is known when it is tuned, and the LLM's answers."""
    answers = "greedy,candidates" if method == "raft" else "regression"
    extract = cell.extract(cache, "--layers", plan.layers, "--readouts", answers, needs=needs)
    extract = replace(extract, late=lambda: ["--adapter", str(adapter())])
    return [extract, *each_layer(cell, cache, plan.tuned_depths, plan)]


def _best(folders: dict[str, Path]) -> str:
    """The rate whose adapter has the lowest validation NRMSE."""
    nrmse = {
        rate: json.loads(path.read_text())["val"]["nrmse"]
        for rate, folder in folders.items()
        if (path := folder / TUNED).exists()
    }
    if not nrmse:
        raise SystemExit(
            f"not one of {', '.join(map(str, folders.values()))} was tuned without diverging; see the logs"
        )
    return min(nrmse, key=nrmse.__getitem__)


def each_layer(cell: Cell, cache: str, depths: str, plan: Plan) -> list[Step]:
    """All heads on each layer of a cache, and on the mix of them, where all depths are trained."""
    found: list[Step] = []
    layers = resolved(cell.model, plan.layers)
    for layer in layers:
        heads = HEADS if layer != "mix" else HEADS.replace("ridge,ridge-mean,", "")
        grid = ["--head", heads, "--depths", depths if layer == layers[-1] else plan.depth, "--seeds", plan.seeds]
        found += cell.heads(f"{cache}-{layer}", cache, *grid, "--layer", layer, *plan.train)
    return found


def sourced(model: Path, task: str, files: dict[str, Path], plan: Plan) -> list[str]:
    """The options that say which texts which LLM reads, and how."""
    data = [word for split, path in files.items() for word in ("--data", f"{split}={path}")]
    return ["--model", str(model), "--task", task, *data, *plan.compute]


def resolved(model: Path, layers: str) -> list[str]:
    """Layers as indices, and their mix where there are several."""
    from transformers import AutoConfig

    from relish.extract.backbone import resolve_layers
    from relish.extract.settings import parse_layers

    depth = AutoConfig.from_pretrained(model).num_hidden_layers
    found = resolve_layers(parse_layers(layers), depth)
    return [*map(str, found), *(["mix"] if len(found) > 1 else [])]
