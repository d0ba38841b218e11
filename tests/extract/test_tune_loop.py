import numpy as np
import pytest

from relish.cache.errors import DataError
from relish.extract.rows import SplitData
from relish.extract.sources import TextData
from relish.extract.tune_loop import EpochRecord, describe, epoch_batches, figures, warmup_cosine
from relish.extract.tune_rows import choose_rows
from relish.train.metrics import score


def test_figures_are_those_of_evaluate():
    draw = np.random.default_rng(0)
    target = draw.uniform(0, 5, 50)
    prediction = target + draw.normal(0, 1, 50)
    expected = score(target, prediction, (0, 5))
    assert figures(target, prediction, (0.0, 5.0)) == pytest.approx((expected["nrmse"], expected["pearson"]))


def test_a_constant_has_no_correlation():
    nrmse, pearson = figures(np.array([1.0, 3.0]), np.array([2.0, 2.0]), (0.0, 5.0))
    assert (nrmse, pearson) == (pytest.approx(0.2), None)
    line = describe(EpochRecord(1, 0.5, nrmse, pearson, 1.0), 3)
    assert line == "epoch 1 of 3: loss 0.5000, val NRMSE 0.2000, val Pearson –"


def test_an_epoch_has_each_row_once_and_every_epoch_another_order():
    batches = epoch_batches(10, 4, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(np.concatenate(batches)) == list(range(10))
    orders = {tuple(np.concatenate(epoch_batches(10, 4, seed, epoch))) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert np.array_equal(np.concatenate(epoch_batches(10, 4, 0, 0)), np.concatenate(batches))


def test_the_learning_rate_rises_and_falls():
    rates = [warmup_cosine(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0
    assert rates[52] == pytest.approx(0.5 * (1 + np.cos(np.pi * 47 / 95)))
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert warmup_cosine(0, 1) == 1.0


def data(**splits):
    made = {
        name: SplitData([f"{name}-{n}" for n in range(len(targets))], [f"text {n}" for n in targets], np.array(targets))
        for name, targets in splits.items()
    }
    return TextData(made, "{text}", (0.0, 100.0), False)


@pytest.mark.parametrize("name", ["validation", "val", "dev", "trial"])
def test_the_validation_split_by_its_usual_names(name):
    train, val = choose_rows(data(train=[1.0, 2.0], test=[3.0], **{name: [4.0, 5.0]}), None)
    assert (train.name, train.target.tolist(), val.name, val.target.tolist()) == ("train", [1, 2], name, [4, 5])
    assert train.texts == ["text 1.0", "text 2.0"]


def test_held_out_rows_are_not_trained_on():
    given = data(train=list(map(float, range(40))))
    train, val = choose_rows(given, None)
    assert (len(train), len(val)) == (36, 4)
    assert sorted([*train.target, *val.target]) == list(range(40))
    few, same = choose_rows(given, 10)
    assert set(few.target) < set(train.target)
    assert same.target.tolist() == val.target.tolist()
    fewer, _ = choose_rows(given, 5)
    assert set(fewer.target) < set(few.target)  # a smaller subset is part of a larger one


def test_too_many_rows_are_refused():
    with pytest.raises(DataError, match="--rows asks for 37 training rows, and there are 36"):
        choose_rows(data(train=list(map(float, range(40)))), 37)
