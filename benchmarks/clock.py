"""A listener of `relish train` that takes the time."""

import time
from typing import Any


class Clock:
    """Notes when steps end and how long epochs take."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.epochs: list[float] = []

    def plan(self, cells: Any, steps: Any) -> None: ...

    def start(self, cell: Any) -> None: ...

    def step(self, cell: Any, done: int) -> None:
        self.steps.append(time.perf_counter())

    def epoch(self, cell: Any, record: Any) -> None:
        self.epochs.append(record.seconds)

    def end(self, cell: Any, status: str, metrics: Any) -> None: ...
