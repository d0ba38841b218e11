"""The cells of a grid by name, and who hears of their progress."""

from dataclasses import dataclass
from typing import Any, Protocol

from .loop import EpochRecord
from .run import run_name


@dataclass(frozen=True)
class CellName:
    """Where a cell stands in the grid; depth 0 for heads without one."""

    head: str
    depth: int
    seed: int

    def __str__(self) -> str:
        return run_name(self.head, self.depth, self.seed)


class Listener(Protocol):
    """What `train_heads` reports to while it works, always from the thread that called it.

    Several cells may be in training at once: what is heard of one is in order, what is heard of two is interleaved.
    """

    def plan(self, cells: list[CellName], steps: dict[CellName, int]) -> None:
        """The cells of the grid, and the most steps each may take (0 if it is there already)."""

    def start(self, cell: CellName) -> None:
        """A cell begins."""

    def step(self, cell: CellName, done: int) -> None:
        """So many steps of it are done; from a process of its own, not every step is told."""

    def epoch(self, cell: CellName, record: EpochRecord) -> None:
        """An epoch of it is done."""

    def end(self, cell: CellName, status: str, metrics: dict[str, Any]) -> None:
        """It is done: "done", "there already" or "diverged"."""
