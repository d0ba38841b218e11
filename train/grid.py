"""`train_heads`: a grid of heads × depths × seeds from one cache, resumable, several cells at once."""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..cache.errors import RunError
from ..cache.lock import lock_folder
from .cell import Training, open_training, train_cell
from .cores import available_cores
from .known import discard_other_diverged, known_cells
from .progress import CellName, Listener
from .run import Run, discard_unfinished
from .settings import CLOSED_FORM, TrainSettings
from .workers import train_in_processes

_WORTH = 300  # steps that a process must have to take before it makes up for its start


@dataclass(frozen=True)
class GridResult:
    """What became of each cell."""

    folder: Path
    cells: dict[CellName, dict[str, Any]] = field(default_factory=dict)
    """Validation figures (metrics.json) of the cells that were trained or were there already."""
    diverged: list[CellName] = field(default_factory=list)
    """Cells whose loss was no longer finite, now or in an earlier training with the same settings. In place of a run
    folder they have a file `<cell>.diverged.json`; without it a cell is tried again."""


def train_heads(
    cache: str | Path, out: str | Path, settings: TrainSettings | None = None, *, listener: Listener | None = None
) -> GridResult:
    """Train every cell of a grid; cells that are there already are kept.

    On the CPU several cells are trained at once, each in a process of its own (`TrainSettings.workers`). The processes
    share the system's cache of the shards and what is computed once: the moments of the hidden states, and what rows
    pool to, in files in `out` while this runs. Each opens the cache, and has its own interpreter, head, optimiser and
    batches.

    On the CPU, with the same number of threads, a cell's weights are the same bit for bit whether it is trained alone
    or in any grid, here or in any number of processes: each cell draws from a generator of its own, and cells share
    nothing but what was computed from the rows.

    Args:
        cache: folder of the cache.
        out: folder for the run folders.
        settings: grid and recipe; None for the defaults.
        listener: hears of progress; None for silence.

    Raises:
        CacheError: if the cache cannot be used.
        DataError: if rows have no label, or nothing tells the best epoch.
        RunError: if `out` holds runs of another cache or another recipe, or a process that trained a cell was killed.
        SettingsError: if the device is not there.
    """
    settings = settings or TrainSettings()
    out = Path(out).absolute()  # so that a later chdir does not move it
    training = open_training(cache, out, settings)
    config = training.config
    grid = grid_cells(settings)
    known = known_cells(out, config, settings)  # before a folder is made
    work = any(cell not in known for cell in grid)
    with lock_folder(out, RunError) if work else nullcontext():
        if work:
            known = known_cells(out, config, settings)  # another process may have been at work until now
            discard_unfinished(out)
            discard_other_diverged(out, config, settings)
        if listener is not None:
            listener.plan(grid, {cell: 0 if cell in known else training.steps(cell) for cell in grid})
        there = {cell: run.metrics if isinstance(run, Run) else None for cell, run in known.items()}
        ended: dict[CellName, dict[str, Any] | None] = {}
        with closing(_train(grid, there, training, listener)) as outcomes:
            for cell, metrics in outcomes:
                ended[cell] = metrics
                if listener is not None:
                    status = "diverged" if metrics is None else "there already" if cell in there else "done"
                    listener.end(cell, status, metrics or {})
    finished = {cell: metrics for cell in grid if (metrics := ended[cell]) is not None}
    return GridResult(out, finished, [cell for cell in grid if cell not in finished])


def grid_cells(settings: TrainSettings) -> list[CellName]:
    """The cells of a grid: relish at each depth, others once per seed, ridge once, as seed 0."""
    cells = []
    for head in settings.heads:
        depths = settings.depths if head == "relish" else (0,)
        seeds = (0,) if head in CLOSED_FORM else settings.seeds
        cells += [CellName(head, depth, seed) for depth in depths for seed in seeds]
    return cells


def _train(
    grid: list[CellName],
    there: dict[CellName, dict[str, Any] | None],
    training: Training,
    listener: Listener | None,
) -> Generator[tuple[CellName, dict[str, Any] | None], None, None]:
    """Each cell with its metrics, or None if it diverged, as it ends."""
    left = [cell for cell in grid if cell not in there]
    processes = _processes(training, grid)
    threads = _threads_each(training.settings, processes)
    with _threads(threads):
        yield from ((cell, there[cell]) for cell in grid if cell in there)
        if not left:
            return
        if min(processes, len(left)) <= 1:
            try:
                for cell in left:
                    yield cell, train_cell(training, cell, listener)
            finally:
                training.pooled.clear()  # a file that is mapped can not be removed on Windows
                discard_unfinished(training.out)
            return
        costliest_first = sorted(left, key=lambda cell: (cell.head in CLOSED_FORM, -cell.depth))
        with closing(
            train_in_processes(training, costliest_first, listener, min(processes, len(left)), threads)
        ) as outcomes:
            yield from outcomes


def _processes(training: Training, grid: list[CellName]) -> int:
    """How many processes the whole grid is worth.

    Of the whole grid, not of what is left of it: threads follow from it, and weights from threads, so a training that
    was interrupted ends with the weights of one that was not.
    """
    settings = training.settings
    if settings.workers is not None:
        return min(settings.workers, len(grid))
    if training.device.type != "cpu":
        return 1
    worth = sum(training.steps(cell) for cell in grid) // _WORTH
    return max(1, min(available_cores() // (settings.threads or 1), len(grid), worth))


def _threads_each(settings: TrainSettings, processes: int) -> int:
    """Threads of each process: those that torch would take, as far as there are cores, divided among them."""
    return settings.threads or max(1, min(torch.get_num_threads(), available_cores()) // processes)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Set torch's threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
