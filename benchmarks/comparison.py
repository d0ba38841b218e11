"""The comparison of RESULTS.md: every family of LLM regression, frozen and fine-tuned, on five data sets and two LLMs.

    python benchmarks/comparison.py WORK --data DATA                    everything; hours per data set and backbone
    python benchmarks/comparison.py WORK --data DATA --tasks stsb --backbones smollm2 --parts frozen
    python benchmarks/comparison.py WORK --kept benchmarks/results/comparison --tasks ""    the tables of what is kept
    python benchmarks/comparison.py WORK --data DATA --tuning-seeds 1,2 three trainings of each tuned LLM, not one
    python benchmarks/comparison.py WORK --data DATA --jobs 6           on a GPU: several commands at once
    python benchmarks/comparison.py --small --out comparison.json       a tiny version that only shows that it runs

DATA holds stsb/, sick/ and wmt-mlqe-pe/ with their published files. The same rows, drawn once by a fixed seed, serve
every family of a data set: for shots, for tuning and for the heads. Each step is a `relish` command that goes on where
it stopped, and finished steps are noted in WORK/done: the same command goes on after an interruption, and with more
tasks it adds to what is there. A data set and backbone has three parts: heads on the frozen LLM, what it answers to
prompts, and the fine-tuned LLM with its heads; each further seed of the tuning is a part as well. With --kept, the
reports of each finished part are packed into that folder, and those that are there already are not run again: the
tables can be made from there on another machine. A part that was run by another plan is refused; one with
which none was packed, as with most of the committed ones, is taken as it is.
"""

import argparse
import csv
import io
import json
import random
import re
import shutil
import string
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backbones import gemma3_folder, smollm2_folder, tiny_model
from commands import Step, run_all, write_whole
from comparison_plan import (
    HEADS,
    Cell,
    Plan,
    frozen_steps,
    prompted_steps,
    seeded_steps,
    sourced,
    tuned_steps,
)
from measure import machine
from overview import overview
from recipe_tables import LOSS, recipe_tables

from relish.extract.adapter import TUNED

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
STEPS = {"frozen": frozen_steps, "prompted": prompted_steps, "tuned": tuned_steps}
PLAN = "plan.json"
MACHINE = "machine.json"
UNUSED = {
    "frozen": ("shots", "tuned_depths", "rates", "tune"),
    "prompted": ("layers", "depths", "depth", "tuned_depths", "seeds", "rates", "tune", "train"),
    "tuned": ("shots", "depths"),
}
"""What of a plan a part does not depend on; one of a further seed as the first."""
BACKBONES = {"smollm2": smollm2_folder, "gemma3": gemma3_folder}


def draw_rows(source: Path, target: Path, count: int) -> Path:
    """A CSV of `count` rows of a table, in their order, drawn by a fixed seed; all of them where there are no more."""
    from relish.extract.tables import read_rows

    if not target.exists():
        rows = list(read_rows(source))
        chosen = sorted(random.Random(0).sample(range(len(rows)), min(count, len(rows))))
        write_csv(target, [rows[number] for number in chosen])
    return target


def write_csv(target: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV of rows, whole or not at all."""
    content = io.StringIO(newline="")
    writer = csv.DictWriter(content, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, content.getvalue())


def keep(steps: list[Step], plan: Plan, target: Path) -> None:
    """Pack what a comparison reads of report folders into one file, how each adapter was tuned, the plan, and what the
    machine that packs it is, and the commit."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    with tarfile.open(part, "w:xz") as archive:
        for step in steps:
            files = []
            if step.words[0] == "evaluate":
                files = [Path(step.words[-1]) / name for name in ("results.json", "predictions.csv")]
            elif step.words[0] == "tune" and (tuned := Path(step.words[1]) / TUNED).exists():  # no rate that diverged
                files = [tuned]
            for file in files:
                archive.add(file, f"{file.parent.name}/{file.name}")
        for name, told in ((PLAN, asdict(plan)), (MACHINE, machine())):
            content = json.dumps(told).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    part.replace(target)


def is_kept(target: Path, plan: Plan) -> bool:
    """Whether a part is there already; one of another plan ends the program."""
    if not target.exists():
        return False
    with tarfile.open(target) as archive:
        found = archive.extractfile(PLAN) if PLAN in archive.getnames() else None
        there = json.loads(found.read()) if found is not None else None
    here, default = (json.loads(json.dumps(asdict(one))) for one in (plan, Plan({})))
    there = here if there is None else {**default, **there}  # what it does not name had no other value then
    without = UNUSED[target.name.removesuffix(".tar.xz").rpartition("-")[2].rstrip(string.digits)]
    different = [name for name in {**here, **there} if name not in without and there.get(name) != here.get(name)]
    if different:
        changes = ", ".join(f"{name} {there.get(name)} there and {here.get(name)} here" for name in different)
        raise SystemExit(f"{target} was run by another plan ({changes}); give another folder with --kept")
    print(f"taken from {target.parent}: {target.name}", flush=True)
    return True


def bring_back(packed: Path, folder: Path) -> Path:
    """How each adapter of a kept part was tuned, unpacked into a folder."""
    with tarfile.open(packed) as archive:
        archive.extractall(folder, [one for one in archive if Path(one.name).name == TUNED], filter="data")
    return folder


def unpack(folder: Path, work: Path) -> list[Path]:
    """A folder of reports for each data set and backbone of which parts are kept, below WORK."""
    shutil.rmtree(work / "unpacked", ignore_errors=True)
    homes = []
    for packed in sorted(folder.glob("*.tar.xz")):
        homes.append(work / "unpacked" / packed.name.removesuffix(".tar.xz").rpartition("-")[0])
        with tarfile.open(packed) as archive:
            archive.extractall(homes[-1], filter="data")
    return list(dict.fromkeys(homes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", help="folder for caches, adapters, runs and reports")
    parser.add_argument("--data", type=Path, help="folder of the data sets; not needed with --small")
    parser.add_argument("--tasks", default=",".join(FILES))
    parser.add_argument("--backbones", default=",".join(BACKBONES))
    parser.add_argument("--parts", default=",".join(STEPS))
    parser.add_argument("--rows", default="5000,500,1000", help="rows of train, val and test")
    parser.add_argument(
        "--rates", default=",".join(Plan.rates), help="of tuning; the best on the validation rows is taken"
    )
    parser.add_argument(
        "--tuning-seeds", default="", help="such as 1,2: of further tunings, at the rate that is best with seed 0"
    )
    parser.add_argument("--compute-dtype", default="auto", help="of the LLM, as relish extract has it")
    parser.add_argument("--kept", type=Path, help="folder for the reports of what is finished; taken from there, too")
    parser.add_argument("--jobs", type=int, default=1, help="commands at once; one leaves a GPU idle for the most")
    parser.add_argument("--small", action="store_true", help="a tiny version that only shows that it runs")
    parser.add_argument("--out", type=Path, help="write comparison.json there too")
    given = parser.parse_args()
    if (given.work is None or (given.data is None and given.tasks)) and not given.small:
        parser.error("give a folder to work in and --data, the folder of the data sets; or --small")
    work: Path = given.work or Path(tempfile.mkdtemp(prefix="comparison-"))
    for name, known in (("parts", STEPS), ("tasks", FILES), ("backbones", BACKBONES)):
        wrong = set(getattr(given, name).split(",")) - set(known)
        if wrong and not (name == "tasks" and not given.tasks):
            parser.error(f"the {name} are {', '.join(known)}; got {getattr(given, name)!r}")
    if not re.fullmatch(r"\d+,\d+,\d+", given.rows):
        parser.error(f"--rows takes three numbers, of train, val and test, such as 2000,250,500; got {given.rows}")
    if not re.fullmatch(r"[\d.]+(e-?\d+)?(,[\d.]+(e-?\d+)?)*", given.rates):
        parser.error(f"--rates takes learning rates, such as 3e-4,1e-3; got {given.rates!r}")
    if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", given.tuning_seeds):
        parser.error(f"--tuning-seeds takes seeds beside 0, such as 1,2; got {given.tuning_seeds!r}")
    counts = dict(zip(("train", "val", "test"), map(int, given.rows.split(",")), strict=True))
    plan = Plan(
        counts,
        rates=tuple(given.rates.split(",")),
        compute=("--compute-dtype", given.compute_dtype),
    )
    names, seeds = given.parts.split(","), "1" if given.small else given.tuning_seeds
    if seeds and "tuned" in names:
        names += [f"tuned{seed}" for seed in seeds.split(",")]
    tasks = [task for task in given.tasks.split(",") if task]
    backbones = {name: BACKBONES[name] for name in given.backbones.split(",")}
    if given.small:
        tasks, backbones, plan = ["stsb"], {"tiny": lambda: tiny_model(work / "model")}, small_plan()

    def drawn(task: str) -> dict[str, Path]:
        folder = work / "rows" / task
        if given.small:
            return {split: small_rows(folder, split, count) for split, count in plan.rows.items()}
        return {
            split: draw_rows(given.data / FILES[task][split], folder / f"{split}-{count}.csv", count)
            for split, count in plan.rows.items()
        }

    kept: Path = given.kept or work / "kept"
    parts: dict[Path, list[Step]] = {}
    for backbone, find in backbones.items():
        for task in tasks:
            targets = {part: kept / f"{task}-{backbone}-{part}.tar.xz" for part in names}
            targets = {part: target for part, target in targets.items() if not is_kept(target, plan)}
            if not targets:
                continue
            model = find()
            files = drawn(task)
            cell = Cell(work / task / backbone, f"{task}-{backbone}", model, sourced(model, task, files, plan))
            for part, target in targets.items():
                if part in STEPS:
                    parts[target] = STEPS[part](cell, plan)
                    continue
                packed, first = kept / f"{task}-{backbone}-tuned.tar.xz", cell.home
                if packed.exists():
                    first = bring_back(packed, work / "first" / cell.tag)
                parts[target] = seeded_steps(cell, plan, part.removeprefix("tuned"), first)
    left = {target: {step.name for step in own} for target, own in parts.items()}
    for step in run_all([step for own in parts.values() for step in own], work, given.jobs):
        for target, names in left.items():
            names.discard(step.name)
            if not names and not target.exists():
                keep(parts[target], plan, target)
    homes = unpack(kept, work)
    if not homes:
        sys.exit(f"nothing is kept in {kept} yet: name a task to run")
    reports = sorted(path.parent for home in homes for path in home.glob("*/results.json") if path.parent.name != LOSS)
    as_in_the_paper = {home.name.rpartition("-")[0] for home in homes} == set(FILES)
    paper = ["--paper"] if as_in_the_paper else []
    texts = {"recipe": recipe_tables(homes, HEADS.split(","))}
    for name, folder, average in (("overview", "comparison", []), ("averaged", "averaged", ["--average-seeds"])):
        command = [sys.executable, "-m", "relish", "compare", *reports, "--out", str(work / folder), *paper, *average]
        code = subprocess.run(command, check=False).returncode
        if code != 0:
            sys.exit(code)
        texts[name] = overview(json.loads((work / folder / "comparison.json").read_text(encoding="utf-8")))
    for name, text in texts.items():
        print(text)
        (work / f"{name}.md").write_text(text, encoding="utf-8")
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
        depth="1",
        rates=("3e-4", "1e-3"),
        tune=("--epochs", "1"),
        train=("--epochs", "1", "--latent-size", "8", "--num-heads", "2"),
    )


def small_rows(folder: Path, split: str, count: int) -> Path:
    """A CSV of rows of random words, others for each split."""
    from texts import sample

    target = folder / f"{split}-{count}.csv"
    write_csv(target, sample(None, count, split))
    return target


if __name__ == "__main__":
    main()
