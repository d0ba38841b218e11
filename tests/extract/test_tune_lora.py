"""The adapter's layers, against peft's own forward pass."""

import gc
import math
import weakref

import pytest
import torch

from relish.extract.tune_lora import add_adapter, drop

from .test_tune_methods import open_backbone


@pytest.fixture
def adapted(tiny_model, tune_settings):
    """`adapted("llama", dropout=0.5)`: a causal LM with an adapter of random weights."""
    import peft

    def make(arch, **settings):
        backbone = open_backbone(tiny_model(arch))
        model = add_adapter(peft, backbone.read_model("AutoModelForCausalLM"), tune_settings(**settings))
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.copy_(torch.randn(value.shape, generator=draw) * 0.1)
        return model

    return make


def layers_of(model):
    import peft

    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def run(model):
    """Logits and gradients of a causal LM on a few tokens."""
    logits = model(input_ids=torch.tensor([[3, 14, 15, 9, 2, 6]])).logits
    parameters = [value for value in model.parameters() if value.requires_grad]
    return [logits, *torch.autograd.grad(logits.square().mean(), parameters)]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_it_gives_what_peft_gives_in_values_and_gradients(adapted, arch):
    model = adapted(arch).eval()
    ours = run(model)
    for layer in layers_of(model):
        del layer.forward  # peft's own is below
    for one, other in zip(ours, run(model), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_low_rank_products_alone_see_the_dropout(adapted):
    model = adapted("llama", dropout=0.5).train()
    layer = layers_of(model)[0]
    x = torch.randn(3, 7, layer.in_features)
    torch.manual_seed(1)
    ours = layer(x)
    torch.manual_seed(1)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x) + 16 / 8 * (drop(x, 0.5) @ a.T @ b.T)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(layer.eval()(x), layer.base_layer(x) + 16 / 8 * (x @ a.T @ b.T))


def test_in_bfloat16_it_is_peft_but_for_rounding(adapted):
    model = adapted("llama").eval()
    layer = layers_of(model)[0]
    layer.base_layer.bfloat16()
    x = torch.randn(40, layer.in_features).bfloat16()
    ours = layer(x)
    assert ours.dtype == torch.bfloat16
    del layer.forward
    theirs = layer(x)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


def test_small_gradients_survive_float16(adapted):
    """As they come at the start, when B and the head have only begun to move away from zero."""
    model = adapted("llama").eval()
    layer = layers_of(model)[0]
    layer.base_layer.half()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.mul_(1e-3)
    x = torch.randn(40, layer.in_features).half()
    found = []
    for _ in range(2):
        found.append(torch.autograd.grad(layer(x), (a, b), torch.full((40, layer.out_features), 2e-6).half()))
        layer.__dict__.pop("forward", None)  # then peft's own
    for ours, theirs in zip(*found, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01 * theirs.abs().max().item())


def test_an_adapter_does_not_keep_the_llm_in_memory(adapted):
    gc.collect()
    gc.disable()
    try:
        model = adapted("llama")
        layer = weakref.ref(layers_of(model)[-1].base_layer)
        del model
        assert layer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_dropout(share, dtype):
    x = torch.randn(1001, 999, dtype=dtype).requires_grad_()
    torch.manual_seed(0)
    dropped = drop(x, share)
    zero = dropped == 0
    deviation = math.sqrt(share * (1 - share) / x.numel())
    assert zero.float().mean().item() == pytest.approx(share, abs=4 * deviation + 2**-17)
    assert dropped.dtype == dtype
    torch.testing.assert_close(dropped[~zero], x[~zero] / (1 - share), rtol=0.01, atol=0)
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    torch.testing.assert_close(gradient, (~zero).to(dtype) / (1 - share))
    # No value's fate tells of the next one's.
    pairs = zero.float().flatten()
    pairs = pairs[: len(pairs) // 4 * 4].view(-1, 4)
    correlation = torch.corrcoef(pairs.T) - torch.eye(4)
    assert correlation.abs().max().item() < 4 / math.sqrt(len(pairs))

    torch.manual_seed(0)
    assert torch.equal(drop(x, share), dropped)
    assert not torch.equal(drop(x, share), dropped)


@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 1), (2, 3, 5)])
def test_dropout_of_any_shape_and_share(shape):
    x = torch.ones(shape)
    assert drop(x, 0.05).shape == x.shape
    assert torch.equal(drop(x, 0.0), x)
    assert drop(x, 1 - 1e-9).count_nonzero() <= 1
