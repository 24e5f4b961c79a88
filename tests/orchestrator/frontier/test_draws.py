"""Quantiles and draws against closed forms and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from orchestrator.frontier.draws import DRAWS, WORST, bootstrapped, counted, normals
from orchestrator.frontier.quantiles import floor_width, t975
from tests.drawn import MONTE_CARLO, images


@pytest.mark.parametrize("count", [2, 3, 7, 11, 12, 25, 60])
def test_floor_is_that_of_the_studentized_range(count):
    few = stats.norm.ppf(0.975) / stats.t.ppf(0.975, 4)  # what Student's t has widened already
    expected = stats.studentized_range.ppf(0.95, count, 4) * few / math.sqrt(2)
    assert floor_width(count) == pytest.approx(expected, abs=7e-3)


def test_floor_of_a_pair_is_the_usual_test_and_grows():
    assert floor_width(2) == pytest.approx(stats.norm.ppf(0.975), abs=1e-4)
    assert (np.diff(floor_width(np.arange(2, 3000))) > 0).all()


@pytest.mark.parametrize("dof", [1, 2, 5, 14, 15, 16, 40, 1000])
def test_student(dof):
    assert t975(dof) == pytest.approx(stats.t.ppf(0.975, dof), abs=1e-4)


def test_normals_are_stratified_independent_and_the_same_in_any_company():
    drawn = normals([f"trial {i}" for i in range(200)])
    quantiles = stats.norm.ppf((np.arange(DRAWS) + 0.5) / DRAWS)
    assert np.sort(drawn, axis=1) == pytest.approx(np.tile(quantiles, (200, 1)), abs=1e-9)
    correlation = np.corrcoef(drawn) - np.eye(200)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(DRAWS)
    assert correlation.std() == pytest.approx(1 / math.sqrt(DRAWS), rel=0.1)
    assert (normals(["trial 7", "another"])[0] == drawn[7]).all()


@pytest.mark.parametrize(("right", "total"), [(281, 287), (287, 287), (40, 100), (9_900, 10_000)])
def test_an_accuracy_alone_has_the_posterior_of_a_uniform_prior(right, total):
    drawn = bootstrapped(images(total, range(total - right)))[0] / 100
    expected = stats.beta(right + 1, total - right + 1)
    assert drawn.mean() == pytest.approx(expected.mean(), abs=4 * expected.std() / math.sqrt(DRAWS))
    for share in (0.05, 0.5, 0.95):
        assert (drawn < expected.ppf(share)).mean() == pytest.approx(share, abs=MONTE_CARLO)


@pytest.mark.parametrize(("only_first", "only_second"), [(1, 0), (2, 0), (5, 0), (3, 2), (12, 20), (40, 60)])
@pytest.mark.parametrize("total", [200, 20_000])
def test_which_of_two_is_better_has_jeffreys_prior(only_first, only_second, total):
    both = list(range(180, 190))
    first = bootstrapped(images(total, [*both, *range(100, 100 + only_second)], [*both, *range(only_first)]))
    expected = stats.beta(only_first + 0.5, only_second + 0.5).sf(0.5)
    assert (first[0] > first[1]).mean() == pytest.approx(
        expected, abs=MONTE_CARLO + 0.03
    )  # 64 pseudo-images, not infinite


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("images", [301, 9001])
def test_equal_predictions_have_equal_draws_wherever_they_stand(seeds, images):
    rng = np.random.default_rng(0)
    rows = (rng.random((seeds, 30, images)) < 0.9).mean(axis=0).astype(np.float32)
    rows[[4, 11, 29]] = rows[0]
    drawn = bootstrapped(rows)
    assert (drawn[[4, 11, 29]] == drawn[0]).all()
    assert (bootstrapped(rows[[29, 3]]) == drawn[[29, 3]]).all()
    assert len(np.unique(drawn[:, 0])) == 27


def test_differences_of_accuracies_are_paired():
    rows = images(1000, range(100), [*range(95), *range(100, 110)])
    gap = np.subtract(*bootstrapped(rows))
    alone = bootstrapped(rows[:1])[0].std()
    assert gap.std() == pytest.approx(100 * math.sqrt(16) / 1002, rel=0.1)  # 15 images and 1 of the prior
    assert gap.std() < 0.4 * math.sqrt(2) * alone


def test_a_limit_is_counted_per_candidate():
    values = np.array([[1.0, 2.0], [1.0, 2.0]])
    assert counted(values, np.array([1.5, np.inf])).tolist() == [[1.0, np.inf], [1.0, 2.0]]
    assert np.isposinf(WORST)
