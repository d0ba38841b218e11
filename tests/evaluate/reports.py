"""Report folders without any training, for the tests of the comparison."""

from pathlib import Path
from typing import Any

import numpy as np

from relish.evaluate.files import write_results
from relish.evaluate.summary import CellPredictions, Results, summarise

ROWS = 80


def write_report(
    folder: Path,
    cells: dict[tuple[str, int, int], float],
    *,
    task: str | None = "stsb",
    model: str = "tiny",
    rows: int = ROWS,
    data: int = 0,
    label_range: tuple[float, float] = (0.0, 5.0),
    split: str = "test",
    meta: dict[str, Any] | None = None,
    extras: dict[tuple[str, int], dict[str, Any]] | None = None,
    status: dict[tuple[str, int, int], str] | None = None,
) -> Results:
    """Write results.json and predictions.csv of heads whose error is so large.

    Args:
        folder: of the report.
        cells: (head, depth, seed) to the standard deviation of its error, in the labels' unit; 0 predicts a constant.
        task: what the report says of its data set.
        model: what it says of its LLM.
        rows: N.
        data: another number is another data set.
        label_range: of the labels.
        split: name of the split.
        meta: more of what the report says.
        extras: by (head, depth), fields of CellPredictions; by default the validation NRMSE is the error itself.
        status: by cell, why it does not count.
    """
    rng = np.random.default_rng(data)
    low, high = label_range
    target = np.round(rng.uniform(low, high, rows), 2)
    given = []
    for number, ((head, depth, seed), error) in enumerate(cells.items()):
        noise = np.random.default_rng([data, number, seed]).normal(size=rows)
        values = target + error * noise if error else np.full(rows, (low + high) / 2)
        own = {"val_nrmse": error, "val_pearson": 1 - error, "train_seconds": 10.0, "seconds_per_1000_rows": 3.0}
        own |= (extras or {}).get((head, depth), {})
        why = (status or {}).get((head, depth, seed), "ok")
        parameters = 0 if head.startswith(("greedy", "rail")) else 1000 * (depth + 1)
        given.append(CellPredictions(head, depth, seed, parameters, values, why, **own))
    says = {"task": task, "model": model, "backbone parameters": "2,000,000", **(meta or {})}
    results = summarise(split, label_range, [f"r{i}" for i in range(rows)], range(rows), target, given, says)
    write_results(results, folder)
    return results


def grid(**errors: float) -> dict[tuple[str, int, int], float]:
    """`grid(relish1=0.5, mlp=0.9, ridge=1.0)`: cells of three seeds, of closed forms and answers of one."""
    cells = {}
    for name, error in errors.items():
        head = name.rstrip("0123456789").replace("_", "-")
        depth = int(name[len(head) :] or 0)
        for seed in (0,) if head in ("ridge", "greedy", "rail") else (0, 1, 2):
            cells[head, depth, seed] = error
    return cells
