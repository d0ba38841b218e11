"""Everything `relish train` can be told."""

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

from ..cache.errors import SettingsError, refuse_scalars
from ..cache.manifest import TRAIN

HEADS = {
    "relish": "latent state with refinement steps",
    "linear": "linear layer on the mean of the hidden states",
    "linear-last": "linear layer on the last token",
    "mlp": "MLP on the mean, as many parameters as relish at depth 3",
    "mlp-last": "the same MLP on the last token",
    "attention": "attention pooling with one learned query, then a linear layer",
    "ridge": "ridge regression on the last token, closed form",
    "ridge-mean": "ridge regression on the mean, closed form",
}
"""Heads by name, and what each is."""

CLOSED_FORM = ("ridge", "ridge-mean")
LOSSES = ("huber", "mse")
BEST_BY = ("nrmse", "pearson")
LEARNING_RATES = {
    "relish": 3e-4,
    "linear": 1e-3,
    "linear-last": 3e-3,
    "mlp": 3e-4,
    "mlp-last": 3e-4,
    "attention": 1e-2,
}
WEIGHT_DECAYS = {"relish": 9.0, "linear": 9.0, "linear-last": 3.0, "mlp": 27.0, "mlp-last": 27.0, "attention": 3.0}
"""These and the rates above: each head's own, by the same search for each on validation rows of several pairs of data
set and LLM, and again once weights were averaged (benchmarks/recipe-log.md, "The same budget for every head")."""
DECAY_ROWS = 1_000
"""Rows that these weight decays are for. On more they are less, in proportion: as a ridge penalty's, their share of the
loss falls with the rows (benchmarks/recipe-log.md, "Weight decay and rows"; Wang and Aitchison, arXiv 2405.13698)."""
EPOCHS, LEAST_SEEN = 5, 10_000
"""Heads learn in five epochs, and from few rows in as many as it takes to see 10,000 (benchmarks/recipe-log.md)."""
AVERAGING_POWER, AVERAGE_EVERY = 8.0, 8
"""What predicts is an average of a head's weights over its steps, the later ones by the power more (train/average.py);
every so many steps are looked at, which costs an eighth and gives the same (benchmarks/recipe-log.md)."""
STEP_SCALE = 0.1
"""What a refinement step of relish adds to the latent state begins at so small a share of torch's usual weights."""

_LONGEST_RANGE = 10_000

MIX: Final = "mix"
"""In place of a layer's index: a mix of all layers of the cache, learned with the head (train/mix.py)."""
MIX_LEARNING_RATE = 1e-2
"""Of the weights of a mix, whatever the head's own: at a rate of 1e-4 they would end where they begin."""
Layer = int | Literal["mix"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """A grid of heads × depths × seeds, and the recipe they all share."""

    heads: tuple[str, ...] = ("relish",)
    """Names of HEADS."""
    depths: tuple[int, ...] = (3,)
    """Refinement steps of relish; other heads have none and are trained once per seed."""
    seeds: tuple[int, ...] = (0,)
    """Each seed draws weights and batches anew. Ridge has nothing to draw and is fitted once."""

    epochs: int | None = None
    """Passes over the training rows, at most; None for 5, and on fewer than 2,000 rows for as many as it takes to see
    10,000: 20 on 500."""
    lr: float | None = None
    """Highest learning rate of AdamW; None for each head's own (LEARNING_RATES)."""
    batch_size: int = 16
    """Rows per step."""
    loss: str = "mse"
    """mse or huber (δ = 1), on standardised targets. Huber predicts the median rather than the mean, which NRMSE and
    skewed labels, such as those of translation quality, do not forgive."""
    weight_decay: float | None = None
    """AdamW's decoupled weight decay; None for each head's own (WEIGHT_DECAYS), less on more than 1,000 rows."""
    dropout: float = 0.0
    """On the attention's, the FFN's and the MLP's output."""
    warmup: float = 0.05
    """Share of all steps in which the learning rate rises; then it falls to 0 along a cosine."""
    best_by: str = "nrmse"
    """Validation figure that chooses the epoch whose weights are kept: the lowest nrmse or the highest pearson. Where
    the validation labels lie elsewhere or closer together than the training labels, NRMSE prefers weights that have
    learned little. Depths and ridge's penalty are chosen by NRMSE all the same."""
    patience: int | None = None
    """Epochs in which that figure has not improved, before a cell stops. None for three fifths of the epochs."""
    standardise: bool = True
    """Scale each dimension of the hidden states to mean 0 and deviation 1 over a sample of the training tokens."""

    latent_size: int = 256
    """Width of the latent state."""
    num_heads: int = 8
    """Attention heads."""
    layer: Layer | None = None
    """Which of the cache's layers, or "mix" for a learned mix of them all; may be None when there is but one."""

    val_split: str | None = None
    """Split that early stopping looks at. None: the first of validation, val, dev and trial that the cache has,
    otherwise rows held out of the training split."""
    val_fraction: float = 0.1
    """Share of the training rows held out when there is no validation split, the same for all cells."""
    device: str = "auto"
    """cuda, mps, cpu, or auto for the first of these that is there."""
    workers: int | None = None
    """Processes that train cells at once; 1 trains in the calling process. None: on the CPU as many as there are cores
    for, at most one per cell, and fewer when there are too few steps to be worth a start of seconds; on cuda and mps 1.
    Each takes some 550 MB at D = 576."""
    threads: int | None = None
    """CPU threads of each process; None for torch's choice, divided by the processes that the grid takes. The same
    number gives the same weights."""

    def __post_init__(self) -> None:
        refuse_scalars(self, "heads", "depths", "seeds")
        for name, values in (("heads", self.heads), ("seeds", self.seeds), ("depths", self.depths)):
            if not values:
                raise SettingsError(f"the grid is empty: {name} has no value")
            if len(set(values)) != len(values):
                raise SettingsError(f"{name} names a value twice: {', '.join(map(str, values))}")
        for head in self.heads:
            if head not in HEADS:
                raise SettingsError(f"there is no head {head!r}; there are {', '.join(HEADS)}")
        if isinstance(self.layer, str) and self.layer != MIX:
            raise SettingsError(f"layer must be an index or {MIX!r}, not {self.layer!r}")
        solved = [head for head in self.heads if head in CLOSED_FORM]
        if self.layer == MIX and solved:
            raise SettingsError(
                f"{' and '.join(solved)} cannot learn a mix of layers, being solved in closed form; name one layer, or "
                f"take heads that can: {', '.join(head for head in HEADS if head not in CLOSED_FORM)}"
            )
        if self.loss not in LOSSES:
            raise SettingsError(f"loss must be one of {', '.join(LOSSES)}, not {self.loss!r}")
        if self.best_by not in BEST_BY:
            raise SettingsError(f"best_by must be one of {', '.join(BEST_BY)}, not {self.best_by!r}")
        for name in ("epochs", "batch_size", "patience", "latent_size", "num_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be at least 1, not {value}")
        if min(self.depths) < 1:
            raise SettingsError(f"a depth is at least 1, not {min(self.depths)}")
        if min(self.seeds) < 0:
            raise SettingsError(f"a seed is at least 0, not {min(self.seeds)}")
        if max(self.seeds) >= 2**63:
            raise SettingsError(f"a seed is below 2**63, not {max(self.seeds)}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise SettingsError(f"lr must be a number above 0, not {self.lr}")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise SettingsError(f"weight_decay must be a number from 0 on, not {self.weight_decay}")
        if self.latent_size % self.num_heads:
            raise SettingsError(
                f"latent_size must be a multiple of num_heads, not {self.latent_size} with {self.num_heads}"
            )
        for name in ("dropout", "warmup", "val_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if self.val_split is None and self.val_fraction == 0:
            raise SettingsError(
                "early stopping needs validation rows: val_fraction must be above 0, or name a val_split"
            )
        if self.val_split == TRAIN:
            raise SettingsError(
                f"heads cannot be chosen by the rows that they learn from: leave out val_split {TRAIN!r}; some of the "
                "training rows are held out where there is no validation split"
            )
        for name in ("workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be at least 1, not {value}")


def with_later_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run or cell as they were saved, and what was done before there was a choice."""
    return {"best_by": "nrmse", **settings}


def parse_layer(text: str | None) -> Layer | None:
    """Read `15` or `mix`; None stays None.

    Raises:
        SettingsError: for anything else.
    """
    if text == MIX:
        return MIX
    try:
        return None if text is None else int(text)
    except ValueError:
        raise SettingsError(f"--layer takes an index such as 15, or {MIX}; not {text!r}") from None


def parse_range(text: str, what: str) -> tuple[int, ...]:
    """Read `3`, `1-5`, `0,2,7` or a mix of these.

    Raises:
        SettingsError: for anything else, naming `what`.
    """
    values: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        try:
            found = range(int(low), int(high if dash else low) + 1)
        except ValueError:
            raise SettingsError(f"{what} takes numbers and ranges such as 0,2,7 or 1-5; not {text!r}") from None
        if not found:
            raise SettingsError(f"the grid is empty: {what} {part.strip()!r} holds no number")
        if found[-1] - found[0] >= _LONGEST_RANGE:
            raise SettingsError(f"{what} {part.strip()!r} holds more than {_LONGEST_RANGE:,} numbers; shorten it")
        values += found
    return tuple(values)
