"""How many works go to a worker at once, and that nothing of a batch is lost or run twice, wherever it breaks off."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from orchestrator.sweep import trainable
from orchestrator.sweep.batches import BATCH_S, LAST, MOST, SHARE, Batches, take_back, take_loss
from orchestrator.sweep.state import Sweep
from orchestrator.sweep.trainable import run_works
from orchestrator.sweep.work import Work
from tests.orchestrator.sweep.test_state import Bench, fake_trial
from workers.trial import TrialResult, TrialSpec

HERE = "tests.orchestrator.sweep.test_batches"
DEAD: set[str] = set()
"""Trials at which the process of the worker ends before they have an attempt."""

SLOW_S = 0.0


class Died(BaseException):
    """Stands for the end of a process: nothing after it runs."""


def trial(spec: TrialSpec) -> TrialResult:
    time.sleep(SLOW_S)
    if spec.trial_id in DEAD:
        raise Died
    return fake_trial(spec)


@pytest.fixture(autouse=True)
def nobody_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    DEAD.clear()
    monkeypatch.setattr(f"{HERE}.SLOW_S", 0.0)


def take(sweep: Sweep, count: int) -> list[Work]:
    return [work for _ in range(count) if (work := sweep.next_work()) is not None]


def run(works: list[Work]) -> list[tuple[list[dict[str, Any]], float]]:
    return run_works([work.to_dict(f"{HERE}:trial") for work in works])


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, trials=6, sampler={"name": "random"}, retries=1)


def attempts(bench: Bench) -> list[str]:
    return sorted(bench.ledger.attempts(["trial_id"])["trial_id"].to_pylist())


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_works_of_a_second_and_more_go_one_by_one() -> None:
    batches = Batches()
    assert batches.size(10_000) == 1, "nothing is known of them"
    batches.note([0.01] * LAST)
    assert batches.size(10_000) == MOST
    batches.note([BATCH_S * 1.01])
    assert batches.size(10_000) == 1, "the slowest of the last counts"
    batches.note([0.24] * LAST)
    assert batches.size(10_000) == 4, "they fit into a second"


def test_a_batch_is_a_small_part_of_what_is_known() -> None:
    batches = Batches()
    batches.note([0.01] * LAST)
    assert [batches.size(done) for done in (0, SHARE, 2 * SHARE - 1, 5 * SHARE)] == [1, 1, 1, 5]
    alone = Batches(most=1)
    alone.note([0.01] * LAST)
    assert alone.size(10_000) == 1


# --- what becomes of them ---------------------------------------------------------------------------------------------


def test_each_work_of_a_batch_has_its_own_attempt_and_answer(bench: Bench) -> None:
    sweep = bench.open()
    bench.run(sweep, 1)
    works = take(sweep, 3)
    found = run(works)
    assert [len(outcomes) for outcomes, _ in found] == [1, 1, 1]
    assert all(seconds > 0 for _, seconds in found)
    take_back(sweep, works, [outcomes for outcomes, _ in found])
    assert len(attempts(bench)) == 1 + 3
    assert [t.state for t in sweep.proposer.study.trials] == [TrialState.COMPLETE] * 3
    assert not sweep.open


def test_what_a_worker_did_not_come_to_is_handed_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{HERE}.SLOW_S", 0.02)
    monkeypatch.setattr(trainable, "BATCH_S", 0.03)
    sweep = bench.open()
    bench.run(sweep, 1)
    works = take(sweep, 4)
    found = run(works)
    assert 0 < len(found) < 4
    take_back(sweep, works, [outcomes for outcomes, _ in found])
    assert len(attempts(bench)) == 1 + len(found)
    assert [w.number for w in take(sweep, 4 - len(found))] == [w.number for w in works[len(found) :]]


def test_a_fault_of_the_storage_ends_a_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.sweep.state.STORAGE_PATIENCE_S", (0.0, 1.0, 0.0))
    from tests.orchestrator.sweep.test_state import FAILS

    sweep = bench.open()
    bench.run(sweep, 1)
    works = take(sweep, 3)
    FAILS[f"{works[1].recipe.label()}/0"] = "storage_fault"
    found = run(works)
    assert [outcomes[0]["status"] for outcomes, _ in found] == ["ok", "storage_fault"]
    take_back(sweep, works, [outcomes for outcomes, _ in found])
    FAILS.clear()
    assert [w.number for w in take(sweep, 2)] == [works[1].number, works[2].number]


def die(bench: Bench, sweep: Sweep, at: int) -> tuple[list[Work], list[str]]:
    """Runs a batch of three whose worker ends at one of them; returns the batch and what lies in the ledger then."""
    works = take(sweep, 3)
    DEAD.add(works[at].specs[0].trial_id)
    with pytest.raises(Died):
        run(works)
    DEAD.clear()
    return works, attempts(bench)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_worker_that_dies_in_a_batch_loses_and_repeats_nothing(bench: Bench, at: int) -> None:
    sweep = bench.open()
    bench.run(sweep, 1)
    works, before = die(bench, sweep, at)
    assert len(before) == 1 + at
    bench.ledger.mark_running(
        works[at].specs[0].trial_id, {"pid": 1, "started_at": time.time()}
    )  # as a dead process leaves it
    take_loss(sweep, works, "worker_died", "gone", bench.ledger.running())
    rows = bench.ledger.attempts(["trial_id", "status"]).to_pylist()
    assert [r["trial_id"] for r in rows if r["status"] == "worker_died"] == [works[at].specs[0].trial_id], (
        "who ran is to blame, and nobody else"
    )
    bench.run(sweep)
    assert sweep.finished
    ok = [r["trial_id"] for r in bench.ledger.attempts(["trial_id", "status"]).to_pylist() if r["status"] == "ok"]
    assert len(ok) == len(set(ok)) == 1 + 6
    assert bench.statuses() == ["ok"] * 6


def test_a_worker_that_dies_between_two_works_is_nobody_s_fault(bench: Bench) -> None:
    sweep = bench.open()
    bench.run(sweep, 1)
    works = take(sweep, 3)
    run(works[:1])
    take_loss(sweep, works, "worker_died", "gone", bench.ledger.running())
    assert "worker_died" not in bench.ledger.attempts(["status"])["status"].to_pylist()
    assert [w.number for w in take(sweep, 2)] == [works[1].number, works[2].number]


def test_a_worker_that_dies_before_its_first_work_is_counted(bench: Bench) -> None:
    sweep = bench.open()
    bench.run(sweep, 1)
    for _ in range(2):  # retries are 1
        works = take(sweep, 3)
        take_loss(sweep, works, "worker_died", "gone", bench.ledger.running())
    assert bench.statuses().count("worker_died") >= 1, "or a worker that cannot start would be tried for ever"


def test_a_driver_killed_beside_a_batch_goes_on_with_what_is_left(bench: Bench) -> None:
    killed = bench.open()
    bench.run(killed, 1)
    works, _ = die(bench, killed, 1)
    resumed = bench.open()
    assert resumed.snapshot().done == 1
    again = bench.run(resumed)
    assert [w.number for w in again[:2]] == [works[1].number, works[2].number]
    assert bench.statuses() == ["ok"] * 6
    assert len(bench.ledger.attempts(["trial_id"])) == 1 + 6
