"""All that changes while an adapter is tuned, and the one file it is saved in: a kill loses what came after it."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.errors import AdapterError
from ..cache.fileio import write_durably, writing_cache

_FORMAT = "relish tuning 1"


@dataclass(frozen=True)
class EpochRecord:
    """One epoch."""

    epoch: int
    """Counted from 1."""
    loss: float
    """Mean over the training rows."""
    val_nrmse: float
    val_pearson: float | None
    """None where predictions are constant."""
    seconds: float
    """Of training and validation."""


@dataclass
class TuneState:
    """Weights, optimiser and progress. What a step draws depends on seed and step alone, so no generator is in it."""

    parameters: dict[str, nn.Parameter]
    """All that is trained, by name."""
    optimizer: torch.optim.Optimizer
    """Over these parameters in this order."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Their values after the best epoch so far, on the CPU; none before the first is done."""
    step: int = 0
    """Steps taken."""
    loss_sum: float = 0.0
    """Over the rows of the epoch at work."""
    epoch_seconds: float = 0.0
    """Spent on it."""
    history: list[EpochRecord] = field(default_factory=list)

    @property
    def best_epoch(self) -> EpochRecord | None:
        """The first with the lowest validation NRMSE."""
        return min(self.history, key=lambda record: record.val_nrmse, default=None)

    def keep_best(self) -> None:
        """Take the weights as they are now."""
        self.best = {name: value.detach().cpu().clone() for name, value in self.parameters.items()}

    def restore_best(self) -> None:
        """Give the parameters the best epoch's values."""
        with torch.no_grad():
            for name, value in self.best.items():
                self.parameters[name].copy_(value)

    def save(self, path: Path, setup: dict[str, Any]) -> None:
        """Write everything, durably and at once.

        Args:
            path: the file.
            setup: what the tuning depends on, to compare when it goes on.

        Raises:
            AdapterError: if it cannot be written; the one before is then still there.
        """
        from safetensors.torch import save

        slots = self.optimizer.state_dict()["state"]
        tensors = {f"best/{name}": value for name, value in self.best.items()}
        for number, (name, value) in enumerate(self.parameters.items()):
            tensors[f"now/{name}"] = value.detach().cpu().contiguous()
            for slot, content in slots.get(number, {}).items():
                tensors[f"{slot}/{name}"] = content.detach().cpu().contiguous()
        progress = {
            "setup": setup,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "epoch_seconds": self.epoch_seconds,
            "history": [asdict(record) for record in self.history],
        }
        text = json.dumps(progress, ensure_ascii=True)
        seal = {"format": _FORMAT, "progress": text, "sha256": _digest(text, tensors)}
        with writing_cache(path, "the checkpoint before it is kept", AdapterError):
            write_durably(path, save(tensors, seal))

    def load(self, path: Path) -> None:
        """Go back to what a file holds, which `saved_setup` has read before: of the same parameters.

        Raises:
            AdapterError: if it is damaged, or of other parameters.
        """
        progress, tensors = _read(path)
        there = {name.removeprefix("now/") for name in tensors if name.startswith("now/")}
        if there != set(self.parameters):
            other = min(there ^ set(self.parameters))
            raise AdapterError(
                f"{path} is of other weights ({other} is on one side alone), as other versions of peft or transformers "
                f"name them; take the versions it was begun with, or {_way_out(path)}"
            )
        slots: dict[int, dict[str, Tensor]] = {}
        self.best = {}
        with torch.no_grad():
            for number, (name, parameter) in enumerate(self.parameters.items()):
                for key in [key for key in tensors if key.endswith(f"/{name}")]:
                    slot, value = key.partition("/")[0], tensors[key]
                    if slot == "now":
                        parameter.copy_(value)
                    elif slot == "best":
                        self.best[name] = value
                    else:
                        slots.setdefault(number, {})[slot] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.step, self.loss_sum = progress["step"], progress["loss_sum"]
        self.epoch_seconds = progress["epoch_seconds"]
        self.history = [EpochRecord(**record) for record in progress["history"]]


def saved_setup(path: Path) -> dict[str, Any]:
    """What a saved tuning depends on.

    Raises:
        AdapterError: if the file is damaged.
    """
    return _read(path)[0]["setup"]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            seal = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read ({error}); {_way_out(path)}") from None
    if seal.get("format") != _FORMAT or _digest(seal.get("progress", ""), tensors) != seal.get("sha256"):
        raise AdapterError(f"{path} is damaged, or another version of relish wrote it; {_way_out(path)}")
    return json.loads(seal["progress"]), tensors


def _way_out(path: Path) -> str:
    return f"delete {path.parent} and tune again"


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        total.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
