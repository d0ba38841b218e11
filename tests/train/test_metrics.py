import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn import metrics as sklearn_metrics

from relish.cache.errors import RelishError
from relish.train.metrics import HIGHER_IS_BETTER, METRIC_NAMES, METRICS, score

RANGE = (0.0, 5.0)


def scores(rows=200, seed=0, decimals=1):
    rng = np.random.default_rng(seed)
    target = np.round(rng.uniform(0, 5, rows), decimals)
    return target, np.round(target + rng.normal(0, 1, rows), decimals)


def pairs():
    # Multiples of 1/4: ties are common, and an affine change of them is exact enough to keep ties and order.
    values = st.integers(-40, 40).map(lambda quarter: quarter / 4)
    rows = st.integers(2, 30)
    return rows.flatmap(
        lambda n: st.tuples(hnp.arrays(float, n, elements=values), hnp.arrays(float, n, elements=values))
    )


def test_names_are_in_the_order_of_the_files():
    assert METRICS == ("pearson", "spearman", "kendall", "nrmse", "rmse", "mae")
    assert set(METRIC_NAMES) == set(HIGHER_IS_BETTER) == set(METRICS)
    assert tuple(score(*scores(), RANGE)) == METRICS


def test_against_other_implementations():
    target, prediction = scores()
    got = score(target, prediction, RANGE)
    assert got["pearson"] == pytest.approx(np.corrcoef(target, prediction)[0, 1], abs=1e-12)
    ranks = stats.rankdata(target), stats.rankdata(prediction)
    assert got["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)
    x = np.sign(target[:, None] - target)
    y = np.sign(prediction[:, None] - prediction)
    assert got["kendall"] == pytest.approx((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()), abs=1e-12)
    assert got["rmse"] == pytest.approx(sklearn_metrics.root_mean_squared_error(target, prediction), abs=1e-12)
    assert got["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(target, prediction), abs=1e-12)
    assert got["nrmse"] == pytest.approx(got["rmse"] / 5, abs=1e-12)


def test_nrmse_divides_by_the_label_range_and_not_by_the_range_of_the_rows():
    got = score([2.0, 3.0], [3.0, 4.0], (1, 5))
    assert got["nrmse"] == pytest.approx(0.25)


def test_perfect_predictions():
    target, _ = scores()
    assert score(target, target, RANGE) == pytest.approx(
        {"pearson": 1, "spearman": 1, "kendall": 1, "nrmse": 0, "rmse": 0, "mae": 0}
    )


@given(pairs(), st.sampled_from([0.5, 2.0, 8.0]), st.integers(-64, 64))
def test_correlations_do_not_depend_on_scale_and_offset(pair, scale, offset):
    target, prediction = pair
    before = score(target, prediction, RANGE)
    after = score(target, prediction * scale + offset, RANGE)
    for name in ("pearson", "spearman", "kendall"):
        assert after[name] == pytest.approx(before[name], abs=1e-9, nan_ok=True)


@given(pairs(), st.randoms(use_true_random=False))
def test_symmetries(pair, random):
    target, prediction = pair
    before = score(target, prediction, RANGE)
    swapped = score(prediction, target, RANGE)
    order = random.sample(range(len(target)), len(target))
    shuffled = score(target[order], prediction[order], RANGE)
    negated = score(-target, prediction, RANGE)
    for name in METRICS:
        assert swapped[name] == pytest.approx(before[name], abs=1e-9, nan_ok=True)
        assert shuffled[name] == pytest.approx(before[name], abs=1e-9, nan_ok=True)
    for name in ("pearson", "spearman", "kendall"):
        assert negated[name] == pytest.approx(-before[name], abs=1e-9, nan_ok=True)
    assert before["mae"] <= before["rmse"] + 1e-12


@pytest.mark.parametrize("side", ["target", "prediction"])
def test_a_constant_side_has_no_correlation_and_warns_nothing(side):
    target, prediction = scores(20)
    if side == "target":
        target = np.full(20, 0.1)
    else:
        prediction = np.full(20, 0.1)
    got = score(target, prediction, RANGE)
    assert all(math.isnan(got[name]) for name in ("pearson", "spearman", "kendall"))
    assert all(math.isfinite(got[name]) for name in ("nrmse", "rmse", "mae"))


def test_a_nearly_constant_side_warns_nothing():
    target, _ = scores(20)
    prediction = 2.5 + 1e-15 * np.arange(20)
    assert math.isfinite(score(target, prediction, RANGE)["spearman"])


def test_one_row():
    got = score([1.0], [2.0], RANGE)
    assert math.isnan(got["pearson"])
    assert got["rmse"] == 1


def test_float32_is_scored_in_float64():
    target, prediction = scores()
    single = prediction.astype(np.float32)
    assert score(target, single, RANGE) == score(target, single.astype(np.float64), RANGE)


def test_values_that_are_not_finite_are_counted():
    target, prediction = scores(10)
    prediction[[1, 4]] = math.nan
    prediction[7] = math.inf
    with pytest.raises(RelishError, match=r"3 of 10 predictions are not finite"):
        score(target, prediction, RANGE)
    target[0] = math.nan
    with pytest.raises(RelishError, match=r"1 of 10 targets are not finite"):
        score(target, np.zeros(10), RANGE)


def test_wrong_shapes():
    with pytest.raises(RelishError, match=r"\(3,\) and \(2,\)"):
        score([1, 2, 3], [1, 2], RANGE)
    with pytest.raises(RelishError, match=r"\(2, 1\)"):
        score([[1], [2]], [[1], [2]], RANGE)
    with pytest.raises(RelishError, match="no rows"):
        score([], [], RANGE)


@pytest.mark.parametrize("label_range", [(5, 0), (1, 1), (0, math.inf), (math.nan, 1)])
def test_an_empty_label_range(label_range):
    with pytest.raises(RelishError, match="label range must be finite with minimum below maximum"):
        score([1, 2], [1, 2], label_range)


def test_a_label_range_of_three_numbers():
    with pytest.raises(RelishError, match="two numbers"):
        score([1, 2], [1, 2], (0, 1, 2))
