"""Cells trained in processes of their own: started, given one cell after another, listened to, and ended with this one.

A process is `python -c` with this one's import path, jobs on its stdin and answers on its stdout, both pickled (no
stranger writes to a pipe between a process and its child). Not `multiprocessing`: its spawned processes import the
caller's main module again, which fails in a script without `if __name__ == "__main__":`. And stdin's end tells a
process at once that this one is gone, however it went. train/worker.py is the other end.
"""

import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..cache.errors import RunError
from .cell import Training
from .data import Moments
from .heads import build_head
from .pooled_rows import PooledRows
from .progress import CellName, Listener
from .run import discard_unfinished
from .settings import CLOSED_FORM, TrainSettings

_WAKE = 1.0  # seconds; on Windows Ctrl-C does not end a wait
_LINGER = 5.0  # seconds from the end of what a process says to its own


@dataclass(frozen=True)
class Setup:
    """What a process is told before its first cell."""

    cache: str
    out: Path
    settings: TrainSettings
    config: dict[str, Any]
    """What the cache and the settings give; the process must come to the same."""
    moments: dict[str | None, Moments]
    pooled: dict[str, tuple[PooledRows, PooledRows]]
    threads: int


def train_in_processes(
    training: Training, cells: Sequence[CellName], listener: Listener | None, processes: int, threads: int
) -> Generator[tuple[CellName, dict[str, Any] | None], None, None]:
    """Train cells, so many at once, handed out in the order given.

    However this ends, no process is left, and nothing of an unfinished run; the caller holds the lock of the folder.

    Args:
        training: what they share.
        cells: at least one.
        listener: hears of starts, steps and epochs; not of ends, which are yielded.
        processes: how many.
        threads: torch's threads in each.

    Yields:
        Each cell with its metrics, or None if it diverged, as it ends.

    Raises:
        RunError: if a process was killed; any error of a cell, as if it had been trained here.
    """
    waiting = list(reversed(cells))
    said: queue.Queue[tuple[_Worker, tuple[Any, ...] | None]] = queue.Queue()
    try:
        with ExitStack() as ends_with_this:
            workers = [ends_with_this.enter_context(_Worker(said)) for _ in range(processes)]
            setup = _setup(training, cells, threads)  # while they import torch
            for worker in workers:
                worker.send(setup)
                worker.hand(waiting.pop() if waiting else None)
            open_cells = set(cells)
            while open_cells:
                try:
                    worker, message = said.get(timeout=_WAKE)
                except queue.Empty:
                    continue
                if message is None:
                    if worker.cell is not None:
                        raise _died(worker.cell, worker.exit_code())
                elif message[0] == "error":
                    error, text = message[1:]
                    raise error from _InWorker(text)
                elif message[0] == "outcome":
                    cell, metrics = message[1:]
                    open_cells.remove(cell)
                    worker.hand(waiting.pop() if waiting else None)
                    yield cell, metrics
                elif listener is not None:
                    getattr(listener, message[0])(*message[1:])
    finally:
        discard_unfinished(training.out)


class _InWorker(Exception):
    """The traceback in the process where an error arose, to be shown above the one here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Worker:
    """One process; a context that kills it at the end, when it is idle or must not write any more."""

    def __init__(self, said: "queue.Queue[tuple[_Worker, tuple[Any, ...] | None]]") -> None:
        self.cell: CellName | None = None
        """What it is at."""
        self._said = said

    def __enter__(self) -> "_Worker":
        path = [str(Path(entry).absolute()) for entry in sys.path]  # '' is this folder, also after a chdir
        code = f"import sys; sys.path[:] = {path!r}; from {__package__}.worker import main; main()"
        with _deaf_to_signals():
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        self._listening = threading.Thread(target=self._listen, name="relish-worker", daemon=True)
        self._listening.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._listening.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # bytes that it did not take
                pipe.close()

    def send(self, message: object) -> None:
        """Tell it something; if it is dead, its silence says so."""
        assert self._process.stdin is not None
        with suppress(OSError):
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()

    def hand(self, cell: CellName | None) -> None:
        """Give it a cell to train; None: there is nothing left, and its memory is freed."""
        self.cell = cell
        if cell is None:
            self._process.kill()
        else:
            self.send(cell)

    def exit_code(self) -> int:
        """How it ended; negative after a signal."""
        try:
            return self._process.wait(_LINGER)
        except subprocess.TimeoutExpired:  # it lives, and what it says cannot be read
            self._process.kill()
            return self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        try:
            while True:
                self._said.put((self, pickle.load(self._process.stdout)))
        except Exception:  # EOFError, or anything that half a message gives
            self._said.put((self, None))


@contextmanager
def _deaf_to_signals() -> Iterator[None]:
    """Processes started here do not hear Ctrl-C and SIGTERM, which go to the whole group: this one ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _setup(training: Training, cells: Sequence[CellName], threads: int) -> Setup:
    for cell in {cell.head: cell for cell in cells}.values():
        with torch.device("meta"):  # draws nothing and takes no memory: it is only asked what it reads
            model = build_head(training.spec(cell))
        if cell.head not in CLOSED_FORM:
            training.moments_for(model)
        training.rows_for(model)
    return Setup(
        cache=training.config["cache"],
        out=training.out,
        settings=replace(training.settings, device=str(training.device)),
        config=training.config,
        moments=training.moments,
        pooled=training.pooled,
        threads=threads,
    )


def _died(cell: CellName, code: int) -> RunError:
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
    return RunError(
        f"the process that trained {cell} {how}; finished cells are kept: run the same command again. If memory ran "
        "out, --workers 1 takes less"
    )
