"""A run folder: one trained head with its settings, history and figures. It appears whole or not at all.

config.json and metrics.json end with a hash of themselves, and config.json holds the hash of the weights: a bit that
flips in any of them is found before a number comes out.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cache.errors import CacheError, RunError
from ..cache.fileio import read_whole, sync_folder
from ..cache.identity import Identity
from ..cache.jsonfile import read_versioned, sealed_text
from .diverged import find_diverged
from .heads import Head, HeadSpec, build_head, count_parameters
from .saving import write_synced, writing
from .settings import MIX, Layer, with_later_settings

FORMAT = "relish run"
VERSION = 1
_METRICS_FORMAT = "relish run metrics"
_CELL = r"[a-z].*-L\d+-seed\d+"


@dataclass(frozen=True)
class Run:
    """A finished run folder, weights not loaded."""

    path: Path
    head: HeadSpec
    seed: int
    parameters: int
    """Trainable numbers of the head."""
    layer: Layer
    """Which hidden states it reads; "mix" for a learned mix of all of the cache's."""
    label_range: tuple[float, float]
    cache: Path
    """Where the cache was when the head was trained."""
    identity: Identity
    """What made that cache."""
    task: str | None
    """The preset of that cache, None for custom data."""
    settings: dict[str, Any]
    """The recipe: TrainSettings without the grid, and how many tokens at the beginning of a row are not read."""
    train_rows: int
    data: dict[str, str]
    """Which rows it saw: fingerprints of the training and validation split, and the latter's name."""
    weights_sha256: str
    """Of model.safetensors."""
    metrics: dict[str, Any]
    """metrics.json: validation figures, epochs, seconds; for a mix, the share of each layer."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose hidden states it reads, counted as transformers does."""
        return self.identity.layers if self.layer == MIX else (self.layer,)


def run_name(head: str, depth: int, seed: int) -> str:
    """Name of a cell's folder; depth 0 for heads without one."""
    return f"{head}-L{depth}-seed{seed}"


def save_run(
    path: Path, head: Head, *, config: dict[str, Any], history: Sequence[Any], metrics: dict[str, Any]
) -> None:
    """Write a run folder under a hidden name and rename it, so that a run that exists is complete.

    Raises:
        RunError: naming the file, if one cannot be written; nothing of the run is left then.
    """
    from safetensors.torch import save

    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()})
    config = {"format": FORMAT, "version": VERSION, **config, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    files = {
        "model.safetensors": weights,
        "config.json": sealed_text(config).encode(),
        "history.jsonl": "".join(_line(asdict(record)) for record in history).encode(),
        "metrics.json": sealed_text({"format": _METRICS_FORMAT, "version": VERSION, **metrics}).encode(),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    _discard(temporary)
    try:
        for name, content in files.items():
            with writing(path / name, "finished cells are kept"):
                temporary.mkdir(parents=True, exist_ok=True)
                write_synced(temporary / name, content)
        with writing(path, "finished cells are kept"):
            sync_folder(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
    except BaseException:
        _discard(temporary)
        raise


def discard_unfinished(runs: Path) -> None:
    """Remove what killed trainings left, and pooled rows; only for the one who holds the folder's lock."""
    for path in runs.iterdir():
        if re.fullmatch(rf"\.({_CELL}(\.diverged\.json)?|pooled-.*)\.tmp", path.name):
            _discard(path)


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def load_run(path: str | Path) -> Run:
    """Read a run folder's settings.

    Raises:
        RunError: if it is no run folder, is damaged, or another version wrote it.
    """
    path = Path(path)
    if path.is_file():
        diverged = " but the mark of a cell that diverged" if path.name.endswith(".diverged.json") else ""
        raise RunError(f"{path} is a file and no run folder{diverged}; leave it out")
    try:
        config = _read_sealed(path / "config.json", FORMAT)
    except FileNotFoundError:
        cells = [run.name for run in cell_folders(path)]
        if re.fullmatch(_CELL, path.name) and path.is_dir():
            raise RunError(f"the run {path} has no config.json; {_way_out(path)}") from None
        hint = (
            f"name one or several of its {len(cells)} runs, such as {path / cells[0]}"
            if cells
            else "name one that relish train made, such as runs/relish-L3-seed0"
        )
        raise RunError(f"{path} is no run folder: it has no config.json; {hint}") from None
    try:
        metrics = _read_sealed(path / "metrics.json", _METRICS_FORMAT)
    except FileNotFoundError:
        raise RunError(f"the run {path} has no metrics.json; {_way_out(path)}") from None
    try:
        return Run(
            path=path,
            head=HeadSpec(**config["head"], skip=config["settings"].get("skipped_tokens", 0)),
            seed=int(config["seed"]),
            parameters=config["parameters"],
            layer=config["layer"],
            label_range=(config["label_range"][0], config["label_range"][1]),
            cache=Path(config["cache"]),
            identity=Identity.from_json(config["identity"]),
            task=config["task"],
            settings=with_later_settings(config["settings"]),
            train_rows=config["train_rows"],
            data=dict(config["data"]),
            weights_sha256=str(config["weights_sha256"]),
            metrics={name: value for name, value in metrics.items() if name not in ("format", "version")},
        )
    except CacheError as error:
        raise RunError(f"the run {path} cannot be used: {error}") from None
    except KeyError as error:
        raise RunError(f"the run {path} is damaged: its config.json lacks {error}; {_way_out(path)}") from None
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise RunError(
            f"the run {path} is damaged: its config.json holds something else ({error}); {_way_out(path)}"
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
        lost = len(find_diverged(runs))
        raise RunError(
            f"there is no trained head in {runs}"
            + (f", only {lost} that diverged" if lost else "")
            + f"; make some with: relish train CACHE --out {runs}"
            + (" --lr X, X lower than before" if lost else "")
        )
    return sorted(found, key=lambda run: (run.head.name, run.head.depth, run.seed))


def load_head(run: "str | Path | Run") -> Head:
    """Load a trained head, in eval mode: `head(hidden, mask) -> (B,)`, in the unit of the labels.

    Weights come from safetensors; pickle is never read.

    Raises:
        RunError: if the weights are missing, damaged, or do not fit the settings.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not isinstance(run, Run):
        run = load_run(run)
    path = run.path / "model.safetensors"
    try:
        content = read_whole(path)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); {_way_out(run.path)}") from None
    if hashlib.sha256(content).hexdigest() != run.weights_sha256:
        raise RunError(f"{path} is damaged: it is not the file that was saved; {_way_out(run.path)}")
    head = build_head(run.head)
    try:
        head.load_state_dict(load(content))
    except SafetensorError as error:
        raise RunError(f"{path} is no safetensors file ({error}); {_way_out(run.path)}") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{path} does not fit the settings in config.json ({reason}); {_way_out(run.path)}") from None
    if count_parameters(head) != run.parameters or not all(
        value.isfinite().all() for value in head.state_dict().values()
    ):
        raise RunError(f"{path} holds NaN or another number of weights than config.json says; {_way_out(run.path)}")
    return head.eval()


def cell_folders(runs: Path) -> list[Path]:
    """The folders in `runs` that are named as run folders."""
    if not runs.is_dir():
        return []
    return sorted(path for path in runs.iterdir() if re.fullmatch(_CELL, path.name))


def _line(record: dict[str, Any]) -> str:
    # JSON has no NaN, which is the correlation of constant predictions.
    return json.dumps({name: None if value != value else value for name, value in record.items()}) + "\n"


def _read_sealed(path: Path, format: str) -> dict[str, Any]:
    return read_versioned(
        path,
        format=format,
        version=VERSION,
        again=f"delete {path.parent} and train again",
        error=RunError,
        sealed=True,
        mend=_way_out(path.parent),
    )


def _way_out(run: Path) -> str:
    return f"restore it from a copy, or delete {run} and train again"
