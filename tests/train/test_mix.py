"""A learned mix of layers: against the plain sum, against the single layer, and from the cache to a saved run."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from relish.cache.errors import RunError
from relish.cache.reader import open_cache
from relish.train.data import Rows, feature_moments, open_split
from relish.train.grid import train_heads
from relish.train.heads import HeadSpec, build_head, count_parameters
from relish.train.loop import predict_rows
from relish.train.mix import MixedHead
from relish.train.run import load_head, load_run
from relish.train.settings import CLOSED_FORM, HEADS, TrainSettings

from .conftest import write_cache

D, K = 12, 3
LEARNED = [head for head in HEADS if head not in CLOSED_FORM]
SMALL = {"latent_size": 32, "num_heads": 4, "epochs": 3, "threads": 1, "device": "cpu"}
FAST = ["--epochs", 1, "--latent-size", 32, "--num-heads", 4, "--device", "cpu", "--threads", 1]


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """A cache of the layers 1, 2 and 5, of which only the last says anything about the target."""
    return write_cache(tmp_path_factory.mktemp("mix") / "cache", layers=(1, 2, 5))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The same with more rows, to learn from."""
    sizes = {"train": 400, "dev": 60}
    return write_cache(tmp_path_factory.mktemp("mix") / "large", layers=(1, 2, 5), sizes=sizes)


def spec(name, layers=K):
    return HeadSpec(name=name, hidden_size=D, depth=2, latent_size=24, num_heads=3, dropout=0.0, layers=layers)


def a_head(name, dtype=torch.float64) -> MixedHead:
    torch.manual_seed(0)
    head = build_head(spec(name)).to(dtype).eval()
    for parameter in head.parameters():  # those that begin at 0 too
        nn.init.normal_(parameter, std=0.3)
    head.input_scale.set(torch.randn(K, D), torch.rand(K, D) + 0.5)
    head.target_scale.set(3.0, 2.0)
    return head


def a_batch(dtype=torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1], [7]])
    return torch.randn(4, K, 9, D, dtype=dtype), mask


def plainly(head: MixedHead, hidden: Tensor, mask: Tensor) -> Tensor:
    """The mix token by token, and then the head on it, whether it pools or not."""
    shares = head.weights.exp() / head.weights.exp().sum()
    mixed = torch.zeros_like(hidden[:, 0])
    for k in range(K):
        mixed = mixed + shares[k] * (hidden[:, k] - head.input_scale.mean[k]) / head.input_scale.scale[k]
    return head.head(mixed, mask)


def gradients(head: nn.Module, prediction: Tensor) -> list[Tensor]:
    upstream = torch.linspace(-1, 2, len(prediction), dtype=prediction.dtype)
    return list(torch.autograd.grad((prediction * upstream).sum(), list(head.parameters())))


# The head


@pytest.mark.parametrize("name", LEARNED)
def test_values_and_gradients_are_those_of_the_plain_sum(name):
    head, (hidden, mask) = a_head(name), a_batch()
    ours, theirs = head(hidden, mask), plainly(head, hidden, mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    found = gradients(head, ours)
    for (which, _), a, b in zip(head.named_parameters(), found, gradients(head, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=which)
    assert found[0].abs().min() > 1e-4  # of the weights of the mix


@pytest.mark.parametrize("name", LEARNED)
def test_what_stands_in_the_padding_reaches_neither_values_nor_gradients(name):
    head, (hidden, mask) = a_head(name), a_batch()
    clean = head(hidden, mask)
    expected = gradients(head, clean)
    together = hidden.clone()
    hidden.transpose(1, 2)[~mask] = float("nan")
    assert hidden.isnan().any()
    dirty = head(hidden, mask)
    assert torch.equal(dirty, clean)
    assert all(map(torch.equal, gradients(head, dirty), expected))
    for row in range(4):
        length = int(mask[row].sum())
        alone = head(together[row : row + 1, :, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(alone, clean[row : row + 1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["relish", "attention", "linear"])
def test_padding_before_and_among_the_tokens_is_left_out_too(name):
    head, (hidden, mask) = a_head(name), a_batch()
    mask[0, :3], mask[0, 5], mask[3, :6] = False, False, False  # (of row 3 one token is left)
    expected = plainly(head, hidden, mask)
    theirs = gradients(head, expected)
    hidden.transpose(1, 2)[~mask] = float("nan")
    ours = head(hidden, mask)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    for a, b in zip(gradients(head, ours), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", LEARNED)
def test_hidden_states_get_their_gradient_where_it_is_wanted(name):
    head, (hidden, mask) = a_head(name), a_batch()
    theirs = hidden.clone().requires_grad_()
    hidden.transpose(1, 2)[~mask] = float("nan")
    ours = hidden.requires_grad_()
    wanted = [*head.parameters()]
    found = torch.autograd.grad(head(ours, mask).sum(), [ours, *wanted])
    for a, b in zip(found, torch.autograd.grad(plainly(head, theirs, mask).sum(), [theirs, *wanted]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", LEARNED)
def test_half_precision_is_mixed_in_float32(name):
    head, (hidden, mask) = a_head(name, torch.float32), a_batch(torch.bfloat16)
    whole = head(hidden.float(), mask)
    torch.testing.assert_close(head(hidden, mask), whole, rtol=0, atol=1e-5)
    for a, b in zip(gradients(head, head(hidden, mask)), gradients(head, whole), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LEARNED)
def test_it_begins_as_the_mean_of_the_layers_and_has_k_parameters_more(name):
    head = build_head(spec(name))
    assert head.shares().tolist() == pytest.approx([1 / 3] * 3)
    assert count_parameters(head) == count_parameters(build_head(spec(name, layers=None))) + K


# From the cache


@pytest.mark.parametrize("pooling", [None, "mean", "last"])
def test_each_layer_has_the_moments_it_has_alone(layers, pooling):
    opened = open_cache(layers)

    def moments(layer):
        split = open_split(opened, "train", layer)
        return feature_moments(Rows(split, np.arange(len(split))), pooling)

    found = moments("mix")
    for k, layer in enumerate((1, 2, 5)):
        alone = moments(layer)
        torch.testing.assert_close(found.mean[k], alone.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.std[k], alone.std, rtol=0, atol=1e-6)


def test_batches_for_prediction_shrink_with_the_number_of_layers(layers):
    opened = open_cache(layers)

    def slots(layer, factor):
        split = open_split(opened, "train", layer)
        rows = Rows(split, np.repeat(np.arange(len(split)), factor))
        return max(len(batch) * int(rows.lengths[batch].max()) for batch in rows.batches())

    assert 8000 < slots(1, 60) <= 8192
    assert 2600 < slots("mix", 60) <= 8192 / 3


@pytest.mark.parametrize("head", LEARNED)
def test_a_mix_of_one_layer_is_that_layer(cache, tmp_path, head):
    settings = {"heads": (head,), "depths": (2,), **SMALL}
    (alone,) = train_heads(cache, tmp_path / "alone", TrainSettings(**settings)).cells.values()
    result = train_heads(cache, tmp_path / "mix", TrainSettings(**settings, layer="mix"))
    ((cell, mixed),) = result.cells.items()
    assert mixed["layer_mix"] == {"2": 1.0}
    assert "layer_mix" not in alone
    weights = load_file(tmp_path / "mix" / str(cell) / "model.safetensors")
    assert weights["weights"].tolist() == [0.0]
    for name, value in load_file(tmp_path / "alone" / str(cell) / "model.safetensors").items():
        if name.startswith("input_scale."):
            torch.testing.assert_close(weights[name][0], value, rtol=0, atol=1e-6)
        else:
            torch.testing.assert_close(weights[f"head.{name}"], value, rtol=1e-3, atol=1e-4, msg=name)
    assert mixed["val"]["rmse"] == pytest.approx(alone["val"]["rmse"], abs=1e-3)


@pytest.mark.parametrize("head", LEARNED)
def test_it_finds_the_layer_that_matters_and_loads_as_it_was_saved(large, tmp_path, head):
    settings = TrainSettings(heads=(head,), depths=(1,), layer="mix", **{**SMALL, "epochs": 12, "patience": 12})
    ((cell, metrics),) = train_heads(large, tmp_path / "r", settings).cells.items()
    shares = metrics["layer_mix"]
    assert list(shares) == ["1", "2", "5"]
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-6)
    assert shares["5"] > 0.4 > 0.35 > max(shares["1"], shares["2"])
    run = load_run(tmp_path / "r" / str(cell))
    assert (run.layer, run.layers, run.head.layers, run.metrics["layer_mix"]) == ("mix", (1, 2, 5), 3, shares)
    assert json.loads((run.path / "config.json").read_text())["layer"] == "mix"
    loaded = load_head(run)
    assert loaded.shares().tolist() == list(shares.values())
    dev = open_split(open_cache(large), "dev", "mix")
    predictions = predict_rows(loaded, Rows(dev, np.arange(len(dev))), torch.device("cpu"))
    rmse = float(np.sqrt(np.mean((predictions - dev.target) ** 2)))
    assert rmse == pytest.approx(metrics["val"]["rmse"], abs=1e-9)


def test_a_run_of_one_layer_is_written_as_before(layers, tmp_path):
    train_heads(layers, tmp_path / "r", TrainSettings(depths=(1,), layer=5, **SMALL))
    run = load_run(tmp_path / "r/relish-L1-seed0")
    assert (run.layer, run.layers, run.head.layers) == (5, (5,), None)
    config = json.loads((run.path / "config.json").read_text())
    assert (config["layer"], sorted(config["head"])) == (
        5,
        ["depth", "dropout", "hidden_size", "latent_size", "name", "num_heads"],
    )


def test_processes_of_their_own_learn_the_same_mix(layers, tmp_path):
    settings = {"heads": ("linear", "relish"), "depths": (1,), "seeds": (0, 1), "layer": "mix", **SMALL}
    for workers in (1, 2):
        train_heads(layers, tmp_path / str(workers), TrainSettings(**settings, workers=workers))
    for path in (tmp_path / "1").glob("*/model.safetensors"):
        assert path.read_bytes() == (tmp_path / "2" / path.parent.name / path.name).read_bytes()
    assert len(list((tmp_path / "2").glob("*/model.safetensors"))) == 4


def test_without_standardising_the_layers_are_mixed_as_they_are(layers, tmp_path):
    settings = TrainSettings(heads=("linear",), layer="mix", standardise=False, **SMALL)
    train_heads(layers, tmp_path / "r", settings)
    scale = load_head(tmp_path / "r/linear-L0-seed0").input_scale
    assert torch.equal(scale.mean, torch.zeros(3, 24))
    assert torch.equal(scale.scale, torch.ones(3, 24))


def test_a_mix_and_a_single_layer_are_not_put_into_one_folder(layers, tmp_path):
    train_heads(layers, tmp_path / "r", TrainSettings(heads=("linear",), layer=5, **SMALL))
    with pytest.raises(RunError, match="holds runs of another training: linear-L0-seed0 has layer 5, this one 'mix'"):
        train_heads(layers, tmp_path / "r", TrainSettings(heads=("mlp",), layer="mix", **SMALL))


def test_on_the_command_line(layers, tmp_path, run_cli):
    words = ["train", layers, "--out", tmp_path / "r", "--layer", "mix", "--head", "attention", *FAST, "--json"]
    result = run_cli(*words)
    assert result.exit_code == 0, result.stderr
    (cell,) = json.loads(result.stdout)["cells"]
    assert list(cell["layer_mix"]) == ["1", "2", "5"]
    several = run_cli("train", layers, "--out", tmp_path / "s", *FAST)
    assert (several.exit_code, "holds the layers 1, 2, 5; name one (--layer)" in several.stderr) == (2, True)
