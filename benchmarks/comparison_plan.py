"""What the comparison runs: the commands of each of its parts, and the choice of the tuning's learning rates."""

import json
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from commands import Step, write_whole

PARTS = ("frozen", "prompted", "tuned")
HEADS = "linear,linear-last,mlp,mlp-last,attention,ridge,ridge-mean,relish"
METHODS = ("lora", "raft")
SEARCHED = "stsb"


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
    rates: tuple[str, ...] = ("3e-4", "1e-3", "3e-3")
    """Learning rates that each method of tuning has to choose from, once for each LLM, by the validation rows of one
    data set. Heads have sixteen pairs of rate and weight decay each (recipe-log.md)."""
    search: tuple[str, ...] = ()
    """More options of `relish tune` in that choice, besides those of every tuning."""
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
    asked: list[str]
    """The same without the validation rows: nobody wants to know what the LLM answers to those."""

    def step(self, name: str, words: list[str], *needs: str) -> Step:
        """A command of this cell, after others of it."""
        return Step(f"{self.tag}-{name}", words, tuple(f"{self.tag}-{other}" for other in needs))

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
    """What the LLM answers, beside its embeddings, which cost next to nothing."""
    cache, report = str(cell.home / "prompted-cache"), str(cell.home / "prompted-report")
    answers = ["--layers", "0", "--readouts", "greedy,samples,candidates", "--shots", plan.shots]
    return [
        cell.step("extract-prompted", ["extract", cache, *cell.asked, *answers]),
        cell.step("evaluate-prompted", ["evaluate", cache, "--out", report], "extract-prompted"),
    ]


def tuned_steps(cell: Cell, plan: Plan, search: "Search") -> list[Step]:
    """Adapters, heads on the LLM with each of them, and what the LLM that was tuned to answer does answer."""
    found = []
    for method in METHODS:
        words = ["tune", str(cell.home / method), *cell.source, "--method", method, *plan.tune]
        needs = tuple(step.name for step in search.steps())
        found.append(Step(f"{cell.tag}-tune-{method}", words, needs, partial(search.rate, method)))
        answers = "greedy,candidates" if method == "raft" else "regression"
        layers = ["--layers", plan.layers, "--adapter", str(cell.home / method)]
        found.append(cell.extract(method, *layers, "--readouts", answers, needs=(f"tune-{method}",)))
        found += each_layer(cell, method, plan.tuned_depths, plan)
    return found


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


@dataclass(frozen=True)
class Search:
    """The learning rate of each method of tuning for one LLM: a short training at each of a few, on one data set."""

    home: Path
    backbone: str
    source: list[str]
    rates: tuple[str, ...]
    more: tuple[str, ...]
    noted: Path
    """What was searched on, and validation NRMSE by method and rate, once they are known; null where the loss was no
    longer finite. Figures of another search do not count."""
    told: str
    """On what it is searched."""

    def steps(self) -> list[Step]:
        """What has to be run, if anything: rates that are not noted yet, where there is a choice."""
        found = []
        if len(self.rates) == 1:
            return found
        noted = self._read()
        for method in METHODS:
            for rate in self.rates:
                if rate in noted.get(method, {}):
                    continue
                words = ["tune", str(self._folder(method, rate)), *self.source, "--method", method, "--lr", rate]
                # Such a rate is not chosen.
                diverged = "the loss was no longer finite"
                found.append(Step(f"{self.backbone}-search-{method}-{rate}", [*words, *self.more], may_fail=diverged))
        return found

    def rate(self, method: str) -> list[str]:
        """The option that gives a method the best of its rates."""
        if len(self.rates) == 1:
            return ["--lr", *self.rates]
        with _CHOOSING:
            noted = self._read()
            found = {name: {**self._figures(name), **noted.get(name, {})} for name in METHODS}
            if found != noted:
                self.noted.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.noted, json.dumps({"search": self.told, **found}, indent=2) + "\n")
        known = {rate: nrmse for rate, nrmse in found[method].items() if rate in self.rates and nrmse is not None}
        if not known:
            raise SystemExit(f"no rate of {method} gave an adapter; see the logs of the search")
        return ["--lr", min(known, key=known.__getitem__)]

    def _read(self) -> dict[str, dict[str, float | None]]:
        if not self.noted.exists():
            return {}
        noted = json.loads(self.noted.read_text(encoding="utf-8"))
        return noted if noted.pop("search", None) == self.told else {}

    def _folder(self, method: str, rate: str) -> Path:
        return self.home / f"{method}-{rate}"

    def _figures(self, method: str) -> dict[str, float | None]:
        tuned = {rate: self._folder(method, rate) / "tune.json" for rate in self.rates}
        return {
            rate: json.loads(path.read_text())["val"]["nrmse"] if path.exists() else None
            for rate, path in tuned.items()
        }


_CHOOSING = threading.Lock()


def resolved(model: Path, layers: str) -> list[str]:
    """Layers as indices, and their mix where there are several."""
    from transformers import AutoConfig

    from relish.extract.backbone import resolve_layers
    from relish.extract.settings import parse_layers

    depth = AutoConfig.from_pretrained(model).num_hidden_layers
    found = resolve_layers(parse_layers(layers), depth)
    return [*map(str, found), *(["mix"] if len(found) > 1 else [])]
