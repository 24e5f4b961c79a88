"""The process against its definition, written out with inverses; its gradient against differences; rows one by one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import approx_fprime
from scipy.stats import multivariate_normal, norm

from orchestrator.sampling import gaussian_process as gp
from orchestrator.sampling.gaussian_process import Process, Products

RNG = np.random.default_rng(0)
X = (RNG.random((40, 12)) < 0.4).astype(float)
NEW = (RNG.random((9, 12)) < 0.4).astype(float)
SCALE = gp.scale_of(X)
THETA = np.log([0.7, 0.2, 0.5, 1.3, 0.05])
Y = RNG.normal(size=40)


def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.zeros((len(a), len(b)))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            inner = SCALE * (1 + x @ y)
            out[i, j] = 0.7 * inner + 0.2 * inner**2 + 0.5 * np.exp(-((x - y) ** 2).sum() / 1.3)
    return out


def test_the_covariance_is_its_formula() -> None:
    assert Products.of(X, NEW, SCALE).covariance(THETA) == pytest.approx(kernel(X, NEW))
    assert gp.variances(NEW, SCALE, THETA) == pytest.approx(np.diag(kernel(NEW, NEW)))
    assert np.mean(np.diag(Products.of(X, X, SCALE).inner)) == pytest.approx(1)


def test_predictions_are_those_of_the_normal_distribution() -> None:
    covariance = kernel(X, X) + gp.noise(THETA) * np.eye(40)
    across = kernel(X, NEW)
    mean = across.T @ np.linalg.inv(covariance) @ Y
    spread = np.sqrt(np.diag(kernel(NEW, NEW) - across.T @ np.linalg.inv(covariance) @ across))
    process = Process(THETA, Products.of(X, X, SCALE))
    assert process.mean(across, Y) == pytest.approx(mean)
    assert process.deviation(across, gp.variances(NEW, SCALE, THETA)) == pytest.approx(spread)


@pytest.mark.parametrize("steps", [(40,), (25, 40), (10, 11, 39, 40)])
def test_points_may_come_at_any_pace_and_be_taken_back(steps: tuple[int, ...]) -> None:
    whole = Process(THETA, Products.of(X, X, SCALE))
    process = Process(THETA, Products.of(X[: steps[0]], X[: steps[0]], SCALE))
    for start, end in pairwise(steps):
        wrong = NEW[: 40 - start]
        process.add(Products.of(wrong, np.concatenate([X[:start], wrong]), SCALE))
        process.truncate(start)
        process.add(Products.of(X[start:end], X[:end], SCALE))
    assert process.factor == pytest.approx(whole.factor)


def test_a_point_without_a_value_changes_no_mean_and_makes_its_surroundings_surer() -> None:
    across, prior = kernel(X, NEW), gp.variances(NEW, SCALE, THETA)
    process = Process(THETA, Products.of(X, X, SCALE))
    mean, spread = process.mean(across, Y), process.deviation(across, prior)
    process.add(Products.of(NEW[:1], np.concatenate([X, NEW[:1]]), SCALE))
    more = kernel(np.concatenate([X, NEW[:1]]), NEW)
    assert process.mean(more, Y) == pytest.approx(mean)
    assert (process.deviation(more, prior) <= spread + 1e-9).all()
    assert process.deviation(more, prior)[0] < 0.5 * spread[0]


def test_the_fit_climbs_the_marginal_likelihood_times_the_priors() -> None:
    truth = np.log([0.1, 0.05, 1.0, 2.0, 0.01])
    products = Products.of(X, X, SCALE)
    y = np.linalg.cholesky(products.covariance(truth) + gp.noise(truth) * np.eye(40)) @ RNG.normal(size=40)
    y = (y - y.mean()) / y.std()

    def posterior(theta: np.ndarray) -> float:
        covariance = products.covariance(theta) + gp.noise(theta) * np.eye(40)
        likelihood = multivariate_normal(np.zeros(40), covariance).logpdf(y)
        return float(likelihood + norm(gp.PRIOR, gp.PRIOR_SD).logpdf(theta).sum())

    found = gp.fit(gp.PRIOR, products, y)
    assert posterior(found) > posterior(gp.PRIOR)
    inside = np.array([low + 0.01 < t < high - 0.01 for t, (low, high) in zip(found, gp.BOUNDS, strict=True)])
    best = gp.fit(gp.fit(gp.fit(found, products, y), products, y), products, y)
    slope = approx_fprime(best, posterior, 1e-5)
    assert np.abs(slope[inside]) == pytest.approx(np.zeros(inside.sum()), abs=0.05)


def test_leaving_one_out_is_what_the_others_predict() -> None:
    predicted, off = gp.leave_one_out(THETA, Products.of(X, X, SCALE), Y)
    for i in (0, 17, 39):
        rest = np.arange(40) != i
        covariance = kernel(X[rest], X[rest]) + gp.noise(THETA) * np.eye(39)
        across = kernel(X[rest], X[i : i + 1])[:, 0]
        mean = across @ np.linalg.inv(covariance) @ Y[rest]
        variance = (
            kernel(X[i : i + 1], X[i : i + 1])[0, 0] + gp.noise(THETA) - across @ np.linalg.inv(covariance) @ across
        )
        assert predicted[i] == pytest.approx(mean)
        assert off[i] == pytest.approx((Y[i] - mean) / np.sqrt(variance))
