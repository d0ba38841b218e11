import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from relish.train.ridge import ALPHAS, Moments, solve_ridge


@pytest.mark.parametrize(("rows", "width"), [(200, 7), (20, 50)])
def test_closed_form_equals_scikit_learn_at_every_penalty(rows, width):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(rows, width)) * draw.uniform(0.1, 30, width) + draw.normal(size=width) * 10
    y = x[:, 0] - 0.3 * x[:, 1] + draw.normal(size=rows)
    sums = Moments.of(((x[i : i + 13].astype(np.float32), y[i : i + 13]) for i in range(0, rows, 13)), width)
    scaler = StandardScaler().fit(x)
    for alpha, (weights, intercept) in zip(ALPHAS, solve_ridge(sums), strict=True):
        model = Ridge(alpha=alpha).fit(scaler.transform(x), y)
        expected = model.predict(scaler.transform(x))
        np.testing.assert_allclose(x @ weights + intercept, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("constant", [3.0, 0.1, 1234.5, 0.0])
def test_a_constant_feature_does_no_harm(constant):
    x = np.column_stack([np.arange(10.0), np.full(10, constant)])
    sums = Moments.of([(x, 2 * x[:, 0])], 2)
    weights, intercept = solve_ridge(sums, (1e-9,))[0]
    np.testing.assert_allclose(x @ weights + intercept, 2 * x[:, 0], atol=1e-6)
    assert abs(weights[1]) < 1e-5  # of 2: rounding, which differs between processors
