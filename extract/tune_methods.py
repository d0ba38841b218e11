"""What an adapter is trained for. A method is a function from rows to predictions; the loop is the same for all.

lora: a linear regression head on the last token's final hidden state. raft: regression-aware fine-tuning (Lukasik et
al., "Better autoregressive regression with LLMs via regression-aware fine-tuning", ICLR 2025), the expected score under
the LLM's own probabilities of the answers.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.errors import AdapterError
from .adapter import Adapter
from .backbone import Backbone
from .candidates import answer_nodes, score_candidates
from .shots import Prompts
from .tree import Tokens, last_tokens, plant, takes_trees, tree_states

HEAD = "head.safetensors"


@dataclass(frozen=True)
class Method:
    """How rows become predictions, and what their errors are divided by before the loss."""

    predict: Callable[[Sequence[np.ndarray]], Tensor]
    """B arrays of token ids to (B,) float32 scores in the unit of the labels, on the backbone's device."""
    unit: float
    """The size of an error of 1: a learning rate then means the same on every label range."""
    more: int = 0
    """Tokens that the LLM reads with each row besides its own."""
    whole: bool = False
    """Whether rows cannot be cut."""
    trees: bool = False
    """Whether what the rows of a pass begin with is read once."""
    head: "RegressionHead | None" = None
    """What is trained beside the adapter."""


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


def regression_method(model: Any, backbone: Backbone, target: np.ndarray) -> Method:
    """The method lora.

    Args:
        model: the causal LM, its adapter inside.
        backbone: it belongs to.
        target: (N,) gold scores of the training rows.
    """
    head = RegressionHead(backbone.hidden_size).to(backbone.device)
    head.mean.fill_(float(target.mean()))
    head.std.fill_(float(target.std()) or 1.0)

    def predict(rows: Sequence[np.ndarray]) -> Tensor:
        # A row alone has nothing to share, and masks of a tree grow with the square of its length.
        if len(rows) == 1 or not takes_trees(model):
            return head(*backbone.last_states(model.base_model, rows))
        trunk, own = plant(rows)
        states = tree_states(model.base_model, Tokens.join([trunk, *own]), last_tokens(trunk, own))[:, None]
        return head(states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device))

    return Method(predict, unit=float(head.std), trees=takes_trees(model), head=head)


def load_regression_head(adapter: Adapter) -> RegressionHead:
    """The head of an adapter of the method lora: what it predicts from the last layer's states, tuned backbone's.

    Raises:
        AdapterError: if it has none, or it is damaged.
    """
    from safetensors.torch import load

    if adapter.tuned is None or adapter.tuned["sha256_of_head"] is None:
        raise AdapterError(f"the adapter {adapter.name} has no regression head; relish tune --method lora makes one")
    path = adapter.folder / HEAD
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror})") from None
    if hashlib.sha256(content).hexdigest() != adapter.tuned["sha256_of_head"]:
        raise AdapterError(f"{path} is damaged: it is not the file that was saved; tune again into another folder")
    state = load(content)
    head = RegressionHead(len(state["weight"]))
    head.load_state_dict(state)
    return head.eval()


@dataclass(frozen=True)
class Answers:
    """What may be answered to a prompt, as `relish extract --readouts candidates` asks it too."""

    prompts: Prompts
    values: list[float]
    """C scores."""
    tokens: list[np.ndarray]
    """Token ids of each, with its end marker."""

    @classmethod
    def over(
        cls, label_range: tuple[float, float], *, backbone: Backbone, prompt: str, chat_template: bool
    ) -> "Answers":
        """A grid over the label range, written as the tokenizer of `backbone` writes it after the prompt."""
        prompts = Prompts(backbone, [], chat_template=chat_template)
        return cls(prompts, *prompts.candidates(prompt, label_range, 0))


def raft_method(model: Any, backbone: Backbone, answers: Answers, label_range: tuple[float, float]) -> Method:
    """The method raft: Σ_c p(c | x) · c over the candidate scores, p as the LLM has it, not normalised over them.

    Args:
        model: the causal LM, its adapter inside.
        backbone: it belongs to.
        answers: the candidates.
        label_range: smallest and largest possible score.
    """
    pad = backbone.pad_token(model)
    values = torch.tensor(answers.values, dtype=torch.float32, device=backbone.device)

    def predict(rows: Sequence[np.ndarray]) -> Tensor:
        return score_candidates(model, rows, answers.tokens, pad=pad).exp() @ values

    more = len(answer_nodes(answers.tokens))
    return Method(predict, unit=label_range[1] - label_range[0], more=more, whole=True, trees=takes_trees(model))
