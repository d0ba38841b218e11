"""The optimizer against torch.optim.AdamW, and what it does not import."""

import subprocess
import sys

import torch
from torch import nn

from relish.train.adamw import AdamW


def _head() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 1))


def test_weights_are_those_of_torch_with_weight_decay_on_matrices_only() -> None:
    ours, theirs = _head(), _head()
    optimizer = AdamW(ours, weight_decay=0.5)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.5},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups)
    for step in range(20):
        texts = torch.randn(3, 7)
        lr = 0.01 * (step + 1)
        for group in reference.param_groups:
            group["lr"] = lr
        for head, zero_grad in ((ours, optimizer.zero_grad), (theirs, reference.zero_grad)):
            zero_grad()
            head(texts).square().mean().backward()
        optimizer.step(lr=lr)
        reference.step()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_a_parameter_without_a_gradient_stays() -> None:
    head = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    optimizer = AdamW(head, weight_decay=1.0)
    head["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step(lr=0.1)
    moved = {name for name, parameter in head.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"used.weight", "used.bias"}


def test_a_vector_may_learn_at_a_rate_of_its_own() -> None:
    ours, theirs = _head(), _head()
    optimizer = AdamW(ours, weight_decay=0.0, faster={ours[1].bias: 7.0})
    others = [parameter for parameter in theirs.parameters() if parameter is not theirs[1].bias]
    groups = [{"params": others, "lr": 0.01}, {"params": [theirs[1].bias], "lr": 0.07}]
    reference = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(5):
        texts = torch.randn(3, 7)
        for head, zero_grad in ((ours, optimizer.zero_grad), (theirs, reference.zero_grad)):
            zero_grad()
            head(texts).square().mean().backward()
        optimizer.step(lr=0.01)
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_training_does_not_import_the_compiler() -> None:
    script = """
import sys
import torch
from relish.train.adamw import AdamW
from relish.train.data import TrainBatch
from relish.train.head import RelishHead
from relish.train.step import take_step
head = RelishHead(hidden_size=8, depth=2, latent_size=8, num_heads=2)
batch = TrainBatch(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool), torch.randn(2))
take_step(head, AdamW(head, weight_decay=1.0), torch.nn.HuberLoss(), batch, lr=1e-3)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
