"""The live table when several cells are in training at once."""

import io

import pytest
from rich.console import Console

from relish.train import live
from relish.train.loop import EpochRecord
from relish.train.progress import CellName


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(live, "time", clock)
    return clock


def shown(table):
    console = Console(file=io.StringIO(), width=120)
    console.print(table._render())
    return console.file.getvalue()


def cells(count):
    return [CellName("relish", 1 + number % 5, number // 5) for number in range(count)]


def test_time_left_counts_cells_in_the_processes_that_take_them(clock):
    table, grid = live.LiveTable(), cells(3)
    table.plan(grid, dict.fromkeys(grid, 1000))
    assert "left" not in shown(table)
    for cell in grid[:2]:
        table.start(cell)
    clock.now = 10
    for cell in grid[:2]:
        table.step(cell, 500)
    # Both have 10 s to go, and then the third takes 20 s in one process alone.
    assert "33%, 10 s spent, at most 30 s left" in shown(table)
    clock.now = 20
    for cell in grid[:2]:
        table.step(cell, 1000)
        table.end(cell, "done", {})
    table.start(grid[2])
    assert "67%, 20 s spent, at most 20 s left" in shown(table)


def test_time_left_of_cells_one_after_another(clock):
    table, grid = live.LiveTable(), cells(4)
    table.plan(grid, {cell: 0 if cell == grid[0] else 100 for cell in grid})
    table.end(grid[0], "there already", {})
    table.start(grid[1])
    clock.now = 5
    table.step(grid[1], 50)
    assert "17%, 5 s spent, at most 25 s left" in shown(table)


def test_cells_in_training_are_on_the_screen_wherever_they_stand_in_the_grid(clock):
    table, grid = live.LiveTable(), cells(60)
    table.plan(grid, dict.fromkeys(grid, 10))
    order = sorted(grid, key=lambda cell: -cell.depth)
    for cell in order[:20]:
        table.start(cell)
        table.end(cell, "done", {"val": {"nrmse": 0.1, "pearson": 0.9}})
    for cell in (order[20], order[21]):
        table.start(cell)
        table.step(cell, 5)
    table.epoch(order[20], EpochRecord(1, 0.25, 0.2, 0.8, 1.0))
    text = shown(table)
    assert text.count("50%") == 2
    assert text.count("done") == 5
    assert text.count("waiting") == 23
    assert "0.2500" in text
