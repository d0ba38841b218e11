"""Attention pooling in one step: a learned query weighs the tokens, and a linear layer reads their weighted mean."""

import math

import torch
from torch import Tensor, nn

from .scale import InputScale, TargetScale


class AttentionHead(nn.Module):
    """Hidden states to one number through one attention with a learned query q (D,); 2 D + 1 parameters.

        x_t = (h_t - mean) / scale
        a   = softmax_t(q · x_t / √D)                 over the real tokens
        ŷ   = w · Σ_t a_t x_t + b

    This is the pooling by attention of the Set Transformer (Lee et al. 2019, arXiv 1810.00825, section 3.2) with one
    seed and one head. Its projections of keys and values need no weights of their own: with a single query the first
    folds into q and the second into w. The query begins at 0, and the head as a linear layer on the mean.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input_scale = InputScale(hidden_size)
        self.target_scale = TargetScale()
        self.query = nn.Parameter(torch.zeros(hidden_size))
        self.regressor = nn.Linear(hidden_size, 1)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Predict.

        Args:
            hidden: (B, T, D) hidden states of any float type; what stands in the padding does not matter.
            mask: (B, T) bool or 0/1, True = real token; each row has at least one.

        Returns:
            (B,) predictions in the unit of the labels.
        """
        padding = ~mask.bool()
        # Padding may hold NaN, and 0 × NaN is NaN: it must be zero, not only unattended.
        tokens = hidden.to(self.query.dtype).masked_fill(padding.unsqueeze(-1), 0.0)
        # Standardising folds into the query and comes after the sum: the mean shifts all scores alike.
        scores = tokens @ (self.query / self.input_scale.scale / math.sqrt(self.hidden_size))
        attention = torch.softmax(scores.masked_fill(padding, float("-inf")), dim=1)
        pooled = torch.bmm(attention.unsqueeze(1), tokens).squeeze(1)
        vector = (pooled - self.input_scale.mean) / self.input_scale.scale
        return self.target_scale(self.regressor(vector).squeeze(-1))
