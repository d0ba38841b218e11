import pytest
import torch
from torch import Tensor, nn

from relish.cache.errors import SettingsError
from relish.train.head import RelishHead
from relish.train.heads import HeadSpec, build_head, count_parameters
from relish.train.settings import HEADS


class PlainRelish(nn.Module):
    """The head as the paper writes it, on nn.MultiheadAttention, in the authors' layout of weights."""

    def __init__(self, hidden_size: int, depth: int, latent_size: int = 256, num_heads: int = 8) -> None:
        super().__init__()
        self.query_proj = nn.Linear(hidden_size, latent_size)
        self.readout_tokens = nn.Parameter(torch.randn(1, latent_size) * 0.02)
        self.layers = nn.ModuleList(PlainStep(latent_size, num_heads) for _ in range(depth))
        self.head = nn.Linear(latent_size, 1)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        tokens = self.query_proj(hidden)
        state = self.readout_tokens.unsqueeze(0).expand(len(hidden), -1, -1)
        for layer in self.layers:
            state = layer(state, tokens, ~mask)
        return self.head(state).flatten()


class PlainStep(nn.Module):
    def __init__(self, latent_size: int, num_heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(latent_size, num_heads, batch_first=True)
        self.ln1 = nn.LayerNorm(latent_size)
        self.ff = nn.Sequential(
            nn.Linear(latent_size, 4 * latent_size), nn.GELU(), nn.Linear(4 * latent_size, latent_size)
        )
        self.ln2 = nn.LayerNorm(latent_size)

    def forward(self, state: Tensor, tokens: Tensor, padding: Tensor) -> Tensor:
        state = self.ln1(state + self.attn(state, tokens, tokens, key_padding_mask=padding, need_weights=False)[0])
        return self.ln2(state + self.ff(state))


def a_batch(D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([9, 4, 1, 7])
    mask = torch.arange(9) < lengths[:, None]
    return torch.randn(4, 9, D, dtype=dtype) * mask.unsqueeze(-1), mask


def without_zeros(head: nn.Module) -> nn.Module:
    """Make parameters that begin at 0, such as the query of attention, count in what a head predicts."""
    for parameter in head.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return head


@pytest.mark.parametrize(("hidden_size", "count"), [(4096, 3_418_625), (5120, 3_680_769), (5376, 3_746_305)])
def test_parameter_counts_are_the_papers(hidden_size, count):
    assert count_parameters(RelishHead(hidden_size=hidden_size, depth=3)) == count


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_head_agrees_with_the_plain_form_in_values_and_gradients(depth):
    torch.manual_seed(0)
    plain = PlainRelish(40, depth).double()
    head = RelishHead(hidden_size=40, depth=depth).double()
    head.load_published_state_dict(plain.state_dict())
    hidden, mask = a_batch(40, torch.float64)
    ours, theirs = head(hidden, mask), plain(hidden, mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    upstream = torch.randn(4, dtype=torch.float64)
    (ours * upstream).sum().backward()
    (theirs * upstream).sum().backward()
    renamed = RelishHead(hidden_size=40, depth=depth).double()
    renamed.load_published_state_dict({name: p.grad for name, p in plain.named_parameters()})
    for (name, parameter), gradient in zip(head.named_parameters(), renamed.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-9, msg=name)


def test_head_agrees_with_the_plain_form_in_float32_at_the_papers_size():
    torch.manual_seed(0)
    plain = PlainRelish(4096, 3)
    head = RelishHead(hidden_size=4096, depth=3)
    head.load_published_state_dict(plain.state_dict())
    hidden, mask = a_batch(4096)
    torch.testing.assert_close(head(hidden, mask), plain(hidden, mask), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_padding_never_changes_a_prediction(name):
    torch.manual_seed(0)
    spec = HeadSpec(name=name, hidden_size=16, depth=2, latent_size=32, num_heads=4, dropout=0.1)
    head = without_zeros(build_head(spec).eval())
    head.input_scale.set(torch.randn(16), torch.rand(16) + 0.5)
    head.target_scale.set(3.0, 2.0)
    hidden, mask = a_batch(16)
    together = head(hidden, mask)
    for row in range(4):
        length = int(mask[row].sum())
        alone = head(hidden[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
    longer = torch.cat([hidden, torch.full((4, 20, 16), float("nan"))], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(4, 20, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(head(longer, longer_mask), together, rtol=0, atol=1e-5)
    torch.testing.assert_close(head(longer, longer_mask.to(torch.uint8)), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_input_scale_standardises_what_the_head_reads(name):
    torch.manual_seed(1)
    spec = HeadSpec(name=name, hidden_size=16, depth=1, latent_size=32, num_heads=4, dropout=0.0)
    head = without_zeros(build_head(spec).double().eval())
    hidden, mask = a_batch(16, torch.float64)
    mean, scale = torch.randn(16).double(), torch.rand(16).double() + 0.5
    plain = head((hidden - mean) / scale, mask)
    head.input_scale.set(mean, scale)
    torch.testing.assert_close(head(hidden, mask), plain, rtol=0, atol=1e-9)


def test_a_step_begins_by_changing_little():
    """Weights are torch's usual ones, but for those that the latent state and what a step adds to it begin with."""
    torch.manual_seed(0)
    plain = PlainRelish(24, 2)
    torch.manual_seed(0)
    head = RelishHead(hidden_size=24, depth=2)
    usual = RelishHead(hidden_size=24, depth=2)
    usual.load_published_state_dict(plain.state_dict())
    for (name, ours), theirs in zip(head.named_parameters(), usual.parameters(), strict=True):
        factor = 0.1 if name.endswith(("out_proj.weight", "ffn.2.weight")) else 1.0
        torch.testing.assert_close(ours, factor * theirs, msg=name)


def test_published_weights_that_do_not_fit_are_refused_by_name():
    head = RelishHead(hidden_size=8, depth=2)
    with pytest.raises(SettingsError, match=r"do not fit a RELISH head of this depth and size: steps\.1\.attention"):
        head.load_published_state_dict(PlainRelish(8, 1).state_dict())
    with pytest.raises(SettingsError, match=r"input_projection.weight \(256, 9\) instead of \(256, 8\)"):
        head.load_published_state_dict(PlainRelish(9, 2).state_dict())


def test_impossible_shapes_are_refused():
    with pytest.raises(SettingsError, match="latent_size must be a multiple of num_heads, not 10 with 4"):
        RelishHead(hidden_size=8, latent_size=10, num_heads=4)
    with pytest.raises(SettingsError, match="must be at least 1, not 8, 0, 256, 8"):
        RelishHead(hidden_size=8, depth=0)


@pytest.mark.parametrize("name", ["mlp", "mlp-last"])
@pytest.mark.parametrize("hidden_size", [576, 4096])
def test_the_mlp_has_the_parameters_of_relish_at_depth_3(hidden_size, name):
    spec = HeadSpec(name=name, hidden_size=hidden_size, depth=0, latent_size=256, num_heads=8, dropout=0.0)
    relish = count_parameters(RelishHead(hidden_size=hidden_size, depth=3))
    assert count_parameters(build_head(spec)) == pytest.approx(relish, rel=0.001)


@pytest.mark.parametrize("name", HEADS)
def test_a_batch_without_rows_gives_no_scores(name):
    head = build_head(HeadSpec(name=name, hidden_size=32, depth=2, latent_size=16, num_heads=2, dropout=0.0))
    assert head(torch.zeros(0, 7, 32), torch.ones(0, 7, dtype=torch.bool)).shape == (0,)
