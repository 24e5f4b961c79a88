"""Samplers on tables: shares against a slow count, nothing evaluated twice, gaps, exhaustion, the same seed the same run."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.sampling.tables import OutcomeTable, TableError, read_outcomes
from orchestrator.study.sampler import SamplerSection
from orchestrator.study.scalars import SAMPLERS
from orchestrator.sweep.audit import Audit, Yardstick, audit, checkpoints
from tests.outcome_tables import OBJECTIVES, PARAMETERS, rows, written


@pytest.fixture
def table(tmp_path: Path) -> OutcomeTable:
    return read_outcomes(written(tmp_path, rows()), PARAMETERS, OBJECTIVES)


def line(tmp_path: Path, points: list[tuple[float, float]]) -> OutcomeTable:
    """A table with one parameter, ``at``, which numbers the points (gain, cost)."""
    data = [{"at": at, "gain": gain, "cost": cost} for at, (gain, cost) in enumerate(points)]
    return read_outcomes(written(tmp_path, data), ["at"], {"gain": "maximize", "cost": "minimize"})


def test_shares_are_those_of_areas_counted_by_hand(tmp_path: Path) -> None:
    """Frontier (gain, cost): (0, 0), (2, 1), (3, 3), (4, 4); scaled by 4, with the nadir (0, 4), it covers 2 x 3 + 1 x 1 = 7 units."""
    table = line(tmp_path, [(0, 0), (2, 1), (3, 3), (4, 4), (1, 2), (5, 9), (-3, -1)][:5])
    yardstick = Yardstick(table)
    assert yardstick.share([0, 1, 2, 3, 4]) == pytest.approx(1)
    assert yardstick.share([1]) == pytest.approx(6 / 7)
    assert yardstick.share([2]) == pytest.approx(3 / 7)
    assert yardstick.share([4]) == pytest.approx(2 / 7)
    assert yardstick.share([0, 3]) == 0  # the frontier's ends
    assert yardstick.share([]) == 0


def test_units_do_not_count(tmp_path: Path, table: OutcomeTable) -> None:
    scaled = replace(table, values=table.values * [1e-3, 1e6] + [7.0, -4.0])
    some = [3, 50, 117, 200]
    assert Yardstick(scaled).share(some) == pytest.approx(Yardstick(table).share(some))


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([(1, 1), (0, 2), (0, 3)], "gain, cost does not"),
        ([(1, 2), (0, 1)], "2 different members, all of them at its nadir"),
    ],
)
def test_a_frontier_without_a_volume_is_refused(points: list[tuple[float, float]], said: str, tmp_path: Path) -> None:
    with pytest.raises(TableError) as error:
        Yardstick(line(tmp_path, points))
    assert said in str(error.value)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_that_may_see_everything_finds_everything(sampler: str, tmp_path: Path) -> None:
    small = [r for r in rows() if r["width"] in (8, 64) and r["dropout"] != 0.5]
    table = read_outcomes(written(tmp_path, small), PARAMETERS, OBJECTIVES)
    found = audit(table, Yardstick(table), SamplerSection(name=sampler, population_size=10), len(table))
    assert (found.evaluations, found.hypervolume_share, found.infeasible) == (64, pytest.approx(1), 0)
    assert list(found.curve) == [10, 20, 50, 64]
    assert all(earlier <= later for earlier, later in pairwise(found.curve.values()))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gaps_of_the_grid_are_proposed_and_not_evaluated(sampler: str, tmp_path: Path) -> None:
    kept = [r for at, r in enumerate(rows()) if at % 3 == 0]
    table = read_outcomes(written(tmp_path, kept), PARAMETERS, OBJECTIVES)
    found = audit(table, Yardstick(table), SamplerSection(name=sampler, population_size=10), 40)
    assert found.evaluations == 40
    assert found.hypervolume_share > 0


def test_repeats_are_counted_and_answered_from_memory(table: OutcomeTable) -> None:
    """Random draws repeat themselves: 60 of 240 meet a known one about 7 times, each time a new one is evaluated in its place."""
    found = audit(table, Yardstick(table), SamplerSection(name="random"), 60)
    assert found.evaluations == 60
    assert 0 < found.duplicates < 30


def test_a_seed_says_all(table: OutcomeTable) -> None:
    def run(seed: int) -> Audit:
        return replace(audit(table, Yardstick(table), SamplerSection(name="tpe", seed=seed), 40), ask_ms_p50=0.0)

    assert run(0) == run(0)
    assert run(0).curve != run(1).curve


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_known_beforehand_changes_what_recipe_chooses_and_nothing_else(sampler: str, tmp_path: Path) -> None:
    """A latency that follows from nothing cannot be learnt, and need not be where it is known."""
    noise = random.Random(0)
    data = [row | {"latency": row["accuracy"] / 10 + noise.random()} for row in rows()]
    table = read_outcomes(written(tmp_path, data), PARAMETERS, OBJECTIVES)
    yardstick, section = Yardstick(table), SamplerSection(name=sampler, seed=2)
    blind, told = (audit(table, yardstick, section, 30, known) for known in ((), ("latency",)))
    assert blind.curve[10] == told.curve[10]
    if sampler == "recipe":
        assert told.hypervolume_share > blind.hypervolume_share
    else:
        assert told.curve == blind.curve


def test_a_reference_point_is_told_to_samplers_that_take_one(tmp_path: Path) -> None:
    """Told or assumed makes another search of a sampler that uses it, and the same of one that does not."""
    table = read_outcomes(written(tmp_path, rows()), PARAMETERS, OBJECTIVES)
    yardstick = Yardstick(table)
    assert yardstick.share([i for i, v in enumerate(table.values) if (v == yardstick.reference).all()]) == 0
    for sampler, differs in (("recipe", True), ("random", False)):
        section = SamplerSection(name=sampler, seed=1, n_startup_trials=5)
        found = [audit(table, yardstick, section, 40, told_reference=told) for told in (True, False)]
        assert (found[0].curve != found[1].curve) == differs


def test_points_of_a_curve() -> None:
    assert checkpoints(5) == [5]
    assert checkpoints(10) == [10]
    assert checkpoints(200) == [10, 20, 50, 100, 200]
    assert checkpoints(1234) == [10, 20, 50, 100, 200, 500, 1000, 1234]
