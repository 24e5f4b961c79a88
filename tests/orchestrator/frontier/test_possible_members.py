"""Pruning against the same question without pruning, and against what dominates whom in each draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from orchestrator.frontier.membership import shares
from orchestrator.frontier.possible_members import HOPELESS, Known, contenders, front
from tests.drawn import exact, speed


@st.composite
def problems(draw):
    """Candidates with exact and uncertain objectives, some beyond a limit, with ties."""
    n = draw(st.integers(2, 40))
    grid = st.integers(0, 12).map(lambda v: v / 8)
    columns = [np.array(draw(st.lists(grid, min_size=n, max_size=n))) for _ in range(3)]
    sigma = np.array(draw(st.lists(st.sampled_from([0.0, 0.01, 0.03, 0.1]), min_size=n, max_size=n)))
    limit = draw(st.sampled_from([np.inf, 0.7]))
    return columns, sigma, limit


def drawn_and_known(problem, rows=None):
    (size, first, second), sigma, limit = problem
    rows = np.arange(len(size)) if rows is None else rows
    names = [f"trial {i}" for i in rows.tolist()]
    drawn = [
        exact(*size[rows]),
        speed(first[rows], sigma[rows], [f"{n} first" for n in names], limit),
        speed(second[rows], sigma[rows], [f"{n} second" for n in names]),
    ]
    zero, endless = np.zeros(len(rows)), np.full(len(rows), np.inf)
    known = [
        Known(size[rows], zero, endless),
        Known(first[rows], sigma[rows], np.full(len(rows), limit)),
        Known(second[rows], sigma[rows], endless),
    ]
    return drawn, known


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_pruning_changes_nothing(problem):
    drawn, known = drawn_and_known(problem)
    everyone = shares([o.counted() for o in drawn])
    kept = contenders(known, front(known), 1000)
    few, _ = drawn_and_known(problem, kept)
    assert (everyone[np.setdiff1d(np.arange(len(everyone)), kept)] == 0).all()
    assert (shares([o.counted() for o in few]) == everyone[kept]).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_shares_are_counted_right(problem):
    drawn, _ = drawn_and_known(problem)
    worlds = np.stack(np.broadcast_arrays(*[o.counted() for o in drawn]), axis=-1)
    as_good = (worlds[:, None] <= worlds[None]).all(axis=-1)
    better = (worlds[:, None] < worlds[None]).any(axis=-1)
    expected = (~(as_good & better).any(axis=0)).mean(axis=-1)
    assert shares([o.counted() for o in drawn]) == pytest.approx(expected)


def test_a_margin_of_five_standard_deviations_of_the_difference():
    for gap, left in [(0.99, 2), (1.01, 1)]:
        step = gap * HOPELESS * math.hypot(0.03, 0.04)
        known = [Known(np.array([0.0, step]), np.array([0.03, 0.04]), np.full(2, np.inf))] * 2
        assert len(contenders(known, front(known), 1000)) == left


def test_of_too_many_the_least_surely_dominated_are_left():
    rng = np.random.default_rng(5)
    n, most = 30_000, 1000
    centre = np.round(rng.random((3, n)), 2)  # with ties, which no margin parts
    known = [Known(c, np.full(n, 0.2), np.full(n, np.inf)) for c in centre]
    rivals = front(known)
    assert len(contenders(known, rivals, n)) == n
    kept = contenders(known, rivals, most)
    assert len(kept) == pytest.approx(most, rel=0.2)  # chosen by a sample of 4,000: 130 of it, give or take 11
    assert np.isin(rivals, kept).all()
    gaps = (centre[:, None, :] - centre[:, rivals, None]) / (0.2 * math.sqrt(2))
    surely = np.where((gaps > 0).any(axis=0), stats.norm.cdf(gaps).prod(axis=0), 0).max(axis=0)
    left = np.isin(np.arange(n), kept)
    assert surely[left].max() <= surely[~left].min() + 0.03  # three objectives, each within 0.01
    order = rng.permutation(n)
    turned = [Known(c[order], known[0].sigma, known[0].limit) for c in centre]
    assert (np.sort(order[contenders(turned, front(turned), most)]) == kept).all()


def test_what_counts_as_the_worst_dominates_nobody_when_too_many_are_left():
    exact_one = Known(np.array([0.0, 1.0, 2.0, 3.0]), np.zeros(4), np.full(4, np.inf))
    timed = Known(np.array([0.0, 1.2, -3.0, 1.4]), np.full(4, 1.0), np.full(4, 1.0))
    assert front([exact_one, timed]).tolist() == [0, 2]
    assert contenders([exact_one, timed], np.array([0, 2]), 4).tolist() == [0, 1, 2, 3]
    assert contenders([exact_one, timed], np.array([0, 2]), 2).tolist() == [0, 2]
