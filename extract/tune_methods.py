"""What an adapter is trained for. A method is a function from rows to predictions; the loop is the same for all.

lora: a linear regression head on the last token's final hidden state. raft: regression-aware fine-tuning (Lukasik et
al., "Better autoregressive regression with LLMs via regression-aware fine-tuning", ICLR 2025), the expected score under
the LLM's own probabilities of the answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backbone import Backbone
from .batches import CUT
from .candidates import answer_nodes, score_candidates, trained_scores
from .regression import RegressionHead, regress
from .shots import Prompts
from .tree import takes_trees


@dataclass(frozen=True)
class Method:
    """How rows become predictions, and what their errors are divided by before the loss."""

    predict: Callable[[Sequence[np.ndarray]], Tensor]
    """B arrays of token ids to (B,) float32 scores in the unit of the labels, on the backbone's device."""
    unit: float
    """The size of an error of 1: a learning rate then means the same on every label range."""
    more: int = 0
    """Tokens that the LLM reads with each row besides its own."""
    shorten: str = CUT
    """What makes rows shorter, for people; "" where nothing does."""
    trees: bool = False
    """Whether what the rows of a pass begin with is read once."""
    head: RegressionHead | None = None
    """What is trained beside the adapter."""


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

    return Method(partial(regress, head, model, backbone), unit=float(head.std), trees=takes_trees(model), head=head)


@dataclass(frozen=True)
class Answers:
    """What may be answered to a prompt, as `relish extract --readouts candidates` asks the tuned LLM too."""

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
        prompts, values = Prompts(backbone, [], chat_template=chat_template), trained_scores(label_range)
        return cls(prompts, values, prompts.candidates(prompt, values, label_range, 0))


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
    return Method(predict, unit=label_range[1] - label_range[0], more=more, shorten="", trees=takes_trees(model))
