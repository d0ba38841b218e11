"""Everything `relish tune` can be told."""

import math
from dataclasses import dataclass

from ..cache.errors import SettingsError
from .settings import TextSettings, at_least_1, one_of

METHODS = {
    "lora": "a linear regression head on the last token's final hidden state, trained with the adapter",
    "raft": "squared error of the expected score under the LLM's own probabilities of the candidate answers",
}
"""Methods by name, and what each learns by."""

LOSSES = ("huber", "mse")


@dataclass(frozen=True, kw_only=True)
class TuneSettings(TextSettings):
    """A low-rank adapter on every linear layer of a causal LM's blocks, and how it is trained."""

    method: str
    """A name of METHODS."""
    rank: int = 8
    """r: width of the low-rank products."""
    alpha: int = 16
    """α: the products are scaled by α / r."""
    dropout: float = 0.05
    """On the input of the low-rank products, in training; drawn once for what all rows of a pass begin with."""

    epochs: int = 3
    """Passes over the training rows; the weights of the one with the lowest validation NRMSE are kept."""
    lr: float = 1e-3
    """Highest learning rate of AdamW."""
    batch_size: int = 16
    """Rows per step."""
    loss: str | None = None
    """Of the method lora: mse (what None stands for) or huber (δ = 1), on standardised targets."""
    rows: int | None = None
    """Train on so many rows only, drawn once and for all: the same ones for every seed."""
    seed: int = 0
    """Draws the first weights, the order of the rows and the dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("method", self.method, tuple(METHODS))
        at_least_1(self, "rank", "alpha", "epochs", "batch_size", "rows")
        if not 0 < self.lr < math.inf:
            raise SettingsError(f"lr must be a number above 0, not {self.lr}")
        if not 0 <= self.dropout < 1:
            raise SettingsError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not 0 <= self.seed < 2**63:
            raise SettingsError(f"a seed is at least 0 and below 2**63, not {self.seed}")
        if self.truncate and self.method == "raft":
            raise SettingsError("raft asks at the end of the prompt, where truncate cuts; leave --truncate out")
        if self.loss is not None:
            one_of("loss", self.loss, LOSSES)
            if self.method != "lora":
                raise SettingsError(f"the method {self.method} has a loss of its own; leave --loss out")

    @property
    def own_loss(self) -> str:
        """The loss it comes to."""
        return self.loss or "mse"
