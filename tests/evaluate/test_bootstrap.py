import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relish.cache.errors import RelishError
from relish.evaluate import bootstrap
from relish.evaluate.bootstrap import intervals
from relish.train.metrics import METRICS, score

RANGE = (0.0, 5.0)


def sample(rows, seeds=1, seed=0, decimals=1):
    rng = np.random.default_rng(seed)
    target = np.round(rng.uniform(0, 5, rows), decimals)
    return target, np.round(target + rng.normal(0, 1, (seeds, rows)), decimals)


def oracle(target, predictions, resamples, seed):
    """The textbook loop: draw rows, score them with scipy, average over the seeds."""
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        drawn = rng.integers(len(target), size=len(target))
        figures = [list(score(target[drawn], line[drawn], RANGE).values()) for line in predictions]
        values.append(np.mean(figures, axis=0))
    columns = np.array(values).T
    result = {}
    for name, column in zip(METRICS, columns, strict=True):
        column = column[np.isfinite(column)]
        result[name] = tuple(np.quantile(column, (0.025, 0.975))) if len(column) else (math.nan, math.nan)
    return result


@pytest.mark.parametrize(("rows", "decimals"), [(2, 0), (7, 0), (40, 0), (40, 8), (301, 1)])
def test_equals_the_loop_over_scipy(rows, decimals):
    target, predictions = sample(rows, seeds=2, seed=rows, decimals=decimals)
    got = intervals(target, predictions, RANGE, resamples=70, seed=3)
    expected = oracle(target, predictions, resamples=70, seed=3)
    for name in METRICS:
        assert got[name] == pytest.approx(expected[name], abs=1e-9, nan_ok=True), name


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=25).filter(
        lambda rows: sum(count for *_, count in rows) > 0
    )
)
def test_weighted_figures_equal_scipy_on_the_rows_written_out(rows):
    target, prediction, weights = np.array(rows, dtype=float).T
    # The weights must add up to N as a resample's do: rows of weight 0 fill up, or more rows of weight 1 would.
    total = int(weights.sum())
    if total < len(rows):
        weights[0] += len(rows) - total
    else:
        fill = total - len(rows)
        target, prediction = np.append(target, np.zeros(fill)), np.append(prediction, np.zeros(fill))
        weights = np.append(weights, np.zeros(fill))
    written = np.repeat(np.arange(len(weights)), weights.astype(int))
    pair = bootstrap._Pair.prepare(target, prediction)
    got = dict(zip(METRICS, pair.metrics(weights[:, None], 5.0)[:, 0], strict=True))
    assert got == pytest.approx(score(target[written], prediction[written], RANGE), abs=1e-9, nan_ok=True)


def test_the_same_seed_gives_the_same_intervals_and_another_does_not():
    target, predictions = sample(50)
    first = intervals(target, predictions, RANGE, resamples=50, seed=1)
    assert intervals(target, predictions, RANGE, resamples=50, seed=1) == first
    assert intervals(target, predictions, RANGE, resamples=50, seed=2) != first


def test_blocks_do_not_change_the_answer(monkeypatch):
    target, predictions = sample(50, seeds=2)
    whole = intervals(target, predictions, RANGE, resamples=50)
    monkeypatch.setattr(bootstrap, "_BLOCK_ELEMENTS", 7 * 50)
    for name, limits in intervals(target, predictions, RANGE, resamples=50).items():
        assert limits == pytest.approx(whole[name], abs=1e-12)


def test_intervals_hold_the_figure_and_shrink_with_more_rows():
    widths = []
    for rows in (100, 1600):
        target, predictions = sample(rows, seeds=3)
        figures = [score(target, line, RANGE) for line in predictions]
        got = intervals(target, predictions, RANGE, resamples=200)
        for name, (low, high) in got.items():
            assert low < np.mean([figure[name] for figure in figures]) < high
        widths.append(got["pearson"][1] - got["pearson"][0])
    assert widths[1] < widths[0] / 2


def test_coverage_of_known_values():
    # Bivariate normal with correlation r: Spearman is 6/pi asin(r/2), Kendall 2/pi asin(r) (Kruskal 1958).
    r, trials = 0.6, 200
    truth = {
        "pearson": r,
        "spearman": 6 / math.pi * math.asin(r / 2),
        "kendall": 2 / math.pi * math.asin(r),
        "rmse": math.sqrt(2 - 2 * r),
        "mae": math.sqrt(2 - 2 * r) * math.sqrt(2 / math.pi),
    }
    hits = dict.fromkeys(truth, 0)
    rng = np.random.default_rng(5)
    for _ in range(trials):
        target = rng.normal(size=150)
        prediction = r * target + math.sqrt(1 - r * r) * rng.normal(size=150)
        got = intervals(target, prediction[None], RANGE, resamples=200)
        for name, value in truth.items():
            hits[name] += got[name][0] <= value <= got[name][1]
    # 0.95 less what 200 resamples and the percentile method lose; three standard errors of 200 trials are 0.05.
    for name, count in hits.items():
        assert 0.88 <= count / trials <= 0.995, (name, count / trials)


def test_a_collapsed_seed_leaves_correlations_undefined_and_errors_defined():
    target, predictions = sample(30, seeds=2)
    predictions[1] = 2.5
    got = intervals(target, predictions, RANGE, resamples=40)
    assert all(math.isnan(bound) for name in ("pearson", "spearman", "kendall") for bound in got[name])
    assert all(math.isfinite(bound) for name in ("nrmse", "rmse", "mae") for bound in got[name])


def test_one_row():
    got = intervals([1.0], [[2.0]], RANGE, resamples=10)
    assert got["rmse"] == (1, 1)
    assert math.isnan(got["pearson"][0])


def test_wrong_input():
    with pytest.raises(RelishError, match=r"shape \(seeds, N\)"):
        intervals([1, 2], [1, 2], RANGE)
    with pytest.raises(RelishError, match=r"\(2,\) and \(3,\)"):
        intervals([1, 2], [[1, 2, 3]], RANGE)
    with pytest.raises(RelishError, match="1 of 2 predictions are not finite"):
        intervals([1, 2], [[1, math.nan]], RANGE)
    with pytest.raises(RelishError, match="label range"):
        intervals([1, 2], [[1, 2]], (3, 3))


def test_time_does_not_grow_with_the_square_of_the_rows():
    def seconds(rows):
        target, predictions = sample(rows, decimals=8)
        times = []
        for _ in range(3):  # other work on the machine slows a few
            start = time.process_time()
            intervals(target, predictions, RANGE, resamples=64)
            times.append(time.process_time() - start)
        return min(times)

    seconds(500)
    assert seconds(16_000) < 32 * seconds(2_000)  # 8 times the rows; their square would take 64 times as long
