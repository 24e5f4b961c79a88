"""Knees against hand-made frontiers, and budgets: best within, nearest beyond, and texts that are none."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.frontier.choosing import BEST, NEAREST, knee, parse_budget, within_budget
from orchestrator.study.constraints import ConstraintError

# --- knee -------------------------------------------------------------------------------------------------------------


def test_the_knee_is_where_the_frontier_bulges_most():
    found = knee([[0.0, 10.0], [1.0, 4.0], [2.0, 2.0], [6.0, 1.0], [10.0, 0.0]])
    assert (found.row, found.bulges) == (2, True)
    assert found.losses == pytest.approx([0.2, 0.2])


def test_the_knee_is_farthest_from_the_line_through_the_extremes():
    rng = np.random.default_rng(0)
    for _ in range(50):
        angle = np.sort(np.concatenate([[0, np.pi / 2], rng.uniform(0, np.pi / 2, 20)]))
        points = np.stack([1 - np.sin(angle), 1 - np.cos(angle)], axis=1) * [3.0, 700.0]
        scaled = points / [3.0, 700.0]
        distance = (1 - scaled.sum(axis=1)) / np.sqrt(2)  # to the line x + y = 1, on the ideal point's side
        assert knee(points).row == np.argmax(distance)


def test_units_do_not_move_the_knee():
    points = np.random.default_rng(1).random((30, 3))
    assert knee(points).row == knee(points * [1e9, 1e-3, 5.0] + [7.0, 0.0, -2.0]).row


@pytest.mark.parametrize(
    "points",
    [[[3.0, 5.0]], [[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.7, 0.7], [1.0, 0.0]], [[1.0, 2.0], [1.0, 2.0]]],
)
def test_where_nothing_bulges_there_is_no_knee(points):
    found = knee(points)
    assert found.row == 0
    assert found.bulges is (len(points) == 1 or points[0] == points[1])


def test_an_objective_in_which_all_are_equal_does_not_matter():
    points = np.array([[0.0, 10.0], [2.0, 2.0], [10.0, 0.0]])
    flat = np.insert(points, 1, 4.0, axis=1)
    assert knee(flat).row == knee(points).row == 1


# --- budgets ----------------------------------------------------------------------------------------------------------

COSTS = np.array([[-98.0, 9.0], [-97.0, 6.5], [-96.0, 6.0], [-96.0, 5.0], [-90.0, 2.0], [-99.0, np.nan]])
"""Accuracy, turned, and size."""


def chosen(*budget: str, latency=(1.0,) * 6) -> dict[str, int]:
    values = {"size_bytes": COSTS[:, 1], "top1_pct": -COSTS[:, 0], "latency_ms_p50": np.array(latency)}
    return within_budget(COSTS, values, parse_budget(budget))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (["size_bytes<=6"], {BEST: 3, NEAREST: 1}),  # of two as accurate the smaller
        (["size_bytes<=6.5"], {BEST: 1, NEAREST: 0}),
        (["size_bytes<6.5"], {BEST: 3, NEAREST: 1}),
        (["size_bytes<=100"], {BEST: 0}),
        (["size_bytes<=6", "top1_pct >= 97"], {NEAREST: 3}),  # 1 % of one bound beyond; number 1 is 8 % of the other
        (["size_bytes<=6 and top1_pct >= 97"], {NEAREST: 3}),
        (["size_bytes<=1"], {NEAREST: 4}),
    ],
)
def test_best_within_and_nearest_beyond(budget, expected):
    assert chosen(*budget) == expected


def test_what_is_not_known_is_neither():
    assert chosen("latency_ms_p50<=1", latency=[np.nan, 1, 1, 2, 2, 1]) == {BEST: 1}
    assert chosen("latency_ms_p50<=1", latency=[np.nan] * 6) == {}


def test_nearest_is_by_shares_of_the_bounds():
    costs = np.array([[0.0], [1.0]])
    values = {"size_bytes": np.array([110.0, 100.0]), "latency_ms_p50": np.array([1.0, 1.2])}
    assert within_budget(costs, values, parse_budget(["size_bytes<=100", "latency_ms_p50<=1"])) == {NEAREST: 0}


def test_parts_of_a_budget():
    assert list(map(str, parse_budget(["size_bytes<=6e6 AND params<2e6", "top1_pct >=97"]))) == [
        "size_bytes <= 6e+06",
        "params < 2e+06",
        "top1_pct >= 97",
    ]
    assert parse_budget([]) == []


@pytest.mark.parametrize(
    "text", ["", "size_bytes", "size_bytes<=", "size_bytes == 3", "size_bytes<=6MB", "params<2 and"]
)
def test_malformed_budgets(text):
    with pytest.raises(ConstraintError, match=r"must be a metric, one of <= >= < >, and a number; write it like"):
        parse_budget([text])


def test_an_unknown_metric_gets_the_nearest():
    with pytest.raises(ConstraintError, match=r"'size_byte<=3' must name one of .*did you mean size_bytes\?"):
        parse_budget(["params<3", "size_byte<=3"])
