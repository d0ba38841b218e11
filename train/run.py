"""A run folder: one trained head with its settings, history and figures. It appears whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cache.errors import RunError
from ..cache.fileio import sync_folder
from ..cache.identity import Identity
from ..cache.jsonfile import read_versioned
from .heads import Head, HeadSpec, build_head, count_parameters

FORMAT = "relish run"
VERSION = 1


@dataclass(frozen=True)
class Run:
    """A finished run folder, weights not loaded."""

    path: Path
    head: HeadSpec
    seed: int
    parameters: int
    """Trainable numbers of the head."""
    layer: int
    """Which hidden states it reads."""
    label_range: tuple[float, float]
    cache: Path
    """Where the cache was when the head was trained."""
    identity: Identity
    """What made that cache."""
    task: str | None
    """The preset of that cache, None for custom data."""
    settings: dict[str, Any]
    """The recipe: TrainSettings without the grid."""
    train_rows: int
    data: dict[str, str]
    """Which rows it saw: fingerprints of the training and validation split, and the latter's name."""
    metrics: dict[str, Any]
    """metrics.json: validation figures, epochs, seconds."""


def run_name(head: str, depth: int, seed: int) -> str:
    """Name of a cell's folder; depth 0 for heads without one."""
    return f"{head}-L{depth}-seed{seed}"


def save_run(
    path: Path, head: Head, *, config: dict[str, Any], history: Sequence[Any], metrics: dict[str, Any]
) -> None:
    """Write a run folder under a hidden name and rename it, so that a run that exists is complete."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.tmp")
    discard(temporary)
    temporary.mkdir(parents=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    save_file(state, temporary / "model.safetensors")
    _write(temporary / "config.json", json.dumps({"format": FORMAT, "version": VERSION, **config}, indent=2) + "\n")
    _write(temporary / "history.jsonl", "".join(_line(asdict(record)) for record in history))
    _write(temporary / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    for file in temporary.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    sync_folder(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


def discard(temporary: Path) -> None:
    """Remove what a killed training left."""
    if temporary.exists():
        shutil.rmtree(temporary)


def load_run(path: str | Path) -> Run:
    """Read a run folder's settings.

    Raises:
        RunError: if it is no run folder, is damaged, or another version wrote it.
    """
    path = Path(path)
    try:
        config = read_versioned(
            path / "config.json", format=FORMAT, version=VERSION, again="train again", error=RunError
        )
    except FileNotFoundError:
        cells = [run.name for run in cell_folders(path)]
        hint = f"; it holds {len(cells)} runs, name one: {path / cells[0]}" if cells else ""
        raise RunError(f"{path} is no run folder: it has no config.json{hint}") from None
    try:
        metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path / 'metrics.json'} cannot be read ({error}); train the run again") from None
    try:
        return Run(
            path=path,
            head=HeadSpec(**config["head"]),
            seed=int(config["seed"]),
            parameters=config["parameters"],
            layer=config["layer"],
            label_range=(config["label_range"][0], config["label_range"][1]),
            cache=Path(config["cache"]),
            identity=Identity.from_json(config["identity"]),
            task=config["task"],
            settings=dict(config["settings"]),
            train_rows=config["train_rows"],
            data=dict(config["data"]),
            metrics=metrics,
        )
    except KeyError as error:
        raise RunError(f"the run {path} is damaged: its config.json lacks {error}; train it again") from None
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise RunError(
            f"the run {path} is damaged: its config.json holds something else ({error}); train it again"
        ) from None


def find_runs(runs: str | Path) -> list[Run]:
    """The finished runs in a folder, by head, depth and seed; the folder may itself be a run.

    Raises:
        RunError: if there is none.
    """
    runs = Path(runs)
    if (runs / "config.json").exists():
        return [load_run(runs)]
    found = [load_run(path) for path in cell_folders(runs)]
    if not found:
        raise RunError(f"there is no trained head in {runs}; make some with: relish train CACHE --out {runs}")
    return sorted(found, key=lambda run: (run.head.name, run.head.depth, run.seed))


def load_head(run: "str | Path | Run") -> Head:
    """Load a trained head, in eval mode: `head(hidden, mask) -> (B,)`, in the unit of the labels.

    Weights come from safetensors; pickle is never read.

    Raises:
        RunError: if the weights are missing, damaged, or do not fit the settings.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not isinstance(run, Run):
        run = load_run(run)
    path = run.path / "model.safetensors"
    head = build_head(run.head)
    try:
        head.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise RunError(f"the run {run.path} has no model.safetensors; train it again") from None
    except SafetensorError as error:
        raise RunError(f"{path} is damaged ({error}); train it again") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{path} does not fit the settings in config.json ({reason}); train it again") from None
    if count_parameters(head) != run.parameters or not all(
        value.isfinite().all() for value in head.state_dict().values()
    ):
        raise RunError(f"{path} holds NaN or another number of weights than config.json says; train it again")
    return head.eval()


def cell_folders(runs: Path) -> list[Path]:
    """The folders in `runs` that are named as run folders."""
    if not runs.is_dir():
        return []
    return sorted(path for path in runs.iterdir() if re.fullmatch(r"[a-z].*-L\d+-seed\d+", path.name))


def _line(record: dict[str, Any]) -> str:
    # JSON has no NaN, which is the correlation of constant predictions.
    return json.dumps({name: None if value != value else value for name, value in record.items()}) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
