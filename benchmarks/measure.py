"""Times rivals in turn, each in a process of its own that is set up once and then waits for its turn.

A benchmark names its rivals; `race` starts their processes, lets each warm up, then goes round and round so that a slow
minute of the machine falls on all of them, and gives the wall time, the CPU time and the peak memory of each.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Rival:
    """One way of doing the work."""

    name: str
    setup: Callable[..., Callable[[], Any]]
    """A function of a module, called in the rival's process; it gives the function that is timed. What that one returns
    (numbers, strings) ends up in the result."""
    args: tuple[Any, ...] = ()
    threads: int | None = None
    """torch's threads; None for its own choice."""


@dataclass
class Figures:
    """What a rival took, one number per round; seconds and megabytes."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    values: list[Any] = field(default_factory=list)
    """What the work returned, one per round."""

    @property
    def value(self) -> Any:
        """What the work returned in the last round."""
        return self.values[-1]

    @property
    def median(self) -> float:
        """Median wall time."""
        return statistics.median(self.wall)

    def to_json(self) -> dict[str, Any]:
        """Medians, and every round's wall time."""
        return {
            "wall_s": round(self.median, 6),
            "cpu_s": round(statistics.median(self.cpu), 6),
            "peak_mb": round(self.peak_mb),
            "rounds_s": [round(value, 6) for value in self.wall],
            "value": self.value,
        }


def race(rivals: Sequence[Rival], *, rounds: int = 5, warm_up: int = 1) -> dict[str, Figures]:
    """Time each rival once per round, in turn.

    Raises:
        RuntimeError: if one of them fails, naming it.
    """
    context = multiprocessing.get_context("spawn")
    figures = {rival.name: Figures() for rival in rivals}
    workers = []
    for rival in rivals:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, rival), daemon=True)
        process.start()
        theirs.close()
        workers.append((rival.name, ours, process))
    for name, pipe, _ in workers:
        _answer(name, pipe)  # all are set up before the first is timed
    for number in range(warm_up + rounds):
        for name, pipe, _ in workers:
            pipe.send("go")
            wall, cpu, peak, value = _answer(name, pipe)
            if number >= warm_up:
                figures[name].wall.append(wall)
                figures[name].cpu.append(cpu)
                figures[name].values.append(value)
            figures[name].peak_mb = peak
    for _, pipe, process in workers:
        pipe.send("stop")
        process.join()
    return figures


def _answer(name: str, pipe: Any) -> Any:
    try:
        answer = pipe.recv()
    except EOFError:
        raise RuntimeError(f"the process of {name!r} died") from None
    if isinstance(answer, BaseException):
        raise RuntimeError(f"{name!r} failed: {answer!r}") from answer
    return answer


def _serve(pipe: Any, rival: Rival) -> None:
    try:
        if rival.threads is not None:
            import torch

            torch.set_num_threads(rival.threads)
        work = rival.setup(*rival.args)
        pipe.send("ready")
        while pipe.recv() == "go":
            before, started = cpu_seconds(), time.perf_counter()
            value = work()
            wall, cpu = time.perf_counter() - started, cpu_seconds() - before
            pipe.send((wall, cpu, peak_mb(), value))
    except Exception as error:  # `race` raises it, with the rival's name
        pipe.send(error)


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def peak_mb(who: int = resource.RUSAGE_SELF) -> float:
    """Most memory that this process, or with RUSAGE_CHILDREN the largest of those it waited for, has held."""
    status = Path("/proc/self/status")
    if who == resource.RUSAGE_SELF and status.exists():
        # Linux's ru_maxrss begins with what the parent held when it started this process.
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) / 1e3
    per_mb = 1e6 if platform.system() == "Darwin" else 1e3
    return resource.getrusage(who).ru_maxrss / per_mb


def median_of(work: Callable[[], object], times: int = 5) -> float:
    """Median wall seconds of some work in this process."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def arguments(about: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny version that only shows that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    return parser


def machine() -> dict[str, Any]:
    """What a figure depends on: commit, processor, cores, versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "commit": commit,
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "h5py")},
        "date": time.strftime("%Y-%m-%d"),
    }


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result, with what it depends on, if a path is given."""
    if path is not None:
        path.write_text(json.dumps({**result, "machine": machine()}, indent=2) + "\n", encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, figures: bool = False) -> str:
    """A Markdown table; with figures, all columns but the first are aligned to the right."""
    lines = [header, ["---", *(["---:" if figures else "---"] * (len(header) - 1))], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
