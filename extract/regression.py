"""The linear regression head that is trained with an adapter (`relish tune --method lora`)."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.errors import AdapterError
from .adapter import Adapter
from .backbone import Backbone
from .tree import Tokens, last_tokens, plant, takes_trees, tree_states

HEAD = "head.safetensors"
_WAY_OUT = "restore it from a copy, or tune again into another folder"


class RegressionHead(nn.Module):
    """ŷ = mean + std · (w·h + b), with h the final hidden state of the last real token.

    w and b begin at zero, so that the first prediction is the mean of the labels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (B, T, D) and mask (B, T), True = real token, to (B,), in the unit of the labels."""
        last = mask.long().cumsum(dim=1).argmax(dim=1)
        state = hidden[torch.arange(len(hidden), device=hidden.device), last].float()
        return self.mean + self.std * (state @ self.weight + self.bias)


def regress(head: RegressionHead, model: Any, backbone: Backbone, rows: Sequence[np.ndarray]) -> Tensor:
    """What a head predicts from what an LLM makes of B rows; what these begin with is read once.

    Args:
        head: on the LLM's device.
        model: the causal LM.
        backbone: it belongs to.
        rows: B arrays of token ids.

    Returns:
        (B,) float32 in the unit of the labels.
    """
    # A row alone has nothing to share, and masks of a tree grow with the square of its length.
    if len(rows) == 1 or not takes_trees(model):
        return head(*backbone.last_states(model.base_model, rows))
    trunk, own = plant(rows)
    states = tree_states(model.base_model, Tokens.join([trunk, *own]), last_tokens(trunk, own))[:, None]
    return head(states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device))


def load_regression_head(adapter: Adapter) -> tuple[RegressionHead, str]:
    """The head that was trained with an adapter, and the sha256 of its file.

    Raises:
        AdapterError: if it has none, or it is damaged.
    """
    from safetensors.torch import load

    sha256 = adapter.tuned["sha256_of_head"] if adapter.tuned is not None else None
    if sha256 is None:
        raise AdapterError(f"the adapter {adapter.name} has no regression head; relish tune --method lora makes one")
    path = adapter.folder / HEAD
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}); {_WAY_OUT}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise AdapterError(f"{path} is damaged: it is not the file that was saved; {_WAY_OUT}")
    state = load(content)
    head = RegressionHead(len(state["weight"]))
    head.load_state_dict(state)
    return head.eval(), sha256
