"""What all training rows begin with is not read: by no head, in training and afterwards."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relish.cache.errors import RunError
from relish.cache.jsonfile import sealed_text
from relish.cache.reader import open_cache
from relish.cache.writer import CacheWriter, SplitRows
from relish.extract.pipeline import extract_cache
from relish.extract.settings import ExtractSettings
from relish.train.data import Rows, feature_moments
from relish.train.grid import train_heads
from relish.train.heads import HeadSpec, build_head
from relish.train.run import load_head, load_run
from relish.train.settings import HEADS, TrainSettings
from relish.train.shared import own_tokens, shared_tokens

from .conftest import write_cache

SHARED = 3
SMALL = {"latent_size": 8, "num_heads": 2, "epochs": 2, "workers": 1, "threads": 1}


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(0, 7))
def test_the_first_real_tokens_go_but_one_stays(rows, skip):
    """Wherever the padding is."""
    mask = torch.tensor(rows)
    for real, own in zip(mask, own_tokens(mask, skip), strict=True):
        places = real.nonzero()[:, 0].tolist()
        kept = places[min(skip, len(places) - 1) :] if places else []
        assert own.nonzero()[:, 0].tolist() == kept


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_skips_is_one_that_was_never_given_those_tokens(name, layers):
    torch.manual_seed(0)
    spec = HeadSpec(
        name=name, hidden_size=16, depth=2, latent_size=32, num_heads=4, dropout=0.0, layers=layers, skip=SHARED
    )
    head = build_head(spec).eval()
    other = build_head(replace(spec, skip=0)).eval()
    with torch.no_grad():  # pooled heads begin with zeros
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other.load_state_dict(head.state_dict())
    lengths = torch.tensor([9, 5, 4, 7])
    mask = torch.arange(9) < lengths[:, None]
    hidden = torch.randn(4, 9, 16) if layers is None else torch.randn(4, layers, 9, 16)
    expected = other(hidden[..., SHARED:, :], mask[:, SHARED:])
    assert expected.std() > 0
    hidden[..., :SHARED, :] = float("nan")
    torch.testing.assert_close(head(hidden, mask), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(head(hidden, mask=mask.to(torch.uint8)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(head(mask=mask, hidden=hidden), expected, rtol=0, atol=1e-5)


@pytest.fixture
def prompted(tmp_path):
    """`prompted("c", noise=0)`: the rows of "plain" after the same three tokens, whose states are `noise`.

    With `differs=1` that of the second token is not the same for all rows, as an encoder's.
    """
    plain = open_cache(write_cache(tmp_path / "plain", sizes={"train": 60, "dev": 20}))

    def make(name, *, noise, differs=None, only=("train", "dev")):
        writer = CacheWriter(tmp_path / name, identity=plain.identity, label_range=(0.0, 5.0), task=None, made_by={})
        for split in only:
            rows = plain.split(split)
            tokens = [
                np.append(range(90, 90 + SHARED), rows.input_ids(row)).astype(np.int32) for row in range(len(rows))
            ]
            out = writer.split(split, SplitRows(rows.ids, rows.target, tokens, 0, split), shard_rows=25)
            for shard in out.pending():
                with out.shard(shard) as file:
                    for position, row in enumerate(out.members(shard)):
                        own = rows.read([row]).hidden
                        shared = torch.full((1, SHARED, own.shape[2]), noise, dtype=own.dtype)
                        if differs is not None:
                            shared[:, differs, 5] += row
                        file.write(position, torch.cat([shared, own], dim=1))
        return tmp_path / name

    return make


def test_what_all_rows_begin_with_is_found_in_all_shards_of_all_splits(prompted, tmp_path):
    opened, plain = open_cache(prompted("c", noise=0)), open_cache(tmp_path / "plain")
    assert opened.split("train").shared_tokens().tolist() == [90, 91, 92]
    assert shared_tokens(opened.split("train")) == shared_tokens(opened.split("train"), opened.split("dev")) == SHARED
    assert shared_tokens(opened.split("train"), plain.split("dev")) == 0


@pytest.mark.parametrize("differs", range(SHARED))
def test_all_tokens_are_read_where_the_states_of_any_differ(prompted, differs):
    opened = open_cache(prompted("c", noise=1, differs=differs))
    assert len(opened.split("train").shared_tokens()) == SHARED
    assert shared_tokens(opened.split("train"), opened.split("dev")) == 0


def test_an_encoder_has_no_tokens_that_say_nothing(tiny_model, tiny_rows, tmp_path):
    found = {}
    for arch in ("bert", "llama"):
        settings = ExtractSettings(
            model=tiny_model(arch),
            data={"train": tiny_rows(20)},
            prompt="warm cold {text}",
            label_range=(0.0, 5.0),
            device="cpu",
        )
        extract_cache(tmp_path / arch, settings)
        split = open_cache(tmp_path / arch).split("train")
        assert len(split.shared_tokens()) >= 2
        found[arch] = shared_tokens(split)
    assert found == {"bert": 0, "llama": len(split.shared_tokens())}


def test_training_and_prediction_do_not_depend_on_what_all_rows_begin_with(prompted, tmp_path):
    """Every head, and RELISH's principal axes; the plain cache, without those tokens, gives the same weights."""
    settings = TrainSettings(heads=tuple(HEADS), depths=(1,), **SMALL)
    folders = [prompted("quiet", noise=0), prompted("loud", noise=1000)]
    for folder in folders:
        train_heads(folder, tmp_path / f"{folder.name}-runs", settings)
    plain = tmp_path / "plain"
    assert len(open_cache(plain).split("train").shared_tokens()) == 0
    train_heads(plain, tmp_path / "plain-runs", settings)
    for run in sorted((tmp_path / "plain-runs").glob("*-seed*")):
        quiet, loud = (tmp_path / f"{folder.name}-runs" / run.name for folder in folders)
        assert (quiet / "model.safetensors").read_bytes() == (loud / "model.safetensors").read_bytes()
        assert load_run(loud).head.skip == SHARED
        there, here = open_cache(plain).split("dev"), open_cache(folders[1]).split("dev")
        everything = np.arange(len(there))
        expected = load_head(run)(*there.read(everything))
        torch.testing.assert_close(load_head(loud)(*here.read(everything)), expected, rtol=0, atol=0.02)


def test_rows_held_out_for_validation_share_it(prompted, tmp_path):
    """And a head that was trained so is not given what it never read."""
    settings = TrainSettings(heads=("relish", "ridge-mean"), depths=(1,), val_split=None, **SMALL)
    splits = {"quiet": 0, "loud": 1000}
    for name, noise in splits.items():
        cache = prompted(name, noise=noise, only=("train",))
        train_heads(cache, tmp_path / f"{name}-runs", settings)
    for run in ("relish-L1-seed0", "ridge-mean-L0-seed0"):
        weights = [(tmp_path / f"{name}-runs" / run / "model.safetensors").read_bytes() for name in splits]
        assert weights[0] == weights[1]
        assert load_run(tmp_path / "loud-runs" / run).metrics["val_split"] == "train"


def test_a_call_without_a_mask_or_with_too_much_is_refused():
    head = build_head(
        HeadSpec(name="linear", hidden_size=4, depth=0, latent_size=8, num_heads=2, dropout=0.0, skip=SHARED)
    )
    hidden, mask = torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    for args, named in (((hidden,), {}), ((hidden, mask, mask), {}), ((hidden, mask), {"hidden": hidden})):
        with pytest.raises(TypeError):
            head(*args, **named)


def test_moments_leave_it_out(prompted, tmp_path):
    split = open_cache(prompted("loud", noise=1000)).split("train")
    loud = feature_moments(Rows(split, np.arange(len(split))), None, skip=SHARED)
    split = open_cache(tmp_path / "plain").split("train")
    plain = feature_moments(Rows(split, np.arange(len(split))), None)
    torch.testing.assert_close(loud.mean, plain.mean)
    torch.testing.assert_close(loud.std, plain.std)


def test_a_folder_of_heads_that_read_everything_is_refused(cache, tmp_path):
    """As those of earlier versions did."""
    settings = TrainSettings(depths=(1,), **SMALL)
    train_heads(cache, tmp_path / "runs", settings)
    path = tmp_path / "runs/relish-L1-seed0/config.json"
    config = json.loads(path.read_text())
    del config["settings"]["skipped_tokens"], config["sha256"]
    path.write_text(sealed_text(config))
    with pytest.raises(RunError, match="relish-L1-seed0 has skipped_tokens None, this one 0"):
        train_heads(cache, tmp_path / "runs", settings)
