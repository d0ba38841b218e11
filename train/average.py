"""The average of a head's weights over its latest steps, which predicts better than the weights of any single one."""

import copy

from .heads import Head
from .settings import AVERAGE_EVERY


class AveragedWeights:
    """A second head that holds a power function average of the weights of one that learns.

        w̄ = β w̄ + (1 - β) w,     β = (m / n)^(γ + 1),     m and n the steps taken at the last look and at this one

    With γ = 8 the last ninth or so of all steps counts, however many there are. Karras et al., Analyzing and improving
    the training dynamics of diffusion models, CVPR 2024, "Power function EMA profile", where every step is looked at:
    m = n - 1.
    """

    def __init__(self, head: Head, *, power: float) -> None:
        """Begin with the weights as they are, which the first look replaces.

        Args:
            head: the one that learns; its buffers are taken over.
            power: γ.
        """
        self._power = power
        self._learning = [parameter.detach() for parameter in head.parameters()]
        self.head = copy.deepcopy(head).requires_grad_(False)
        """Predicts with the averages."""
        self._averaged = list(self.head.parameters())
        self._seen = 0

    def look(self, steps: int) -> None:
        """Take in the weights after so many steps, if enough of them were taken since the last time."""
        if steps - self._seen >= AVERAGE_EVERY:
            self.take(steps)

    def take(self, steps: int) -> None:
        """Take in the weights after so many steps."""
        if steps > self._seen:
            share = 1 - (self._seen / steps) ** (self._power + 1)
            for averaged, learning in zip(self._averaged, self._learning, strict=True):
                averaged.lerp_(learning, share)
            self._seen = steps
