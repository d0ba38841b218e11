"""The refinement steps against the same steps built from torch's modules and differentiated by autograd."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from relish.train import refine
from relish.train.head import RelishHead
from relish.train.reading import Direct, Projected, reader_for

READERS = {"projected": Projected, "dense": partial(Projected, dense=True), "direct": Direct}


def plainly(head: RelishHead, hidden: Tensor, mask: Tensor, noise=lambda like: 1.0) -> Tensor:
    """The head's modules, called one after the other on every token slot."""
    hidden = torch.where(mask.unsqueeze(-1), hidden.to(head.latent.dtype), 0.0)
    tokens = head.input_projection((hidden - head.input_scale.mean) / head.input_scale.scale)
    state = head.latent.expand(len(hidden), 1, -1)
    for step in head.steps:
        read, _ = step.attention(state, tokens, tokens, key_padding_mask=~mask, need_weights=False)
        state = step.norm1(state + read * noise(read))
        thought = step.ffn(state)
        state = step.norm2(state + thought * noise(thought))
    return head.target_scale(head.regressor(state[:, 0]).squeeze(-1))


def a_head(hidden_size=12, depth=2, dtype=torch.float64, **sizes) -> RelishHead:
    torch.manual_seed(0)
    head = RelishHead(hidden_size=hidden_size, depth=depth, **sizes).to(dtype)
    for parameter in head.parameters():  # those that start at 0 or 1 too
        nn.init.normal_(parameter, std=0.3)
    head.input_scale.set(torch.randn(hidden_size), torch.rand(hidden_size) + 0.5)
    return head


def a_batch(hidden_size=12, rows=5, T=9, padding="right", dtype=torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    lengths = torch.randint(1, T + 1, (rows, 1))
    mask = torch.arange(T) < lengths
    if padding == "none":
        mask[:] = True
    elif padding == "left":
        mask = mask.flip(1)
    elif padding == "holes":
        mask = torch.rand(rows, T) < 0.5
        mask[:, 3] = True
    return torch.randn(rows, T, hidden_size, dtype=dtype), mask


def gradients(head: RelishHead, prediction: Tensor) -> list[Tensor]:
    upstream = torch.linspace(-1, 2, len(prediction), dtype=prediction.dtype)
    return list(torch.autograd.grad((prediction * upstream).sum(), list(head.parameters())))


@pytest.fixture(params=READERS)
def reader(request, monkeypatch):
    monkeypatch.setattr(
        refine, "reader_for", lambda hidden, mask, weight, bias, **_: READERS[request.param](hidden, mask, weight, bias)
    )
    return request.param


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("depth", [1, 3, 5])
def test_values_and_gradients_are_those_of_torchs_modules(reader, depth, padding):
    head, (hidden, mask) = a_head(depth=depth, latent_size=24, num_heads=3), a_batch(padding=padding)
    ours, theirs = head(hidden, mask), plainly(head, hidden, mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for (name, _), a, b in zip(head.named_parameters(), gradients(head, ours), gradients(head, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=name)


def test_at_the_papers_size_float32_stays_within_rounding(reader):
    torch.manual_seed(0)
    head = RelishHead(hidden_size=4096, depth=3)
    hidden, mask = a_batch(4096, rows=4, T=11, dtype=torch.bfloat16)
    torch.testing.assert_close(head(hidden, mask), plainly(head, hidden, mask), rtol=0, atol=1e-5)
    for ours, theirs in zip(
        gradients(head, head(hidden, mask)), gradients(head, plainly(head, hidden, mask)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_many_tokens_are_projected_in_chunks(reader):
    head, (hidden, mask) = a_head(), a_batch(rows=16, T=70)
    assert mask.sum() > 512
    ours, theirs = head(hidden, mask), plainly(head, hidden, mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for a, b in zip(gradients(head, ours), gradients(head, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_what_stands_in_the_padding_reaches_neither_values_nor_gradients(reader):
    head, (hidden, mask) = a_head(), a_batch()
    clean = head(hidden, mask)
    expected = gradients(head, clean)
    hidden[~mask] = float("nan")
    dirty = head(hidden, mask)
    assert torch.equal(dirty, clean)
    assert all(map(torch.equal, gradients(head, dirty), expected))


def test_a_row_of_nothing_but_padding_gives_nan_and_leaves_the_others_alone(reader):
    head = a_head()
    hidden, mask = a_batch()
    mask[2] = False
    prediction = head(hidden, mask)
    assert prediction.isnan().tolist() == [row == 2 for row in range(5)]
    others = [0, 1, 3, 4]
    torch.testing.assert_close(prediction[others], plainly(head, hidden[others], mask[others]), rtol=1e-9, atol=1e-9)


def test_dropped_outputs_count_in_values_and_gradients(reader, monkeypatch):
    head, (hidden, mask) = a_head(dropout=0.4), a_batch()

    def noise_like(like: Tensor) -> Tensor:
        return (torch.rand(like.shape, dtype=like.dtype, generator=generator) < 0.6) / 0.6

    monkeypatch.setattr(refine, "_noise", lambda like, dropout: noise_like(like) if dropout else None)
    generator = torch.Generator().manual_seed(5)
    ours = head.train()(hidden, mask)
    generator = torch.Generator().manual_seed(5)
    theirs = plainly(head, hidden, mask, lambda like: noise_like(like[:, 0]).unsqueeze(1))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for a, b in zip(gradients(head, ours), gradients(head, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    torch.testing.assert_close(head.eval()(hidden, mask), plainly(head, hidden, mask), rtol=0, atol=1e-9)


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    noise = refine._noise(torch.empty(200, 200), 0.25)
    assert noise is not None
    assert noise.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert noise.mean().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
def test_hidden_states_get_their_gradient_where_it_is_wanted(reader, padding):
    head, (hidden, mask) = a_head(), a_batch(padding=padding)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    head(ours, mask).sum().backward()
    plainly(head, theirs, mask).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-9)
    assert not ours.grad[~mask].any()

    head, half = a_head(dtype=torch.float32), hidden.bfloat16().requires_grad_()
    head(half, mask).sum().backward()
    assert half.grad.dtype == torch.bfloat16
    whole = half.detach().float().requires_grad_()
    head(whole, mask).sum().backward()
    torch.testing.assert_close(half.grad.float(), whole.grad, rtol=1e-2, atol=1e-2)


def test_a_surrounding_autocast_changes_nothing(reader):
    head, (hidden, mask) = a_head(dtype=torch.float32), a_batch(dtype=torch.float32)
    expected = head(hidden, mask)
    with torch.autocast("cpu", torch.bfloat16):
        state = head(hidden, mask)
        inside = gradients(head, state)
    assert state.dtype == torch.bfloat16  # of the regressor, torch's own module
    for ours, plain in zip(inside, gradients(head, expected), strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2 * plain.abs().max().item())


def test_weights_changed_before_going_back_are_noticed(reader):
    for name in ("latent", "input_projection.weight", "steps.0.norm1.weight"):
        head, (hidden, mask) = a_head(), a_batch()
        prediction = head(hidden, mask).sum()
        with torch.no_grad():
            head.get_parameter(name).add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            prediction.backward()


def test_going_back_twice_gives_the_same_gradients(reader):
    head, (hidden, mask) = a_head(), a_batch()
    prediction = head(hidden, mask).sum()
    parameters = list(head.parameters())
    first = torch.autograd.grad(prediction, parameters, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(prediction, parameters), first))


@pytest.fixture
def threads_after():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_after")
def test_long_rows_are_not_projected_where_steps_and_threads_are_few():
    def chosen(T: int, depth: int, *, training: bool = True, mixed: bool = False) -> type:
        D, rows = 2048, 16
        mask = torch.ones(rows, T, dtype=torch.bool)
        weight, bias = torch.zeros(256, D), torch.zeros(256)
        hidden = torch.zeros(1, requires_grad=mixed).expand(rows, T, D)
        return type(reader_for(hidden, mask, weight, bias, heads=8, depth=depth, training=training))

    torch.set_num_threads(1)
    assert chosen(T=256, depth=3) is Direct
    assert chosen(T=52, depth=3) is Projected
    assert chosen(T=64, depth=1) is Direct
    assert chosen(T=128, depth=3) is Projected
    assert chosen(T=128, depth=3, mixed=True) is Direct
    assert chosen(T=128, depth=3, training=False) is Direct
    assert chosen(T=256, depth=8) is Projected
    torch.set_num_threads(2)  # they share a product of all tokens better than one of a row
    assert chosen(T=256, depth=3) is Projected
    assert chosen(T=256, depth=1) is Direct
    assert chosen(T=512, depth=3, training=False) is Direct
