"""The RELISH head: a latent state that reads the hidden states L times, and a linear regressor (arXiv 2604.01206)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..cache.errors import SettingsError
from .refine import StepWeights, refine
from .scale import InputScale, TargetScale
from .settings import STEP_SCALE


class RelishHead(nn.Module):
    """Hidden states of a frozen LLM to one number.

        c  = W_p H + b_p
        r⁰ = learned latent
        r  = LayerNorm(r + CrossAttention_l(r, c, c));  r = LayerNorm(r + FFN_l(r))      for l = 1..L
        ŷ  = w · r^L + b

    Padding is masked: a prediction does not depend on batch mates or on T, beyond the last digits of sums. A row of
    nothing but padding gives NaN.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        depth: int = 3,
        latent_size: int = 256,
        num_heads: int = 8,
        dropout: float = 0.0,
    ) -> None:
        """Make a head with random weights, drawn from torch's global generator.

        They are torch's usual ones, but the latent state begins at a size of 0.02, and what a step adds to it at a
        share STEP_SCALE of theirs.

        Args:
            hidden_size: D, the width of the hidden states.
            depth: L, the number of refinement steps, each with weights of its own.
            latent_size: d, the width of the latent state.
            num_heads: attention heads.
            dropout: on the attention's and the FFN's output while training.

        Raises:
            SettingsError: if a size is not positive, or latent_size is not a multiple of num_heads.
        """
        super().__init__()
        if min(hidden_size, depth, latent_size, num_heads) < 1:
            raise SettingsError(
                f"hidden_size, depth, latent_size and num_heads must be at least 1, "
                f"not {hidden_size}, {depth}, {latent_size}, {num_heads}"
            )
        if latent_size % num_heads:
            raise SettingsError(f"latent_size must be a multiple of num_heads, not {latent_size} with {num_heads}")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.dropout = dropout
        self.input_scale = InputScale(hidden_size)
        self.target_scale = TargetScale()
        self.input_projection = nn.Linear(hidden_size, latent_size)
        self.latent = nn.Parameter(torch.randn(latent_size) * 0.02)
        self.steps = nn.ModuleList(RefinementStep(latent_size, num_heads) for _ in range(depth))
        self.regressor = nn.Linear(latent_size, 1)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Predict.

        Args:
            hidden: (B, T, D) hidden states of any float type; what stands in the padding does not matter.
            mask: (B, T) bool or 0/1, True = real token; each row has at least one.

        Returns:
            (B,) predictions in the unit of the labels.
        """
        state = refine(
            hidden,
            mask.bool(),
            self.input_projection.weight,
            self.input_projection.bias,
            self.latent,
            [StepWeights(*step.parameters()) for step in self.steps],
            mean=self.input_scale.mean,
            scale=self.input_scale.scale,
            heads=self.num_heads,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.target_scale(self.regressor(state).squeeze(-1))

    def load_published_state_dict(self, published: Mapping[str, Tensor]) -> None:
        """Load weights in the layout of the authors' module.

        That is `query_proj`, `readout_tokens`, `layers.{i}.{attn,ln1,ln2,ff.0,ff.2}` and `head`. Its predictions are
        this head's on rows without padding; on padded rows the authors' module also attends to the padding.

        Raises:
            SettingsError: naming what is missing, unknown or of another shape.
        """
        renamed = {_own_name(name): tensor for name, tensor in published.items()}
        own = dict(self.named_parameters())
        if "latent" in renamed:
            renamed["latent"] = renamed["latent"].reshape(-1)
        wrong = sorted(set(own) ^ set(renamed)) or [
            f"{name} {tuple(renamed[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if renamed[name].shape != own[name].shape
        ]
        if wrong:
            raise SettingsError(f"these weights do not fit a RELISH head of this depth and size: {', '.join(wrong)}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(renamed[name])
        self.input_scale.reset()
        self.target_scale.reset()


class RefinementStep(nn.Module):
    """The weights of one step, registered in the order of StepWeights; `refine` computes with them."""

    def __init__(self, latent_size: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(latent_size, num_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(latent_size)
        up, down = nn.Linear(latent_size, 4 * latent_size), nn.Linear(4 * latent_size, latent_size)
        self.ffn = nn.Sequential(up, nn.GELU(), down)
        self.norm2 = nn.LayerNorm(latent_size)
        # A step begins by changing the state a little only: from few rows more is learnt so (benchmarks/recipe-log.md).
        with torch.no_grad():
            self.attention.out_proj.weight.mul_(STEP_SCALE)
            down.weight.mul_(STEP_SCALE)


def _own_name(published: str) -> str:
    for theirs, ours in (
        ("query_proj.", "input_projection."),
        ("readout_tokens", "latent"),
        ("layers.", "steps."),
        (".attn.", ".attention."),
        (".ln1.", ".norm1."),
        (".ln2.", ".norm2."),
        (".ff.", ".ffn."),
        ("head.", "regressor."),
    ):
        published = published.replace(theirs, ours)
    return published
