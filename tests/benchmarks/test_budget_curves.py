from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.budget_curves import COSTS, Run, Spent, on_grid, quartiles, reached, share

OBJECTIVES = {"top1_pct": "maximize", "size_bytes": "minimize"}


def run(points: Sequence[tuple[float, float, float] | tuple[float, None]], side: str = "stock", seed: int = 0) -> Run:
    """A baseline of 100 % and 1,000 bytes, the reference at 90 % and 1,100 bytes; (seconds, top-1, bytes) an attempt."""
    trials = []
    for seconds, *values in points:
        found = None if values == [None] else dict(zip(OBJECTIVES, values, strict=True))
        trials.append(Spent(dict.fromkeys(COSTS, float(seconds or 0)), found))  # type: ignore[arg-type]
    base = {"top1_pct": 100.0, "size_bytes": 1000.0}
    return Run("made", side, seed, OBJECTIVES, base, (90.0, 1100.0), tuple(trials))


def test_a_curve_adds_rectangles() -> None:
    costs, volumes = run([(3, 98.0, 500.0), (2, None), (4, 80.0, 1.0), (1, 95.0, 100.0)]).curve()
    assert costs.tolist() == [0, 3, 5, 9, 10]
    alone = 0.10 * 0.1
    first = alone + 0.08 * (1.0 - 0.5)  # what the baseline has at this accuracy, and from 1,000 bytes down to 500
    last = first + 0.05 * (0.5 - 0.1)
    assert volumes == pytest.approx(
        [alone, first, first, first, last]
    )  # a failure and what is beyond the reference add nothing


def test_a_level_is_reached_at_the_first_attempt_that_is_there() -> None:
    costs, volumes = np.array([0.0, 3.0, 5.0]), np.array([0.1, 0.4, 0.4])
    assert reached(costs, volumes, 0.4) == 3.0
    assert reached(costs, volumes, 0.1) == 0.0
    assert reached(costs, volumes, 0.41) == math.inf


def test_quartiles_are_values_and_take_infinity() -> None:
    assert quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (2.0, 3.0, 4.0)
    assert quartiles([1.0, math.inf, 2.0, math.inf, 3.0]) == (2.0, 3.0, math.inf)
    assert quartiles([1.0, math.inf, math.inf]) == (1.0, math.inf, math.inf)


def test_the_share_is_what_is_needed_for_the_median_level_of_stock() -> None:
    stock = [run([(50, 98.0, size), (50, 91.0, 900.0)], seed=i) for i, size in enumerate((700.0, 500.0, 300.0))]
    ours = [
        run([(5, 98.0, 600.0), (5, 98.0, 500.0), (9, 98.0, 100.0)], "ours", 0),
        run([(30, 98.0, 500.0)], "ours", 1),
        run([(7, 98.0, 501.0)], "ours", 2),
    ]
    found = share(stock, ours)
    assert found.level == stock[1].volume
    assert found.stock == 100.0
    assert (found.needed, found.of_stock) == ((10.0, 30.0, math.inf), (0.1, 0.3, math.inf))
    assert (found.reached, found.runs) == (2, 3)


def test_other_questions_do_not_compare() -> None:
    one = run([(1, 98.0, 500.0)])
    with pytest.raises(ValueError, match="2 questions"):
        share([one], [replace(one, reference=(0.0, 1100.0))])
    with pytest.raises(ValueError, match="0 of the other"):
        share([one], [])


def test_a_run_survives_json() -> None:
    one = run([(3, 98.0, 500.0), (2, None)])
    assert Run.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_a_grid_holds_the_last_volume_and_ends_with_the_run() -> None:
    one = run([(3, 98.0, 500.0), (2, 98.0, 100.0)])
    volumes = one.curve()[1]
    found = on_grid([one], np.array([0.0, 2.9, 3.0, 5.0, 5.1]))
    assert found[0, :4].tolist() == [volumes[0], volumes[0], volumes[1], volumes[2]]
    assert np.isnan(found[0, 4])
