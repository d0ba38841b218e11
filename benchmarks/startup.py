"""How long one waits: for help, for `relish cache info`, and for the first step of a training.

    python benchmarks/startup.py CACHE --out startup.json
    python benchmarks/startup.py --small

Whole processes, in turn, from their start to their end; a first round that is not counted brings all files into memory.
The training is `relish train CACHE --out NEW` by its own entry point, which is made to end with its first step: what is
measured is everything from the command to the moment that step is done. It notes on the way when all is imported, when
the cache is open, and when the cell begins, once the statistics of a sample of the rows are there.
"""

import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from measure import Rival, arguments, cpu_seconds, race, save, table
from passes import extracted, models
from texts import sample

from relish.cache.manifest import load_manifest

UNTIL_FIRST_STEP = """
import os, signal, sys, time
from relish.cli import main
import relish.train.grid
from relish.train.live import LiveTable
def say(what):
    print(what, time.time(), flush=True)
def first_step(self, cell, done):
    say("step")
    os.killpg(0, signal.SIGKILL)  # its workers too
say("imported")
LiveTable.plan = lambda self, cells, steps: say("opened")
LiveTable.start = lambda self, cell: say("begun")
LiveTable.step = first_step
sys.argv = ["relish", *sys.argv[1:]]
main()
"""

FIRST_STEP = "relish train, first step"


@dataclass
class Command:
    """A process that is timed."""

    words: list[str]
    goal: float | None = None
    """Seconds it may take."""
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Seconds, of its own children too."""
    stages: dict[str, list[float]] = field(default_factory=dict)
    """Seconds from its start to what it notes."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def run(self, count: bool) -> None:
        began, before = time.time(), cpu_seconds()
        process = subprocess.Popen(self.words, stdout=subprocess.PIPE, text=True, start_new_session=True)
        said, _ = process.communicate()
        seconds = time.time() - began
        stages = {
            what: float(moment) - began
            for what, moment in re.findall(r"^(imported|opened|begun|step) ([\d.]+)$", said, re.MULTILINE)
        }
        if process.returncode != (-signal.SIGKILL if "step" in stages else 0):
            raise RuntimeError(f"{' '.join(self.words)} ended with {process.returncode}")
        if count:
            self.seconds.append(stages.get("step", seconds))
            self.cpu.append(cpu_seconds() - before)
            for what, moment in stages.items():
                self.stages.setdefault(what, []).append(moment)


def commands(cache: Path, home: Path) -> dict[str, Command]:
    relish = [sys.executable, "-m", "relish"]
    layer = str(load_manifest(cache).identity.layers[-1])
    train = ["train", str(cache), "--out", str(home / "runs"), "--layer", layer]
    return {
        "relish --help": Command([*relish, "--help"], 0.3),
        "relish train --help": Command([*relish, "train", "--help"], 0.3),
        "relish cache info": Command([*relish, "cache", "info", str(cache)], 0.5),
        "python -c pass": Command([sys.executable, "-c", "pass"]),
        "python -c 'import torch'": Command([sys.executable, "-c", "import torch"]),
        FIRST_STEP: Command([sys.executable, "-c", UNTIL_FIRST_STEP, *train], 3.0),
    }


def imports(statement: str, count: int = 8) -> list[tuple[str, float]]:
    """The packages that take longest to import, with all that each brings in: (name, milliseconds)."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statement], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = {}
    for whole, name in re.findall(r"^import time: +\d+ \| +(\d+) \| +([\w.]+)$", done.stderr, re.MULTILINE):
        package = name if name.startswith("relish.") else name.partition(".")[0]
        found[package] = max(found.get(package, 0.0), int(whole) / 1e3)
    return sorted(found.items(), key=lambda one: -one[1])[:count]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("cache", nargs="?", type=Path, help="a cache; not needed with --small")
    given = parser.parse_args()
    if given.cache is None and not given.small:
        parser.error("give a cache, or --small")
    rounds = 2 if given.small else given.rounds
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        cache = _tiny_cache(home) if given.small else given.cache
        timed = commands(cache, home)
        for number in range(rounds + 1):
            for command in timed.values():
                command.run(count=number > 0)
    stages = {what: statistics.median(moments) for what, moments in timed[FIRST_STEP].stages.items()}
    parts = {
        "relish --help": imports("import relish.cli"),
        "relish cache info": imports("import relish.cli, relish.cache.info, rich.console, rich.table, rich.text"),
        FIRST_STEP: imports("import relish.train.grid, relish.train.live"),
    }
    shown = [
        [name, *(f"{pick(one.seconds):.2f}" for pick in (statistics.median, min, max)), one.goal or ""]
        for name, one in timed.items()
    ]
    print(f"median of {rounds}, seconds\n")
    print(table(["", "median", "fastest", "slowest", "goal"], shown))
    print(f"\n{FIRST_STEP}: {', '.join(f'{what} at {moment:.2f} s' for what, moment in stages.items())}")
    for name, found in parts.items():
        print(f"{name} imports: {', '.join(f'{package} {ms:.0f} ms' for package, ms in found)}")
    save(
        given.out,
        {
            "rounds": rounds,
            "small": given.small,
            "commands": {
                name: {
                    "median_s": one.median,
                    "goal_s": one.goal,
                    "cpu_s": statistics.median(one.cpu),
                    "rounds_s": one.seconds,
                }
                for name, one in timed.items()
            },
            "first_step_stages_s": stages,
            "imports_ms": {name: dict(found) for name, found in parts.items()},
        },
    )


def _tiny_cache(home: Path) -> Path:
    (built,) = race([Rival("models", models, (home, True))], rounds=1, warm_up=0).values()
    (made,) = race([Rival("cache", extracted, (built.value[0], sample(None, 40), home))], rounds=1, warm_up=0).values()
    return Path(made.value)


if __name__ == "__main__":
    main()
