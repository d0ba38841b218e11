"""Where relish begins to read: the directions in which the tokens of the training rows differ most.

A random projection of D dimensions to d mixes what differs with what does not, and from few rows the head learns little
more than to weigh what it is given (benchmarks/recipe-log.md, "What heads read").
"""

import math

import torch
from torch import Tensor, nn

from .data import Rows, read_ahead, sample_rows
from .scale import InputScale
from .shared import own_tokens

_SAMPLE = 1 << 13  # tokens: of some hundred directions they show the most


def principal_axes(rows: Rows, scale: InputScale, *, skip: int, count: int) -> Tensor | None:
    """The first principal axes of standardised hidden states, from a sample of the rows, always the same one.

    Args:
        rows: the training rows, at one layer or at all of them; then of the mean of the layers, each standardised.
        scale: what they are standardised by.
        skip: tokens at the beginning of each row that are left out.
        count: how many.

    Returns:
        (q, D) float32, orthonormal; q is `count`, or D or the number of tokens where that is smaller. None if hidden
        states are not finite, or too large.
    """
    sample = sample_rows(rows, tokens=_SAMPLE, skip=skip)
    found = []
    for hidden, mask, _ in read_ahead(sample, sample.batches()):
        own = own_tokens(mask, skip)
        layers = [layer[own].float() for layer in (hidden.unbind(dim=1) if sample.split.stacked else (hidden,))]
        means, scales = scale.mean.view(len(layers), -1), scale.scale.view(len(layers), -1)
        standardised = [(x - mean) / by for x, mean, by in zip(layers, means, scales, strict=True)]
        found.append(torch.stack(standardised).mean(dim=0))
    tokens = torch.cat(found)
    if not tokens.isfinite().all():
        return None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # not torch.manual_seed, which a GPU's generator hears as well
        try:
            _, _, axes = torch.pca_lowrank(tokens, q=min(count, *tokens.shape), niter=4)
        except RuntimeError:  # of states near float32's end, whose products are infinite
            return None
    return axes.T.contiguous()


def begin_with(projection: nn.Linear, axes: Tensor) -> None:
    """Make a projection D → d read these axes (q, D), each latent dimension a random mix of them.

    A vector along them comes out as long as torch's usual weights of a square layer leave it, by 1/√3.
    """
    with torch.no_grad():
        mixed, _ = torch.linalg.qr(torch.randn(projection.out_features, len(axes)))
        projection.weight.copy_(mixed @ axes / math.sqrt(3))
