"""Fixed scales around a head: inputs and targets standardised by the training split. Buffers, not parameters."""

import torch
from torch import Tensor, nn


class InputScale(nn.Module):
    """Per-dimension mean and scale of the hidden states; the identity until `set`.

    Some dimensions of an LLM's hidden states are hundreds of times larger than others. Standardised, all learn at the
    same rate.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, *shape: int) -> None:
        """Begin as the identity.

        Args:
            shape: D, or K and D for K layers, each with a scale of its own.
        """
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def set(self, mean: Tensor, scale: Tensor) -> None:
        """Take the mean (D,) and the standard deviation (D,) of what the head reads, or both (K, D)."""
        self.mean.copy_(mean)
        # A constant dimension has a deviation of rounding noise, not of 0; scaled by that it would dwarf all others.
        self.scale.copy_(torch.where(scale <= 1e-6 * mean.abs(), torch.ones_like(scale), scale))

    def reset(self) -> None:
        """Back to the identity."""
        self.mean.zero_()
        self.scale.fill_(1.0)


class TargetScale(nn.Module):
    """From standardised predictions to the unit of the labels: mean + std · z."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def set(self, mean: float, std: float) -> None:
        """Take the training split's mean and standard deviation (1 if that is 0)."""
        self.mean.fill_(mean)
        self.std.fill_(std if std > 0 else 1.0)

    def reset(self) -> None:
        """Back to the identity."""
        self.set(0.0, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        """Standardised to the labels' unit."""
        return self.mean + self.std * z

    def standardise(self, y: Tensor) -> Tensor:
        """The labels' unit to standardised."""
        return (y - self.mean) / self.std
