"""`relish` commands that need one another: several at once, and resumable, since finished ones are noted."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One `relish` command."""

    name: str
    """Unique; of the log and of the note that it is done."""
    words: list[str]
    needs: tuple[str, ...] = ()
    """Names of the steps that come before it, where they are run as well."""
    late: Callable[[], list[str]] = list
    """More words, which only those steps give."""
    may_fail: str = ""
    """Words of the one error that is a result too: whoever chooses among such steps does without this one."""


def run_all(plan: list[Step], work: Path, jobs: int) -> Iterator[Step]:
    """Run so many steps at once, earlier ones first; each is given as it ends."""
    order = {step.name: place for place, step in enumerate(plan)}
    waits = TopologicalSorter({step.name: [need for need in step.needs if need in order] for step in plan})
    waits.prepare()
    ready: list[int] = []
    running: dict[Future[None], Step] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waits.is_active():
            ready = sorted([*ready, *(order[name] for name in waits.get_ready())])
            while ready and len(running) < jobs:
                step = plan[ready.pop(0)]
                running[pool.submit(run, step, work, jobs)] = step
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                future.result()
                waits.done(step.name)
                yield step


def run(step: Step, work: Path, jobs: int) -> None:
    """Run a command unless it is noted as done; its output goes to WORK/logs."""
    done, log = work / "done" / step.name, work / "logs" / f"{step.name}.log"
    words = [*step.words, *step.late()]
    if done.exists():
        if done.read_text(encoding="utf-8").splitlines()[0] != shlex.join(words):
            raise SystemExit(f"{work} has {step.name} with other options; give another folder, or the same options")
        return
    for folder in (done.parent, log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    # On a GPU each is one process, and their threads together are as many as there are cores.
    alone = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    before = log.stat().st_size if log.exists() else 0
    started = time.time()
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, "-m", "relish", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **alone},
            check=False,
        ).returncode
    seconds = time.time() - started
    print(f"{step.name}: " + (f"{seconds:,.0f} s" if code == 0 else f"failed with {code}; see {log}"), flush=True)
    if code != 0:
        said = log.read_bytes()[before:].decode("utf-8", errors="replace")
        # A kill, a full disk or memory that ran out is no such error: the step is run again.
        if not step.may_fail or step.may_fail not in said:
            raise SystemExit(code)
    write_whole(done, f"{shlex.join(words)}\n{seconds:.1f} s\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="")
    part.replace(path)
