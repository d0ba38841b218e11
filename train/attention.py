"""Cross-attention of one query per example, with the key and value projections folded into the query side.

Plain multi-head attention projects every token to a key and a value. With a single query r the same numbers come
cheaper: per head h with q_h = W_q,h r + b_q,h,

    score_t = q_h · (W_k,h c_t + b_k,h) / √d_h = (W_k,hᵀ q_h) · c_t / √d_h + const      (softmax drops the constant)
    value   = Σ_t a_t (W_v,h c_t + b_v,h) = W_v,h (Σ_t a_t c_t) + b_v,h                 (Σ_t a_t = 1)

so no token is projected again at any of the L steps.
"""

import math

import torch
from torch import Tensor, nn


class FoldedCrossAttention(nn.Module):
    """nn.MultiheadAttention(d, heads, batch_first=True) for one query per example; same parameters, names and init."""

    def __init__(self, latent_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * latent_size, latent_size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * latent_size))
        self.out_proj = nn.Linear(latent_size, latent_size)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
        """Attend from one query to T tokens.

        Args:
            query: (B, d).
            tokens: (B, T, d), what keys and values are made from.
            bias: (B, 1, T), added to the scores: 0 = real token, -inf = padding.

        Returns:
            (B, d).
        """
        B, d = query.shape
        heads, width = self.num_heads, d // self.num_heads
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, _, b_v = self.in_proj_bias.chunk(3)
        q = (query @ w_q.T + b_q) * (1 / math.sqrt(width))
        # (heads, B, width) x (heads, width, d): each head's query in the space of the tokens.
        folded = torch.bmm(q.view(B, heads, width).transpose(0, 1), w_k.view(heads, width, d)).transpose(0, 1)
        weights = torch.softmax(torch.baddbmm(bias, folded, tokens.transpose(1, 2)), dim=-1)
        mixed = torch.bmm(weights, tokens)  # (B, heads, d)
        value = torch.bmm(mixed.transpose(0, 1), w_v.view(heads, width, d).transpose(1, 2))
        return self.out_proj(value.transpose(0, 1).reshape(B, d) + b_v)
