"""Probabilities of being on the frontier against closed forms, and against the truth of simulated studies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from orchestrator.frontier.draws import bootstrapped
from orchestrator.frontier.membership import CERTAIN, POSSIBLE, Drawn, judged, shares
from tests.drawn import MONTE_CARLO, exact, images, speed


@pytest.mark.parametrize("z", [-2.5, -1.0, 0.0, 0.5, 1.0, 2.0])
def test_two_points_have_the_analytic_probability(z):
    sigma = np.array([0.03, 0.04])
    found = judged([exact(1.0, 2.0), speed([0.0, -0.05 * z], sigma)])  # the larger is on the frontier if it is faster
    assert found.group.tolist() == [0, 1]
    assert found.probability[0] == 1.0
    assert found.probability[1] == pytest.approx(stats.norm.cdf(z), abs=MONTE_CARLO)


def test_three_in_a_chain_of_one_objective():
    found = judged([exact(3.0, 2.0, 1.0), speed([0.0, 0.0, 0.0], 0.02)])
    assert found.group.tolist() == [0, 1, 2]
    assert found.probability == pytest.approx([1 / 3, 1 / 2, 1], abs=MONTE_CARLO)


def test_equal_predictions_never_part():
    same = Drawn(-bootstrapped(images(287, range(9), range(9), range(9))), np.full(3, np.inf))
    found = judged([same, exact(1.0, 2.0, 1.0)])
    assert found.group.tolist() == [0, 1, 0]
    assert found.probability.tolist() == [1.0, 0.0]


def test_the_mean_of_equal_draws_is_equal_to_them():
    rng = np.random.default_rng(0)
    right = np.tile((rng.random(287) < 0.93).astype(np.float32), (8, 1))
    accuracy = Drawn(-bootstrapped(right), np.full(8, np.inf))
    found = judged([accuracy, exact(*[1.0] * 7, 2.0)])
    assert found.group.tolist() == [0] * 7 + [1]
    assert found.probability.tolist() == [1.0, 0.0]


def test_a_speed_beyond_its_limit_counts_as_the_worst():
    found = judged([exact(1.0, 2.0, 3.0), speed([0.5, 0.3, -0.2], 0.01, limit=0.0)])
    assert found.probability.tolist() == [
        1.0,
        0.0,
        1.0,
    ]  # the second is faster than the first, but slower than the baseline
    free = judged([exact(1.0, 2.0, 3.0), speed([0.5, 0.3, -0.2], 0.01)])
    assert free.probability.tolist() == [1.0, 1.0, 1.0]


def test_what_the_place_rests_on():
    found = judged([exact(1.0, 2.0), speed([0.0, -0.01], 0.02)])
    assert POSSIBLE < found.probability[1] < CERTAIN
    assert found.settled().tolist() == [1.0, 1.0]
    shares_of_draws = found.dominated_by(np.array([1]), np.array([0, 1]))
    assert shares_of_draws.tolist() == [pytest.approx([1 - found.probability[1], 0.0])]
    accuracy = Drawn(-bootstrapped(images(100, range(5), range(1, 5))), np.full(2, np.inf))
    untimed = judged([exact(1.0, 2.0), accuracy])
    assert untimed.settled() is untimed.probability


def test_runs_of_the_same_recipes_do_not_contradict_each_other():
    rng = np.random.default_rng(6)
    contradicted = 0
    for _ in range(40):
        n = 24
        strength = rng.random(n)
        size = np.round(1 - 0.9 * strength * rng.random(n), 2)
        log = -0.7 * strength * rng.random(n)
        right = (rng.random((n, 287)) < (0.98 - 0.1 * strength**2)[:, None]).astype(np.float32)
        accuracy = Drawn(-bootstrapped(right), np.full(n, np.inf))
        ends = []
        for run in range(2):
            measured = log + rng.normal(0, 0.02, n)
            found = judged(
                [accuracy, exact(*size), speed(measured, 0.02, [f"{run} {rng.integers(2**60)}"] * 0 or None)]
            )
            ends.append(found.probability[found.group])
        first, second = ends
        contradicted += bool(
            ((first >= CERTAIN) & (second < POSSIBLE)).any() or ((second >= CERTAIN) & (first < POSSIBLE)).any()
        )
    assert contradicted <= 1


def test_certain_members_are_members_and_probabilities_are_calibrated():
    rng = np.random.default_rng(7)
    said, true = [], []
    for _ in range(150):
        n, sigma = 12, 0.03
        size, log = rng.random(n), rng.normal(0, 0.06, n)  # flat about where it was measured, nearly
        truth = log + rng.normal(0, sigma, n)
        names = [f"{rng.integers(2**60)}" for _ in range(n)]
        found = judged([exact(*size), speed(log, sigma, names)])
        said.append(found.probability[found.group])
        true.append(shares([size[:, None], truth[:, None]]))
    said, true = np.concatenate(said), np.concatenate(true)
    for low, high in [(0.0, 0.05), (0.05, 0.3), (0.3, 0.7), (0.7, 0.95), (0.95, 1.01)]:
        inside = (said >= low) & (said < high)
        assert inside.sum() > 20
        error = 3.5 * math.sqrt(0.25 / inside.sum())
        assert true[inside].mean() == pytest.approx(said[inside].mean(), abs=error)
