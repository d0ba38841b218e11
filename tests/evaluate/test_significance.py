import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from scipy import stats

from relish.cache.errors import RelishError
from relish.evaluate import significance
from relish.evaluate.bootstrap import intervals, quantile_interval
from relish.evaluate.significance import (
    bootstrap_p,
    differences,
    doubled_pairs,
    draw_rows,
    holm,
    pair_seeds,
    permutation_p,
    resampled_figures,
    swapped_differences,
)
from relish.train.metrics import PAPER_METRICS, score

RANGE = (0.0, 5.0)


def sample(rows, seeds=1, noise=(0.5, 1.5), seed=0, decimals=2):
    """Gold scores and two methods' predictions (seeds, rows), off by so much."""
    rng = np.random.default_rng(seed)
    target = np.round(rng.uniform(0, 5, rows), decimals)
    ours, theirs = (np.round(target + level * rng.normal(size=(seeds, rows)), decimals) for level in noise)
    return target, ours, theirs


def compare(target, ours, theirs, draws=400, seed=0):
    rows = draw_rows(len(target), draws)
    drawn = [resampled_figures(target, lines, RANGE, rows).mean(axis=0) for lines in (ours, theirs)]
    return differences(
        target, ours, theirs, RANGE, our_resamples=drawn[0], their_resamples=drawn[1], permutations=draws, seed=seed
    )


def gap(target, ours, theirs):
    """The textbook form: scipy's figures of each line, averaged over the seeds, ours less theirs."""
    means = [
        {name: np.mean([score(target, line, RANGE)[name] for line in lines]) for name in PAPER_METRICS}
        for lines in (ours, theirs)
    ]
    return np.array([means[0][name] - means[1][name] for name in PAPER_METRICS])


@pytest.mark.parametrize("decimals", [0, 2])
def test_swaps_give_the_figures_of_the_swapped_predictions(decimals):
    target, ours, theirs = sample(6, seeds=2, decimals=decimals, seed=3)
    theirs = 3 * theirs + 1
    masks = np.array(list(product((0, 1), repeat=6)), dtype=float)
    got = swapped_differences(doubled_pairs(target, ours, theirs), 5.0, masks)
    forms = [
        lambda lines: stats.zscore(lines, axis=1),
        lambda lines: stats.rankdata(lines, axis=1),
        lambda lines: lines,
    ]
    for mask, column in zip(masks.astype(bool), got.T, strict=True):
        expected = []
        for place, form in enumerate(forms):
            one, other = form(ours), form(theirs)
            expected.append(gap(target, np.where(mask, other, one), np.where(mask, one, other))[place])
        np.testing.assert_allclose(column, expected, atol=1e-12)


def test_where_predictions_lie_changes_no_correlations_p():
    """As swapping them as they are would: between predictions that lie apart it finds no difference at all."""
    target, ours, theirs = sample(60, seeds=2, noise=(0.6, 1.3), seed=4, decimals=6)
    plain, moved = compare(target, ours, theirs), compare(target, ours, 0.2 * theirs + 7)
    assert plain["pearson"].p < 0.01
    for name in ("pearson", "spearman"):
        assert moved[name].value == pytest.approx(plain[name].value)
        assert moved[name].p == plain[name].p
    bent = compare(target, ours, np.exp(theirs))
    assert bent["spearman"].p == plain["spearman"].p


def exact_p(target, ours, theirs):
    masks = np.array(list(product((0, 1), repeat=len(target))), dtype=float)
    every = swapped_differences(doubled_pairs(target, ours, theirs), 5.0, masks)
    return [np.mean(np.abs(line) >= abs(line[0]) - 1e-12) for line in every]


def test_all_swaps_give_scipys_exact_p():
    target, ours, theirs = sample(8, seed=5)

    def pearson(a, b):
        return stats.pearsonr(target, a).statistic - stats.pearsonr(target, b).statistic

    exact = stats.permutation_test(
        (stats.zscore(ours[0]), stats.zscore(theirs[0])),
        pearson,
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=False,
    )
    assert exact_p(target, ours, theirs)[0] == pytest.approx(exact.pvalue)


def test_drawn_swaps_come_near_the_exact_p():
    target, ours, theirs = sample(9, seeds=3, noise=(0.7, 1.3), seed=1)
    draws = 4000
    for found, exact in zip(compare(target, ours, theirs, draws).values(), exact_p(target, ours, theirs), strict=True):
        assert found.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / draws) + 1 / draws)


def test_the_bootstrap_comes_near_the_enumeration_of_all_resamples():
    target, ours, theirs = sample(4, seeds=2, noise=(0.6, 1.4), seed=2)
    ways = Counter(tuple(sorted(drawn)) for drawn in product(range(4), repeat=4))
    figures = [gap(target[list(rows)], ours[:, list(rows)], theirs[:, list(rows)]) for rows in ways]
    every = np.repeat(figures, list(ways.values()), axis=0)  # all 4⁴ resamples
    found = compare(target, ours, theirs, 4000)
    for name, values in zip(PAPER_METRICS, every.T, strict=True):
        values = values[np.isfinite(values)]
        exact = min(1, 2 * min(np.mean(values <= 1e-12), np.mean(values >= -1e-12)))
        assert found[name].p_bootstrap == pytest.approx(exact, abs=0.04), name
        low, high = np.quantile(values, (0.01, 0.99))
        assert low - 1e-9 <= found[name].ci95[0] <= found[name].ci95[1] <= high + 1e-9, name


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_resamples_are_those_of_the_intervals(decimals):
    """Another implementation, in bootstrap.py, which is checked against scipy: ties and constant sides too."""
    target, ours, _ = sample(7, seeds=2, decimals=decimals)
    expected = intervals(target, ours, RANGE, resamples=300, seed=4)
    found = resampled_figures(target, ours, RANGE, draw_rows(7, 300, seed=4)).mean(axis=0)
    for name, values in zip(PAPER_METRICS, found, strict=True):
        assert quantile_interval(values) == pytest.approx(expected[name], abs=1e-9), name


def test_p_values_by_hand():
    assert permutation_p(0.3, np.array([0.1, -0.3, 0.4, 0.2])) == pytest.approx(3 / 5)
    assert permutation_p(-0.3, np.array([0.1, math.nan])) == pytest.approx(2 / 3)  # undefined counts as large
    assert bootstrap_p(np.array([0.1, 0.2, -0.1, 0.3])) == pytest.approx(2 * 2 / 5)
    assert bootstrap_p(np.array([0.1, math.nan])) == pytest.approx(1.0)
    assert bootstrap_p(np.zeros(3)) == 1


def test_a_clear_difference_is_significant_and_has_its_sign():
    target, ours, theirs = sample(200, seeds=3)
    found = compare(target, ours, theirs)
    assert found["pearson"].value > 0 > found["nrmse"].value
    for name, one in found.items():
        assert one.value == pytest.approx(gap(target, ours, theirs)[PAPER_METRICS.index(name)])
        assert one.p == pytest.approx(1 / 401)
        assert one.p_bootstrap == pytest.approx(2 / 401)
        assert one.ci95[0] < one.value < one.ci95[1]
        assert one.ci95[0] > 0 or one.ci95[1] < 0


def test_the_other_way_round_it_is_the_same_with_the_other_sign():
    target, ours, theirs = sample(40, seeds=2, noise=(0.9, 1.1))
    one, other = compare(target, ours, theirs), compare(target, theirs, ours)
    for name in PAPER_METRICS:
        assert one[name].value == pytest.approx(-other[name].value)
        assert one[name].ci95 == pytest.approx(tuple(-bound for bound in reversed(other[name].ci95)))
        assert (one[name].p, one[name].p_bootstrap) == pytest.approx((other[name].p, other[name].p_bootstrap))


def test_without_a_difference_p_is_uniform():
    found = {name: [] for name in PAPER_METRICS}
    for trial in range(200):
        target, ours, theirs = sample(40, noise=(1.0, 1.0), seed=trial, decimals=8)
        for name, one in compare(target, ours, theirs, draws=99, seed=trial).items():
            found[name].append(one.p)
    for name, values in found.items():
        assert stats.kstest(values, "uniform").pvalue > 1e-3, name
        assert np.mean(np.array(values) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200), name


def test_the_same_predictions_are_no_difference():
    target, ours, _ = sample(30, seeds=2)
    for one in compare(target, ours, ours.copy()).values():
        assert (one.value, one.p, one.p_bootstrap) == (0, 1, 1)


def test_a_constant_side_has_no_correlation_and_an_error():
    target, ours, theirs = sample(30)
    theirs[:] = 2.5
    found = compare(target, ours, theirs)
    for name in ("pearson", "spearman"):
        assert math.isnan(found[name].value)
        assert math.isnan(found[name].p)
        assert math.isnan(found[name].ci95[0])
    assert 0 < found["nrmse"].p <= 1


def test_blocks_do_not_change_the_answer(monkeypatch):
    target, ours, theirs = sample(30, noise=(0.9, 1.1))
    whole = compare(target, ours, theirs)
    monkeypatch.setattr(significance, "_BLOCK", 7 * 60)
    for name, one in compare(target, ours, theirs).items():
        assert (one.p, one.p_bootstrap) == (whole[name].p, whole[name].p_bootstrap)


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs"),
    [
        ((0, 1, 2), (0, 1, 2), ([0, 1, 2], [0, 1, 2])),
        ((0, 1, 2), (0,), ([0, 1, 2], [0, 0, 0])),
        ((5,), (0, 1), ([0, 0], [0, 1])),
        ((0, 1, 2), (2, 0, 1), ([0, 1, 2], [1, 2, 0])),
        ((0, 1, 2), (2, 0), ([0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1])),  # one of theirs diverged
        ((0, 1), (7, 8), ([0, 0, 1, 1], [0, 1, 0, 1])),
    ],
)
def test_which_seeds_are_compared(ours, theirs, pairs):
    assert pair_seeds(ours, theirs) == pairs


def test_a_seed_less_on_one_side_leaves_the_difference_of_the_means():
    target, ours, theirs = sample(40, seeds=3)
    one, other = pair_seeds((0, 1, 2), (0, 2))
    found = compare(target, ours[one], theirs[[0, 2]][other])
    for name, value in zip(PAPER_METRICS, gap(target, ours, theirs[[0, 2]]), strict=True):
        assert found[name].value == pytest.approx(value)
        assert found[name].ci95[0] < value < found[name].ci95[1]


def test_holm_by_hand():
    # Ascending 0.005 × 4, 0.01 × 3, 0.03 × 2, 0.04 × 1; the last is lifted to the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.04]) == [0.04]
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06] * 3)
    assert holm([]) == []


def test_holm_leaves_out_what_is_undefined():
    adjusted = holm([0.03, math.nan, 0.02])
    assert adjusted[::2] == pytest.approx([0.04, 0.04])
    assert math.isnan(adjusted[1])


def test_holm_is_never_below_the_p_and_keeps_their_order():
    values = np.random.default_rng(0).uniform(0, 0.3, 12)
    adjusted = np.array(holm(values.tolist()))
    assert (adjusted >= values).all()
    order = np.argsort(values)
    assert (np.diff(adjusted[order]) >= 0).all()
    # The closed form: the i-th smallest is rejected at a level if all before it are.
    for level in (0.05, 0.2):
        step = [values[place] <= level / (12 - rank) for rank, place in enumerate(order)]
        expected = np.cumprod(step).astype(bool)
        assert (adjusted[order] <= level).tolist() == expected.tolist()


def test_values_that_are_not_finite_are_refused():
    target, ours, theirs = sample(10)
    ours[0, 3] = math.nan
    with pytest.raises(RelishError, match="1 of 20 predictions are not finite"):
        doubled_pairs(target, ours, theirs)
