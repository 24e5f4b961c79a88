"""The sweep's decisions without Ray: budget, seeds, retries, and being rebuilt from the ledger at any moment."""

from __future__ import annotations

import errno
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from orchestrator.ledger import Ledger
from orchestrator.study.load import load_study
from orchestrator.study.schema import StudyConfig, model_info
from orchestrator.sweep import state
from orchestrator.sweep.opening import open_sweep
from orchestrator.sweep.state import Sweep
from orchestrator.sweep.trainable import run_specs
from orchestrator.sweep.work import Work
from tests.studies import tiny_study
from workers.node.storage import LocalStorage
from workers.techniques import registry, versions
from workers.trial import Recipe, Step, TrialResult, TrialSpec

FAILS: dict[str, str] = {}
"""Recipe label and seed to how the trial ends; all others are ok."""


TOME = asdict(registry()["tome"].Config())
MERGE = {name: [value] for name, value in TOME.items()} | {"r": {"low": 1, "high": 2, "step": 1}}
"""A space of two merging recipes."""

EQUAL: dict[str, Recipe] = {}
"""Recipe label to the recipe whose stages the trial proves to have."""


def fake_trial(spec: TrialSpec) -> TrialResult:
    """Ends at once, with numbers that follow from recipe and seed."""
    status = FAILS.get(f"{spec.recipe.label()}/{spec.seed}", "ok")
    value = int(spec.recipe.hash[:4], 16) / 700.0
    metrics = {"top1_pct": value + spec.seed, "size_bytes": 1000.0 + value} if status == "ok" else {}
    failure = None if status == "ok" else "told to fail"
    first = EQUAL.get(spec.recipe.label())
    conditions = {"stages_of": first.to_json()} if first and status == "ok" else {}
    attempt = f"{spec.seed}-{id(spec):x}"
    return TrialResult(spec.trial_id, attempt, status, failure, metrics, time.time(), 0.1, conditions)


@pytest.fixture(autouse=True)
def no_failures() -> None:
    FAILS.clear()
    EQUAL.clear()


class Bench:
    """Opens the sweep of one study again and again, as a driver does at every start."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.storage = LocalStorage(folder)
        self.config = load_study(tiny_study("s", **changes))
        self.context = self.config.context()
        self.ledger = Ledger(self.storage, "s")

    def open(
        self, config: StudyConfig | None = None, retry: Collection[str] = (), finish: Collection[str] = ()
    ) -> Sweep:
        return open_sweep(
            config or self.config,
            self.context,
            model_info(self.context),
            self.ledger,
            storage_url=self.storage.url,
            token="",
            versions=versions(),
            retry=retry,
            finish=finish,
        )

    def run(self, sweep: Sweep, most: int = 100) -> list[Work]:
        """Runs up to ``most`` works, one at a time, and returns them."""
        done: list[Work] = []
        while len(done) < most and (work := sweep.next_work()) is not None:
            sweep.ended(work, run_work(work))
            done.append(work)
        return done

    def statuses(self) -> list[str]:
        rows = self.ledger.trials(["status", "is_baseline"]).to_pylist()
        return sorted(r["status"] for r in rows if not r["is_baseline"])


def run_work(work: Work) -> list[dict[str, Any]]:
    return run_specs(work.to_dict("tests.orchestrator.sweep.test_state:fake_trial"))


def numbers(works: list[Work]) -> list[int | None]:
    return [work.number for work in works]


def test_the_baseline_comes_first_and_the_budget_is_kept(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=4)
    sweep = bench.open()
    first = sweep.next_work()
    assert first is not None
    assert first.number is None
    assert sweep.next_work() is None, "nothing is proposed before the baseline is known"
    assert not sweep.finished
    sweep.ended(first, run_work(first))
    assert numbers(bench.run(sweep)) == [0, 1, 2, 3]
    assert sweep.finished
    assert sweep.snapshot().done == 4


def test_a_failed_baseline_stops_the_study(tmp_path: Path) -> None:
    FAILS["baseline/0"] = "error"
    sweep = Bench(tmp_path).open()
    bench = Bench(tmp_path)
    assert numbers(bench.run(sweep)) == [None]
    assert sweep.finished
    assert sweep.stopping == "the baseline failed (error)"
    FAILS.clear()
    assert len(bench.run(bench.open())) == 1 + bench.config.trials, "a resume tries it again"


def test_what_was_in_flight_is_issued_again_under_its_number(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=6)
    killed = bench.open()
    bench.run(killed, 3)  # the baseline, 0 and 1
    flying = [killed.next_work() for _ in range(2)]
    resumed = bench.open()
    assert resumed.snapshot().done == 2
    works = bench.run(resumed)
    assert numbers(works) == [2, 3, 4, 5]
    assert [w.recipe for w in works[:2]] == [w.recipe for w in flying if w]
    assert bench.statuses() == ["ok"] * 6
    assert [a["number"] for a in bench.ledger.asks(bench.context.digest) if "specs" in a] == list(range(6))
    assert bench.run(bench.open()) == []


def test_an_attempt_that_arrives_after_the_successor_started_counts(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=3)
    killed = bench.open()
    bench.run(killed, 2)
    late = killed.next_work()
    assert late is not None
    resumed = bench.open()
    run_work(late)  # a process that outlived its killed driver
    assert late.number not in numbers(bench.run(resumed))
    assert len(bench.ledger.attempts(["attempt_id"])) == 1 + 3


def test_a_finished_study_is_extended(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=3)
    bench.run(bench.open())
    assert bench.open().finished
    more = bench.open(bench.config.model_copy(update={"trials": 5}))
    assert len(bench.run(more)) == 2
    assert bench.statuses() == ["ok"] * 5


def test_a_small_space_ends_before_the_budget(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=50, techniques={"precision": {}, "tome": {"r": [1], "schedule": ["constant"]}})
    sweep = bench.open()
    works = bench.run(sweep)
    assert sweep.exhausted
    assert sweep.finished
    assert 0 < len(works) - 1 == len({w.recipe.hash for w in works[1:]}) == sweep.proposer.space.size() < 50


def test_seeds_are_rows_of_their_own_and_their_mean_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=2, seeds=[0, 4])
    sweep = bench.open()
    _, first, second = bench.run(sweep)
    rows = bench.ledger.trials(["seed", "recipe_hash", "top1_pct", "is_baseline"]).to_pylist()
    mine = {r["seed"]: r["top1_pct"] for r in rows if r["recipe_hash"] == first.recipe.hash}
    assert mine[4] == mine[0] + 4
    assert sweep.proposer.study.trials[0].values[0] == pytest.approx(mine[0] + 2)
    assert len(second.specs) == 2


def test_seeds_that_are_done_are_not_run_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=2, seeds=[0, 4])
    killed = bench.open()
    bench.run(killed, 1)
    work = killed.next_work()
    assert work is not None
    run_specs({**work.to_dict("tests.orchestrator.sweep.test_state:fake_trial"), "specs": [work.specs[0].to_dict()]})
    resumed = bench.open()
    again = resumed.next_work()
    assert again is not None
    assert (again.number, [s.seed for s in again.specs]) == (0, [4])
    resumed.ended(again, run_work(again))
    assert resumed.proposer.study.trials[0].state == TrialState.COMPLETE


def lose(sweep: Sweep, times: int, status: str = "worker_died") -> Work:
    for _ in range(times):
        work = sweep.next_work()
        assert work is not None
        sweep.lost(work, status, "gone")
    return work


def test_a_lost_worker_is_retried_and_then_given_up_until_the_next_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=3, retries=2)
    sweep = bench.open()
    bench.run(sweep, 1)
    lost = lose(sweep, 3)
    assert sweep.proposer.study.trials[0].state == TrialState.FAIL
    bench.run(sweep)
    assert bench.statuses() == ["ok", "ok", "worker_died"]
    assert len(bench.ledger.attempts(["attempt_id"])) == 1 + 3 + 2
    resumed = bench.open()
    assert [w.recipe for w in bench.run(resumed)] == [lost.recipe]
    assert bench.statuses() == ["ok"] * 3


def test_out_of_memory_is_not_retried(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=2)
    sweep = bench.open()
    bench.run(sweep, 1)
    lost = lose(sweep, 1, "host_oom")
    assert sweep.proposer.study.trials[0].state == TrialState.PRUNED
    assert lost.recipe.hash not in {w.recipe.hash for w in bench.run(sweep)}
    assert bench.run(bench.open()) == []


def test_what_a_lost_worker_still_wrote_counts(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=1, seeds=[0, 1])
    sweep = bench.open()
    bench.run(sweep, 1)
    work = sweep.next_work()
    assert work is not None
    FAILS[f"{work.recipe.label()}/1"] = "timeout"
    run_work(work)
    sweep.lost(work, "worker_died", "gone after its last attempt was written")
    assert sweep.finished
    assert bench.statuses() == ["ok", "timeout"]
    assert sweep.proposer.study.trials[0].state == TrialState.PRUNED


def test_work_is_issued_again_after_a_broken_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=2)
    sweep = bench.open()
    bench.run(sweep, 1)
    lost = sweep.next_work()
    assert lost is not None
    sweep.lost(lost, "node_lost", "gone")  # an earlier loss must not count as its end
    retried = sweep.next_work()
    assert retried is not None
    sweep.again(retried)
    assert numbers(bench.run(sweep)) == [0, 1]
    assert bench.statuses() == ["ok", "ok"]


def test_after_the_time_budget_nothing_is_issued(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=4, budget={"time": 60})
    sweep = bench.open()
    bench.run(sweep, 2)
    flying = sweep.next_work()
    assert flying is not None
    sweep.started -= 61
    assert sweep.next_work() is None
    assert not sweep.finished, "what is in flight may end"
    sweep.lost(flying, "worker_died", "gone")
    assert sweep.finished, "but is not retried"
    assert sweep.snapshot().done == 1
    works = bench.run(bench.open())
    assert works[0].number == flying.number
    assert len(works) == 3


# --- the storage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "STORAGE_PATIENCE_S", (0.0, 1.0, 0.0))


@pytest.mark.usefixtures("no_patience")
def test_a_fault_of_the_storage_is_retried_and_then_pauses_the_study(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=4, retries=2)
    sweep = bench.open()
    first = bench.run(sweep, 2)[1]
    flying, other = sweep.next_work(), sweep.next_work()
    assert flying is not None
    assert other is not None
    FAILS[f"{flying.recipe.label()}/0"] = "storage_fault"
    sweep.ended(flying, run_work(flying))
    works = bench.run(sweep)
    assert numbers(works) == [1, 1], "nothing else is issued before it passes"
    assert sweep.stopping == "storage: told to fail"
    assert sweep.paused
    assert not sweep.finished, "what is in flight may end"
    sweep.ended(other, run_work(other))
    assert sweep.finished
    assert sweep.snapshot().done == 2
    states = [t.state for t in sweep.proposer.study.trials]
    assert states == [TrialState.COMPLETE, TrialState.RUNNING, TrialState.COMPLETE], (
        "nothing is told as a recipe's fault"
    )
    assert bench.statuses() == ["ok", "ok", "storage_fault"]
    FAILS.clear()
    again = bench.run(bench.open())
    assert len(again) == 2
    assert again[0].number == 1
    assert again[0].recipe == flying.recipe
    assert bench.statuses() == ["ok"] * 4
    assert first.number == 0


@pytest.mark.usefixtures("no_patience")
def test_a_fault_that_passes_costs_nothing_but_attempts(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=2, retries=1)
    sweep = bench.open()
    FAILS["baseline/0"] = "storage_fault"
    bench.run(sweep, 1)
    FAILS.clear()
    bench.run(sweep)
    assert sweep.finished
    assert sweep.stopping is None
    assert bench.statuses() == ["ok", "ok"]


def test_after_a_fault_of_the_storage_work_waits(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=2)
    sweep = bench.open()
    bench.run(sweep, 1)
    lose(sweep, 1, "storage_fault")
    assert sweep.next_work() is None
    assert not sweep.finished
    sweep._not_before = 0.0
    assert len(bench.run(sweep)) == 2


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("when", ["asked", "written", "read"])
def test_a_driver_that_cannot_use_the_storage_pauses(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, trials=3)
    sweep = bench.open()
    bench.run(sweep, 2)
    flying = sweep.next_work()
    assert flying is not None

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "disk")

    with monkeypatch.context() as patch:
        if when == "asked":
            patch.setattr(bench.ledger, "write_ask", full)
            assert sweep.next_work() is None
            patch.undo()
            sweep.ended(flying, run_work(flying))
        elif when == "written":
            patch.setattr(bench.ledger, "write_attempt", full)
            sweep.lost(flying, "node_lost", "gone")
        else:
            patch.setattr(bench.ledger, "outcomes", full)
            sweep.again(flying)
    assert sweep.stopping == "storage: disk: No space left on device"
    assert sweep.finished
    assert sweep.snapshot().done == (2 if when == "asked" else 1)
    assert len(bench.run(bench.open())) == (1 if when == "asked" else 2)
    assert bench.statuses() == ["ok"] * 3


# --- asking again -----------------------------------------------------------------------------------------------------


def test_what_failed_is_asked_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=4)
    sweep = bench.open()
    recipes = [w.recipe for w in bench.run(sweep)[1:]]
    assert bench.run(bench.open()) == []
    other = Bench(tmp_path / "failed", trials=4)
    FAILS.update({f"{recipes[1].label()}/0": "error", f"{recipes[2].label()}/0": "timeout"})
    works = other.run(other.open())
    failed = {w.recipe.hash: w.number for w in works[1:] if f"{w.recipe.label()}/0" in FAILS}
    assert failed, "the sampler asks for the first recipes whatever comes back"
    before = other.statuses()
    assert "error" in before
    assert other.run(other.open()) == [], "a failure is final"
    FAILS.clear()
    resumed = other.open(retry=["error"])
    again = other.run(resumed)
    assert [w.number for w in again] == [1]
    assert [w.recipe for w in again] == [recipes[1]]
    told = resumed.proposer.study.trials[1]
    assert told.state == TrialState.COMPLETE
    assert told.values[0] == pytest.approx(
        other.ledger.outcomes(other.context.digest)[again[0].specs[0].trial_id][1]["top1_pct"]
    )
    assert "error" not in other.statuses()
    assert other.statuses().count("timeout") == before.count("timeout")
    assert resumed.snapshot().done == 4


def test_what_fails_again_is_told_and_final_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trials=2, seeds=[0, 1])
    sweep = bench.open()
    first = bench.run(sweep, 2)[1]
    bench.run(sweep)
    other = Bench(tmp_path / "failed", trials=2, seeds=[0, 1])
    FAILS[f"{first.recipe.label()}/1"] = "error"
    other.run(other.open())
    resumed = other.open(retry=["error", "worker_died"])
    work = resumed.next_work()
    assert work is not None
    assert [s.seed for s in work.specs] == [1], "the seed that was ok is not run again"
    FAILS[f"{work.recipe.label()}/1"] = "error"  # read from the ledger, the label has another order
    resumed.lost(work, "worker_died", "gone: what it failed at before does not count as its end")
    assert numbers(other.run(resumed)) == [0]
    assert resumed.proposer.study.trials[0].state == TrialState.PRUNED
    assert other.run(other.open()) == []
    assert len(other.run(other.open(retry=["error"]))) == 1


def test_what_proved_to_be_the_same_recipe_is_known_after_a_restart(tmp_path: Path) -> None:
    space = {"tome": MERGE, "precision": {"dtype": ["bf16"]}}
    bench = Bench(tmp_path, techniques=space, trials=20, seeds=[0, 1])
    one, two = (Recipe((Step("tome", {**TOME, "r": r}),)) for r in (1, 2))
    EQUAL[two.label()] = one
    sweep = bench.open()
    works = [work.recipe for work in bench.run(sweep)][1:]
    assert sweep.exhausted
    assert sweep.proposer.equals == {one.hash: [one, two], two.hash: [one, two]}
    reopened = bench.open()
    assert reopened.proposer.equals == sweep.proposer.equals
    assert bench.run(reopened) == []
    assert {two.hash, one.hash} <= {work.hash for work in works}
    assert (
        len(works) < 5 or works.index(two) > 2
    )  # one of them with precision is told, where both had not been run by then


def test_recipes_equal_under_one_seed_only_stay_two(tmp_path: Path) -> None:
    space = {"tome": MERGE}
    bench = Bench(tmp_path, techniques=space, trials=20, seeds=[0, 1])
    one, two = (Recipe((Step("tome", {**TOME, "r": r}),)) for r in (1, 2))
    EQUAL[two.label()] = one
    FAILS[f"{two.label()}/1"] = "infeasible"
    sweep = bench.open()
    bench.run(sweep)
    assert sweep.proposer.equals == {}
