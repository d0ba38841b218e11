"""The live table of a grid: one line per cell with loss, validation figures and time left."""

import heapq
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .loop import EpochRecord
from .progress import CellName

_FEW_STEPS = 400  # by itself a training takes 600
_ROWS = 30  # of a grid that is larger, cells in training stay on the screen
_JUST_ENDED = 5  # …and then so many that ended last


class LiveTable:
    """A `Listener` that shows the grid on the terminal; on a pipe it prints a line per finished cell."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status: dict[CellName, str] = {}
        self._records: dict[CellName, EpochRecord] = {}
        self._metrics: dict[CellName, dict[str, Any]] = {}
        self._steps: dict[CellName, int] = {}
        self._done: dict[CellName, int] = {}
        self._started = time.monotonic()
        self._began: dict[CellName, float] = {}
        self._busy = 0.0
        self._at_once = 1
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> "LiveTable":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live.is_started:  # a table that never showed would still leave a blank line
            self._live.stop()

    def plan(self, cells: list[CellName], steps: dict[CellName, int]) -> None:
        """Show the cells as waiting."""
        self._status = dict.fromkeys(cells, "waiting")
        self._steps = steps
        self._started = time.monotonic()
        most = max(steps.values(), default=0)
        if 1 < most < _FEW_STEPS:
            few = f"note: {most} steps per cell are few; a larger --epochs usually helps"
            self._console.print(few, highlight=False)
        if self._console.is_terminal:
            self._live.start()

    def start(self, cell: CellName) -> None:
        """Show a cell as training."""
        self._status[cell] = "training"
        self._began[cell] = time.monotonic()
        self._at_once = max(self._at_once, len(self._began))

    def step(self, cell: CellName, done: int) -> None:
        """Move its progress."""
        self._done[cell] = done

    def epoch(self, cell: CellName, record: EpochRecord) -> None:
        """Show its latest loss and validation figures."""
        self._records[cell] = record

    def end(self, cell: CellName, status: str, metrics: dict[str, Any]) -> None:
        """Show how it ended."""
        self._status[cell] = status
        if cell in self._began:
            self._busy += time.monotonic() - self._began.pop(cell)
        self._metrics[cell] = metrics
        self._steps[cell] = self._done.get(cell, self._steps[cell])
        self._done[cell] = self._steps[cell]
        if not self._console.is_terminal:
            figures = metrics.get("val", {})
            shown = "".join(
                f", val {name} {figures[key]:.4f}"
                for name, key in (("NRMSE", "nrmse"), ("Pearson", "pearson"))
                if figures.get(key) is not None
            )
            self._console.print(f"{cell}: {status}{shown}", highlight=False)

    def _render(self) -> Table:
        table = Table("head", "depth", "seed", "epoch", "loss", "val NRMSE", "val Pearson", "", box=None)
        cells = self._shown()
        for cell in cells:
            table.add_row(*self._row(cell))
        table.caption = self._time_left()
        return table

    def _shown(self) -> list[CellName]:
        cells, ended = list(self._status), list(self._metrics)
        if len(cells) <= _ROWS:
            return cells
        first = [*self._began, *ended[-_JUST_ENDED:]]
        waiting = [cell for cell in cells if self._status[cell] == "waiting"]
        kept = set(list(dict.fromkeys([*first, *waiting, *reversed(ended)]))[:_ROWS])
        return [cell for cell in cells if cell in kept]

    def _row(self, cell: CellName) -> list[str]:
        status, record = self._status[cell], self._records.get(cell)
        figures = self._metrics.get(cell, {}).get("val")
        if figures is None and record is not None:
            figures = {"nrmse": record.val_nrmse, "pearson": record.val_pearson}
        shown = [
            f"{figures[name]:.4f}" if figures and figures[name] is not None else "" for name in ("nrmse", "pearson")
        ]
        if status == "training" and self._steps[cell]:
            status = f"{self._done.get(cell, 0) / self._steps[cell]:.0%}"
        loss = [str(record.epoch), f"{record.loss:.4f}"] if record is not None else ["", ""]
        depth = str(cell.depth) if cell.depth else "–"
        return [cell.head, depth, str(cell.seed), *loss, *shown, status]

    def _time_left(self) -> str:
        total, done = sum(self._steps.values()), sum(self._done.values())
        if not done or not total:
            return ""
        now, began_at = time.monotonic(), dict(self._began)  # another thread adds to it
        pace = (self._busy + sum(now - began for began in began_at.values())) / done
        # Cells go to whichever process is free next. Near the end some have nothing to do, so the rate of all is no
        # measure of what is left.
        left = {cell: (steps - self._done.get(cell, 0)) * pace for cell, steps in self._steps.items()}
        free = sorted(left.pop(cell) for cell in began_at)
        free = [0.0] * (self._at_once - len(free)) + free
        for seconds in left.values():
            heapq.heapreplace(free, free[0] + seconds)
        return f"{done / total:.0%}, {now - self._started:,.0f} s spent, at most {max(free):,.0f} s left"
