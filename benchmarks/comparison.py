"""The comparison of RESULTS.md: every family of LLM regression, frozen and fine-tuned, on five data sets and two LLMs.

    python benchmarks/comparison.py WORK --data DATA                    everything; hours per data set and backbone
    python benchmarks/comparison.py WORK --data DATA --tasks stsb --backbones smollm2
    python benchmarks/comparison.py WORK --kept benchmarks/results/comparison --tasks ""    the tables of what is kept
    python benchmarks/comparison.py WORK --data DATA --jobs 6           on a GPU: several commands at once
    python benchmarks/comparison.py --small --out comparison.json       a tiny version that only shows that it runs

DATA holds stsb/, sick/ and wmt-mlqe-pe/ with their published files. The same rows, drawn once by a fixed seed, serve
every family of a data set: for shots, for tuning and for the heads. Each step is a `relish` command that goes on where
it stopped, and finished steps are noted in WORK/done: the same command goes on after an interruption, and with more
tasks it adds to what is there. With --kept, the reports of each finished data set and backbone are packed into that
folder, and those that are there already are not run again: the tables can be made from there on another machine.
"""

import argparse
import csv
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from backbones import gemma3_folder, smollm2_folder, tiny_model
from commands import Step, run_all
from recipe_tables import MSE, recipe_tables

FILES = {
    "stsb": {"train": "stsb/train.csv", "val": "stsb/dev.csv", "test": "stsb/test.csv"},
    "sick": {"train": "sick/train.tsv", "val": "sick/trial.tsv", "test": "sick/test.tsv"},
    **{
        f"wmt-{pair}": {
            "train": f"wmt-mlqe-pe/{pair}/train.tsv",
            "val": f"wmt-mlqe-pe/{pair}/dev.tsv",
            "test": f"wmt-mlqe-pe/{pair}/test20.tsv",
        }
        for pair in ("en-zh", "ru-en", "si-en")
    },
}
BACKBONES = {"smollm2": smollm2_folder, "gemma3": gemma3_folder}
HEADS = "linear,linear-last,mlp,mlp-last,attention,ridge,ridge-mean,relish"
METHODS = ("lora", "raft")
SEARCHED = "stsb"


@dataclass(frozen=True)
class Plan:
    """What is run for every data set and backbone."""

    rows: dict[str, int]
    layers: str = "0.5,0.75,last"
    """Of the frozen LLM; with several, heads learn from their mix too."""
    tuned_layers: str = "last"
    """Of the fine-tuned ones: the layer that they were tuned through."""
    shots: str = "0,128"
    depths: str = "1-5"
    tuned_depths: str = "1,3,5"
    seeds: str = "0-2"
    loss_depth: str = "3"
    """Where squared error is compared with Huber, at the middle one of the layers."""
    rates: tuple[str, ...] = ("1e-4", "3e-4", "1e-3")
    """Learning rates that each method of tuning has to choose from, once for each LLM, by the validation rows of one
    data set. Heads had three each, too; relish more besides (recipe-log.md)."""
    search: tuple[str, ...] = ("--rows", "1000", "--batch-size", "32")
    """More options of `relish tune` in that choice."""
    tune: tuple[str, ...] = ("--batch-size", "32")
    """More options of `relish tune`."""
    train: tuple[str, ...] = ()
    """More options of `relish train`."""


def draw_rows(source: Path, target: Path, count: int) -> Path:
    """A CSV of `count` rows of a table, in their order, drawn by a fixed seed; all of them where there are no more."""
    from relish.extract.tables import read_rows

    if not target.exists():
        rows = list(read_rows(source))
        chosen = sorted(random.Random(0).sample(range(len(rows)), min(count, len(rows))))
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows[number] for number in chosen)
    return target


def steps(
    work: Path, task: str, backbone: str, model: Path, files: dict[str, Path], plan: Plan, search: "Search"
) -> Iterator[Step]:
    """All commands for one data set and backbone, in an order in which they can be run."""
    home, tag = work / task / backbone, f"{task}-{backbone}"
    source = sourced(model, task, files)
    for method in METHODS:
        words = ["tune", str(home / method), *source, "--method", method, *plan.tune]
        needs = tuple(step.name for step in search.steps())
        yield Step(f"{tag}-tune-{method}", words, needs, partial(search.rate, method))
    for name in ("frozen", *METHODS):
        cache, tuned = home / f"{name}-cache", name in METHODS
        layers = plan.tuned_layers if tuned else plan.layers
        readouts = {"frozen": ("greedy,samples,candidates", plan.shots), "raft": ("greedy,candidates", "0")}.get(name)
        words = ["extract", str(cache), *source, "--layers", layers]
        words += ["--adapter", str(home / name)] if tuned else []
        words += ["--readouts", readouts[0], "--shots", readouts[1]] if readouts else []
        yield Step(f"{tag}-extract-{name}", words, (f"{tag}-tune-{name}",) if tuned else ())
        for layer in resolved(model, layers):
            runs, report, own = home / f"{name}-{layer}-runs", home / f"{name}-{layer}-report", f"{name}-{layer}"
            heads = HEADS if layer != "mix" else HEADS.replace("ridge,ridge-mean,", "")
            words = ["train", str(cache), "--out", str(runs), "--head", heads, "--layer", layer, "--seeds", plan.seeds]
            words += ["--depths", plan.tuned_depths if tuned else plan.depths, *plan.train]
            yield Step(f"{tag}-train-{own}", words, (f"{tag}-extract-{name}",))
            words = ["evaluate", str(runs), "--out", str(report)]
            yield Step(f"{tag}-evaluate-{own}", words, (f"{tag}-train-{own}",))
    single = [layer for layer in resolved(model, plan.layers) if layer != "mix"]
    runs, report, layer = home / "mse-runs", home / MSE, single[len(single) // 2]
    grid = ["--head", "relish", "--depths", plan.loss_depth, "--seeds", plan.seeds, "--layer", layer, "--loss", "mse"]
    words = ["train", str(home / "frozen-cache"), "--out", str(runs), *grid, *plan.train]
    yield Step(f"{tag}-train-mse", words, (f"{tag}-extract-frozen",))
    yield Step(f"{tag}-evaluate-mse", ["evaluate", str(runs), "--out", str(report)], (f"{tag}-train-mse",))


def sourced(model: Path, task: str, files: dict[str, Path]) -> list[str]:
    """The options that say which texts which LLM reads."""
    data = [word for split, path in files.items() for word in ("--data", f"{split}={path}")]
    return ["--model", str(model), "--task", task, *data]


@dataclass(frozen=True)
class Search:
    """The learning rate of each method of tuning for one LLM: a short training at each of a few, on one data set."""

    home: Path
    backbone: str
    source: list[str]
    rates: tuple[str, ...]
    more: tuple[str, ...]
    noted: Path
    """Validation NRMSE by method and rate, once they are known."""

    def steps(self) -> list[Step]:
        """What has to be run, if anything."""
        if self.noted.exists():
            return []
        found = []
        for method in METHODS:
            for rate in self.rates:
                words = ["tune", str(self._folder(method, rate)), *self.source, "--method", method, "--lr", rate]
                # A rate at which the loss is no longer finite ends with an error, and is not chosen.
                found.append(Step(f"{self.backbone}-search-{method}-{rate}", [*words, *self.more], may_fail=True))
        return found

    def rate(self, method: str) -> list[str]:
        """The option that gives a method the best of its rates."""
        with _CHOOSING:
            if not self.noted.exists():
                found = {method: self._figures(method) for method in METHODS}
                self.noted.parent.mkdir(parents=True, exist_ok=True)
                part = self.noted.with_suffix(".part")
                part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
                part.replace(self.noted)
        by_rate = json.loads(self.noted.read_text(encoding="utf-8"))[method]
        return ["--lr", min(by_rate, key=by_rate.__getitem__)]

    def _folder(self, method: str, rate: str) -> Path:
        return self.home / f"{method}-{rate}"

    def _figures(self, method: str) -> dict[str, float]:
        tuned = {rate: self._folder(method, rate) / "tune.json" for rate in self.rates}
        found = {rate: json.loads(path.read_text())["val"]["nrmse"] for rate, path in tuned.items() if path.exists()}
        if not found:
            raise SystemExit(f"no rate of {method} gave an adapter; see the logs of the search")
        return found


_CHOOSING = threading.Lock()


def resolved(model: Path, layers: str) -> list[str]:
    """Layers as indices, and their mix where there are several."""
    from transformers import AutoConfig

    from relish.extract.backbone import resolve_layers
    from relish.extract.settings import parse_layers

    depth = AutoConfig.from_pretrained(model).num_hidden_layers
    found = resolve_layers(parse_layers(layers), depth)
    return [*map(str, found), *(["mix"] if len(found) > 1 else [])]


def keep(reports: list[Path], target: Path) -> None:
    """Pack what a comparison reads of report folders into one file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    with tarfile.open(part, "w:xz") as archive:
        for report in reports:
            for name in ("results.json", "predictions.csv"):
                archive.add(report / name, f"{report.name}/{name}")
    part.replace(target)


def unpack(folder: Path, work: Path) -> list[Path]:
    """A folder of reports for each data set and backbone that is kept, below WORK."""
    homes = []
    for packed in sorted(folder.glob("*.tar.xz")):
        homes.append(work / "unpacked" / packed.name.removesuffix(".tar.xz"))
        shutil.rmtree(homes[-1], ignore_errors=True)
        with tarfile.open(packed) as archive:
            archive.extractall(homes[-1], filter="data")
    return homes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", help="folder for caches, adapters, runs and reports")
    parser.add_argument("--data", type=Path, help="folder of the data sets; not needed with --small")
    parser.add_argument("--tasks", default=",".join(FILES))
    parser.add_argument("--backbones", default=",".join(BACKBONES))
    parser.add_argument("--rows", default="5000,500,1000", help="rows of train, val and test")
    parser.add_argument("--kept", type=Path, help="folder for the reports of what is finished; taken from there, too")
    parser.add_argument("--jobs", type=int, default=1, help="commands at once; one leaves a GPU idle for the most")
    parser.add_argument("--small", action="store_true", help="a tiny version that only shows that it runs")
    parser.add_argument("--out", type=Path, help="write comparison.json there too")
    given = parser.parse_args()
    if (given.work is None or (given.data is None and given.tasks)) and not given.small:
        parser.error("give a folder to work in and --data, the folder of the data sets; or --small")
    work: Path = given.work or Path(tempfile.mkdtemp(prefix="comparison-"))
    plan = Plan(dict(zip(("train", "val", "test"), map(int, given.rows.split(",")), strict=True)))
    tasks = [task for task in given.tasks.split(",") if task]
    backbones = {name: BACKBONES[name] for name in given.backbones.split(",")}
    if given.small:
        tasks, backbones, plan = ["stsb"], {"tiny": lambda: tiny_model(work / "model")}, small_plan()

    def drawn(task: str) -> dict[str, Path]:
        folder = work / "rows" / task
        if given.small:
            return {split: small_rows(folder / f"{split}-{count}.csv", count) for split, count in plan.rows.items()}
        return {
            split: draw_rows(given.data / FILES[task][split], folder / f"{split}-{count}.csv", count)
            for split, count in plan.rows.items()
        }

    kept: Path = given.kept or work / "kept"
    cells: dict[Path, list[Step]] = {}
    searches: list[Step] = []
    for backbone, find in backbones.items():
        for task in tasks:
            target = kept / f"{task}-{backbone}.tar.xz"
            if target.exists():
                continue
            model, home, noted = find(), work / "search" / backbone, kept / f"rates-{backbone}.json"
            source = [] if noted.exists() else sourced(model, SEARCHED, drawn(SEARCHED))
            search = Search(home, backbone, source, plan.rates, plan.search, noted)
            searches += [step for step in search.steps() if step not in searches]
            cells[target] = list(steps(work, task, backbone, model, drawn(task), plan, search))
    left = {target: {step.name for step in own} for target, own in cells.items()}
    for step in run_all([*searches, *(step for own in cells.values() for step in own)], work, given.jobs):
        for target, names in left.items():
            names.discard(step.name)
            if not names and not target.exists():
                keep([Path(one.words[-1]) for one in cells[target] if one.words[0] == "evaluate"], target)
    homes = unpack(kept, work)
    if not homes:
        sys.exit(f"nothing is kept in {kept} yet: name a task to run")
    reports = sorted(path.parent for home in homes for path in home.glob("*/results.json") if path.parent.name != MSE)
    command = [sys.executable, "-m", "relish", "compare", *reports, "--paper", "--out", str(work / "comparison")]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        sys.exit(code)
    recipe = recipe_tables(homes, HEADS.split(","))
    print(recipe)
    (work / "comparison" / "recipe.md").write_text(recipe, encoding="utf-8")
    if given.out is not None:
        shutil.copy(work / "comparison" / "comparison.json", given.out)


def small_plan() -> Plan:
    """A few rows, steps and cells."""
    return Plan(
        rows={"train": 24, "val": 8, "test": 8},
        layers="last",
        shots="0,2",
        depths="1-2",
        tuned_depths="1",
        seeds="0",
        loss_depth="1",
        rates=("3e-4", "1e-3"),
        search=(),
        tune=("--epochs", "1"),
        train=("--epochs", "1", "--latent-size", "8", "--num-heads", "2"),
    )


def small_rows(target: Path, count: int) -> Path:
    """A CSV of rows of random words."""
    from texts import sample

    target.parent.mkdir(parents=True, exist_ok=True)
    rows = sample(None, count)
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return target


if __name__ == "__main__":
    main()
