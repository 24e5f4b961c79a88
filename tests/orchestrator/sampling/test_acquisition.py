"""Improvements against moocore's hypervolume, and what is assumed where no reference point is given."""

from __future__ import annotations

import moocore
import numpy as np
import pytest

from orchestrator.sampling import acquisition
from orchestrator.sampling.acquisition import Improvement, assumed_reference, draws, lengths


@pytest.mark.parametrize("objectives", [2, 3])
def test_improvements_are_in_proportion_to_those_of_the_hypervolume(
    objectives: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acquisition, "DIRECTIONS", 40_000)
    rng = np.random.default_rng(1)
    front, points = rng.random((12, objectives)), rng.random((30, objectives)) * 0.6
    reference = np.full(objectives, 1.1)
    found = Improvement(front, reference, np.ones(objectives), rng).of(points)
    before = moocore.hypervolume(front, ref=reference)
    exact = np.array([moocore.hypervolume(np.vstack([front, p]), ref=reference) - before for p in points])
    assert exact.max() > 0.05
    ratio = found.sum() / exact.sum()
    assert found / ratio == pytest.approx(exact, abs=0.01 * exact.max() + 0.004)


def test_what_adds_nothing_is_worth_nothing() -> None:
    rng = np.random.default_rng(0)
    front, reference = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([2.0, 2.0])
    worth = Improvement(front, reference, np.ones(2), rng)
    nothing = np.array(
        [[0.0, 1.0], [1.5, 1.0], [-5.0, 2.0], [3.0, -9.0]]
    )  # there, dominated, at and beyond the reference
    assert worth.of(nothing) == pytest.approx(np.zeros(4))
    assert (worth.of(np.array([[0.5, 0.5], [-1.0, 1.0]])) > 0).all()


def test_an_empty_frontier_is_improved_by_whatever_lies_before_the_reference() -> None:
    worth = Improvement(np.zeros((0, 2)), np.array([1.0, 1.0]), np.ones(2), np.random.default_rng(0))
    assert worth.of(np.array([[0.9, 0.9]]))[0] > 0


def test_draws_come_with_their_opposites() -> None:
    found = draws(8, 3, np.random.default_rng(0))
    assert found.shape == (8, 3)
    assert found.sum(0) == pytest.approx(np.zeros(3))


def test_an_assumed_reference_lies_beyond_the_frontier_or_beyond_what_came_first() -> None:
    front, first = np.array([[0.0, 10.0], [1.0, 5.0]]), np.array([[0.5, 50.0], [0.2, 7.0]])
    assert assumed_reference(front, first, far=False) == pytest.approx([1.1, 10.5])
    assert assumed_reference(front, first, far=True) == pytest.approx([1.1, 54.5])


def test_lengths_are_positive_even_where_the_frontier_lies_at_the_reference() -> None:
    assert lengths(np.array([[1.0, 0.0]]), np.array([3.0, 0.0])) == pytest.approx([2.0, 1.0])
