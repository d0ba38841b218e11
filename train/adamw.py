"""AdamW, in the fused form, without what torch.optim's classes import."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw


class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019) over a head's parameters; it decays matrices only.

    torch's own functional form does the arithmetic. The class torch.optim.AdamW gives the same weights, but brings the
    whole compiler in when it is made: more than a second, in each process that trains.
    """

    def __init__(
        self, head: nn.Module, *, weight_decay: float, faster: "Mapping[nn.Parameter, float] | None" = None
    ) -> None:
        """Begin with moments of 0.

        Args:
            head: whose parameters learn.
            weight_decay: of matrices.
            faster: vectors that learn at so many times the rate of the others.
        """
        faster = faster or {}
        usual = [parameter for parameter in head.parameters() if parameter not in faster]
        # 0 is no sensible place for biases, norms and the latent state.
        matrices = [parameter for parameter in usual if parameter.ndim >= 2]
        vectors = [parameter for parameter in usual if parameter.ndim < 2]
        self._groups = [_Group(matrices, weight_decay, 1.0), _Group(vectors, 0.0, 1.0)]
        self._groups += [_Group([parameter], 0.0, times) for parameter, times in faster.items()]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for group in self._groups:
            for parameter in group.parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(self, *, lr: "float | Tensor") -> None:
        """Move every parameter that has a gradient.

        Args:
            lr: learning rate; on a CUDA device it may be a tensor () there, which a recorded step reads anew each time.
        """
        for group in self._groups:
            group.step(lr)


class _Group:
    def __init__(self, parameters: list[nn.Parameter], weight_decay: float, times: float) -> None:
        self.parameters = parameters
        self.weight_decay = weight_decay
        self.times = times
        self.mean: list[Tensor] = [torch.zeros_like(parameter) for parameter in parameters]
        self.square: list[Tensor] = [torch.zeros_like(parameter) for parameter in parameters]
        self.steps = [torch.zeros((), dtype=torch.float32, device=parameter.device) for parameter in parameters]

    def step(self, lr: "float | Tensor") -> None:
        learning = [index for index, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not learning:
            return
        adamw(
            [self.parameters[index] for index in learning],
            [grad for parameter in self.parameters if (grad := parameter.grad) is not None],
            [self.mean[index] for index in learning],
            [self.square[index] for index in learning],
            [],
            [self.steps[index] for index in learning],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr * self.times,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )
