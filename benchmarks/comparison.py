"""The comparison of RESULTS.md: every family of LLM regression, frozen and fine-tuned, on five data sets and two LLMs.

    python benchmarks/comparison.py WORK --data DATA                    everything; hours per data set and backbone
    python benchmarks/comparison.py WORK --data DATA --tasks stsb --backbones smollm2
    python benchmarks/comparison.py WORK --kept benchmarks/results/comparison --tasks ""    the tables of what is kept
    python benchmarks/comparison.py --small --out comparison.json       a tiny version that only shows that it runs

DATA holds stsb/, sick/ and wmt-mlqe-pe/ with their published files. The same rows, drawn once by a fixed seed, serve
every family of a data set: for shots, for tuning and for the heads. Each step is a `relish` command that goes on where
it stopped, and finished steps are noted in WORK/done: the same command goes on after an interruption, and with more
tasks it adds to what is there. With --kept, the reports of each finished data set and backbone are packed into that
folder, and those that are there already are not run again: the tables can be made from there on another machine.
"""

import argparse
import csv
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backbones import gemma3, smollm2_gguf, tiny_model

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
BACKBONES = {"smollm2": smollm2_gguf, "gemma3": gemma3}
HEADS = "linear,linear-last,mlp,mlp-last,attention,ridge,ridge-mean,relish"
METHODS = ("lora", "raft")


@dataclass(frozen=True)
class Step:
    """One `relish` command."""

    name: str
    """Unique; of the log and of the note that it is done."""
    words: list[str]


@dataclass(frozen=True)
class Plan:
    """What is run for every data set and backbone."""

    rows: dict[str, int]
    layers: str = "0.5,0.75,last"
    shots: str = "0,128"
    depths: str = "1-5"
    seeds: str = "0-2"
    tune: tuple[str, ...] = ()
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


def steps(work: Path, task: str, backbone: str, model: Path, files: dict[str, Path], plan: Plan) -> Iterator[Step]:
    """All commands for one data set and backbone, in their order."""
    home, tag = work / task / backbone, f"{task}-{backbone}"
    source = ["--model", str(model), "--task", task]
    source += [word for split, path in files.items() for word in ("--data", f"{split}={path}")]
    caches = {"frozen": []}
    for method in METHODS:
        caches[method] = ["--adapter", str(home / method)]
        options = ["--method", method, *plan.tune]
        yield Step(f"{tag}-tune-{method}", ["tune", str(home / method), *source, *options])
    for name, adapter in caches.items():
        cache = home / f"{name}-cache"
        readouts = {"frozen": ("greedy,samples,candidates", plan.shots), "raft": ("greedy,candidates", "0")}.get(name)
        asked = ["--readouts", readouts[0], "--shots", readouts[1]] if readouts else []
        layers = ["--layers", plan.layers]
        yield Step(f"{tag}-extract-{name}", ["extract", str(cache), *source, *adapter, *layers, *asked])
        for layer in layers_of(cache):
            runs, report = home / f"{name}-{layer}-runs", home / f"{name}-{layer}-report"
            heads = HEADS if layer != "mix" else HEADS.replace("ridge,ridge-mean,", "")
            grid = ["--head", heads, "--depths", plan.depths, "--seeds", plan.seeds, "--layer", layer, *plan.train]
            yield Step(f"{tag}-train-{name}-{layer}", ["train", str(cache), "--out", str(runs), *grid])
            yield Step(f"{tag}-evaluate-{name}-{layer}", ["evaluate", str(runs), "--out", str(report)])


def layers_of(cache: Path) -> list[str]:
    """The layers of a cache, and their mix where there are several."""
    from relish.cache.reader import open_cache

    layers = open_cache(cache).layers
    return [*map(str, layers), *(["mix"] if len(layers) > 1 else [])]


def run(step: Step, work: Path) -> None:
    """Run a command unless it is noted as done; its output goes to WORK/logs."""
    done, log = work / "done" / step.name, work / "logs" / f"{step.name}.log"
    if done.exists():
        return
    for folder in (done.parent, log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, "-m", "relish", *step.words], stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code != 0:
        sys.exit(f"{step.name} failed with {code}; see {log}")
    done.write_text(f"{time.time() - started:.1f} s\n", encoding="utf-8")
    print(f"{step.name}: {time.time() - started:,.0f} s", flush=True)


def keep(reports: list[Path], target: Path) -> None:
    """Pack what a comparison reads of report folders into one file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    with tarfile.open(part, "w:xz") as archive:
        for report in reports:
            for name in ("results.json", "predictions.csv"):
                archive.add(report / name, f"{report.name}/{name}")
    part.replace(target)


def kept_reports(folder: Path, work: Path) -> list[Path]:
    """The report folders of all that is kept, unpacked below WORK."""
    found = []
    for packed in sorted(folder.glob("*.tar.xz")):
        home = work / "kept" / packed.name.removesuffix(".tar.xz")
        with tarfile.open(packed) as archive:
            archive.extractall(home, filter="data")
        found += sorted(path.parent for path in home.glob("*/results.json"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", help="folder for caches, adapters, runs and reports")
    parser.add_argument("--data", type=Path, help="folder of the data sets; not needed with --small")
    parser.add_argument("--tasks", default=",".join(FILES))
    parser.add_argument("--backbones", default=",".join(BACKBONES))
    parser.add_argument("--rows", default="1000,300,500", help="rows of train, val and test")
    parser.add_argument("--kept", type=Path, help="folder for the reports of what is finished; taken from there, too")
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
    reports: list[Path] = []
    for task in tasks:
        files = {
            split: small_rows(work / "rows" / f"{split}.csv", count)
            if given.small
            else draw_rows(given.data / FILES[task][split], work / "rows" / task / f"{split}.csv", count)
            for split, count in plan.rows.items()
        }
        for backbone, find in backbones.items():
            target = None if given.kept is None else given.kept / f"{task}-{backbone}.tar.xz"
            if target is not None and target.exists():
                continue
            own = []
            for step in steps(work, task, backbone, find(), files, plan):
                run(step, work)
                own += [Path(step.words[-1])] if step.words[0] == "evaluate" else []
            if target is None:
                reports += own
            else:
                keep(own, target)
    if given.kept is not None:
        reports = kept_reports(given.kept, work)
    command = [sys.executable, "-m", "relish", "compare", *reports, "--paper", "--out", str(work / "comparison")]
    code = subprocess.run(command, check=False).returncode
    if code == 0 and given.out is not None:
        shutil.copy(work / "comparison" / "comparison.json", given.out)
    sys.exit(code)


def small_plan() -> Plan:
    """A few rows, steps and cells."""
    grid = ("--epochs", "1", "--latent-size", "8", "--num-heads", "2")
    return Plan({"train": 24, "val": 8, "test": 8}, "last", "0,2", "1-2", "0", ("--epochs", "1"), grid)


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
