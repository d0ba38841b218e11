"""How heads on a frozen LLM gain from training rows: the same validation and test rows, more and more of training.

    python benchmarks/rows.py WORK --data DATA --task wmt-si-en --backbone gemma3 --rows 500,2000,7000 --out rows.json
    python benchmarks/rows.py --small --out rows.json

DATA is that of comparison.py, and the rows are drawn as there. WORK keeps caches, runs and reports: the same command
goes on where it stopped.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from backbones import tiny_model
from commands import Step, run_all
from comparison import BACKBONES, FILES, draw_rows, small_rows
from comparison_plan import Plan, sourced
from measure import arguments, save, table


def steps(home: Path, model: Path, task: str, files: dict[str, Path], given: Any) -> list[Step]:
    """Extraction, training and evaluation with one number of training rows."""
    name, cache, runs = home.name, str(home / "cache"), str(home / "runs")
    source = sourced(model, task, files, Plan({}, compute=("--compute-dtype", given.compute_dtype)))
    grid = ["--head", given.heads, "--depths", given.depths, "--seeds", given.seeds, "--best-by", given.best_by]
    if given.weight_decay is not None:
        grid += ["--weight-decay", given.weight_decay]
    return [
        Step(f"extract-{name}", ["extract", cache, *source, "--layers", given.layer]),
        Step(f"train-{name}", ["train", cache, "--out", runs, *grid], (f"extract-{name}",)),
        Step(f"evaluate-{name}", ["evaluate", runs, "--out", str(home / "report")], (f"train-{name}",)),
    ]


def figures(report: Path) -> dict[str, dict[str, float]]:
    """Of each head: validation and test figures, means over the seeds."""
    found = {}
    for group in json.loads((report / "results.json").read_text(encoding="utf-8"))["groups"]:
        name = group["head"] + (f", L = {group['depth']}" if group["depth"] else "")
        found[name] = {metric: group[metric]["mean"] for metric in ("pearson", "spearman", "nrmse")}
        found[name] |= {f"{metric}_sd": group[metric]["sd"] for metric in ("pearson", "nrmse")}
        found[name]["val_nrmse"] = group["val_nrmse"]
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("work", type=Path, nargs="?", help="folder for caches, runs and reports")
    parser.add_argument("--data", type=Path, help="folder of the data sets; not needed with --small")
    parser.add_argument("--task", default="wmt-si-en", choices=FILES)
    parser.add_argument("--backbone", default="gemma3", choices=BACKBONES)
    parser.add_argument("--rows", default="500,2000,7000", help="training rows, several numbers")
    parser.add_argument("--val", type=int, default=250)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--layer", default="0.5")
    parser.add_argument("--heads", default="ridge-mean,mlp,attention,relish")
    parser.add_argument("--depths", default="3")
    parser.add_argument("--seeds", default="0-2")
    parser.add_argument("--weight-decay", help="of all heads, in place of each one's own; another WORK for each")
    parser.add_argument("--best-by", default="nrmse", help="as relish train has it; another WORK for each")
    parser.add_argument("--compute-dtype", default="auto")
    given = parser.parse_args()
    if (given.work is None or given.data is None) and not given.small:
        parser.error("give a folder to work in and --data, the folder of the data sets; or --small")
    work: Path = given.work or Path(tempfile.mkdtemp(prefix="rows-"))
    if given.small:
        given.rows, given.val, given.test, given.seeds, given.layer = "24,48", 8, 8, "0", "last"
        given.heads, given.depths = "ridge-mean,attention", "1"
        given.task, given.backbone = "stsb", "tiny"
    model = tiny_model(work / "model") if given.small else BACKBONES[given.backbone]()

    def drawn(split: str, count: int) -> Path:
        folder = work / "rows"
        if given.small:
            return small_rows(folder, split, count)
        return draw_rows(given.data / FILES[given.task][split], folder / f"{split}-{count}.csv", count)

    counts = [int(count) for count in given.rows.split(",")]
    plan: list[Step] = []
    for count in counts:
        files = {"train": drawn("train", count), "val": drawn("val", given.val), "test": drawn("test", given.test)}
        plan += steps(work / str(count), model, given.task, files, given)
    for _ in run_all(plan, work, 1):
        pass
    found = {count: figures(work / str(count) / "report") for count in counts}
    save(
        given.out,
        {
            "task": given.task,
            "backbone": given.backbone,
            "layer": given.layer,
            "weight_decay": given.weight_decay,
            "best_by": given.best_by,
            "rows": found,
        },
    )
    lines = [
        (
            name,
            *(
                f"{of[name]['pearson']:.3f} / {of[name]['spearman']:.3f} / {of[name]['nrmse']:.3f}"
                for of in found.values()
            ),
        )
        for name in next(iter(found.values()))
    ]
    print(table((f"{given.task}, {given.backbone}", *(f"{count:,} rows" for count in counts)), lines))


if __name__ == "__main__":
    main()
