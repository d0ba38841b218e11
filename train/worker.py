"""A process that trains the cells it is handed: the other end of train/workers.py.

It reads a `Setup` and then cells from stdin, and answers with (what, …) on stdout: "start", "step" and "epoch" as a
`Listener` hears them, "outcome" with the metrics, "error" with an exception and its traceback.
"""

import os
import pickle
import queue
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from .loop import EpochRecord
    from .progress import CellName

_EVERY = 0.1  # seconds between two steps told: a pipe is never what a training waits for


def main() -> None:
    """Work until stdin ends, which it does when the parent ends, however that comes about."""
    try:
        answers = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # whatever prints must not print among the answers
        _work(answers)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)  # a thread is still reading stdin, and an interpreter that ends would wait for it


def _work(answers: BinaryIO) -> None:
    import torch  # before the thread below reads what needs it: two threads must not import the same modules

    from ..cache.errors import CacheError
    from .cell import open_training, train_cell

    inbox: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_read, args=(inbox,), daemon=True).start()
    setup = inbox.get()
    events = _Events(answers)
    try:
        torch.set_num_threads(setup.threads)
        training = open_training(setup.cache, setup.out, setup.settings)
        if training.config != setup.config:
            raise CacheError(f"the cache {setup.cache} was changed by another process; run the command again")
        training.moments.update(setup.moments)
        training.pooled.update(setup.pooled)
        while True:
            cell = inbox.get()
            metrics = train_cell(training, cell, events)
            events.send("outcome", cell, metrics)
    except Exception as error:
        events.send_error(error, traceback.format_exc())
    while True:
        inbox.get()  # until the end


def _read(inbox: "queue.Queue[Any]") -> None:
    try:
        while True:
            inbox.put(pickle.load(sys.stdin.buffer))
    except BaseException:
        # The parent is gone and so is its lock on the folder: another training may begin to write there.
        os._exit(1)


class _Events:
    """The `Listener` of this process: passes on what it hears."""

    def __init__(self, answers: BinaryIO) -> None:
        self._answers = answers
        self._next = 0.0
        self._held: tuple[CellName, int] | None = None

    def send(self, *message: object) -> None:
        """Tell the parent."""
        self._put(pickle.dumps(message))

    def send_error(self, error: Exception, text: str) -> None:
        """Tell it of an error, as itself if it can be pickled and read again, else by its text."""
        try:
            content = pickle.dumps(("error", error, text))
            pickle.loads(content)
        except Exception:
            content = pickle.dumps(("error", RuntimeError(f"{type(error).__name__}: {error}"), text))
        self._put(content)

    def start(self, cell: "CellName") -> None:
        """A cell begins."""
        self.send("start", cell)

    def step(self, cell: "CellName", done: int) -> None:
        """A step of it is done."""
        now = time.monotonic()
        if now < self._next:
            self._held = cell, done
            return
        self._next, self._held = now + _EVERY, None
        self.send("step", cell, done)

    def epoch(self, cell: "CellName", record: "EpochRecord") -> None:
        """An epoch of it is done."""
        if self._held is not None:
            self.send("step", *self._held)
            self._held = None
        self.send("epoch", cell, record)

    def plan(self, cells: "list[CellName]", steps: "dict[CellName, int]") -> None:
        """The parent has told it already."""

    def end(self, cell: "CellName", status: str, metrics: dict[str, Any]) -> None:
        """The parent tells it, from the outcome."""

    def _put(self, content: bytes) -> None:
        try:
            self._answers.write(content)
            self._answers.flush()
        except OSError:
            os._exit(1)  # nobody listens any more
