"""The progress bar of an extraction or a tuning: rows, tokens/s and time left."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class ExtractBar:
    """Progress on the terminal; on stderr, so that --json can be piped."""

    def __init__(self, what: str = "extract") -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn(what),
            BarColumn(),
            TextColumn("{task.fields[rows]:,}/{task.fields[of]:,} rows"),
            TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task: Any = None
        self._started = 0.0
        self._rows = self._tokens = 0

    def __enter__(self) -> "ExtractBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:  # a bar that never showed would still leave a blank line
            self._progress.stop()

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, rows: int, tokens: int) -> None:
        """Show the bar."""
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._rows = self._tokens = 0
        self._task = self._progress.add_task("", total=tokens, rows=0, of=rows, rate=0.0)
        self._started = time.monotonic()
        self._progress.start()

    def advance(self, rows: int, tokens: int) -> None:
        """Move it."""
        self._rows += rows
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        self._progress.update(self._task, advance=tokens, rows=self._rows, rate=rate)
        if self._progress.finished:  # now, so that what is printed next comes after it
            self._progress.stop()
            self._task = None
