"""The sweep's decisions without Ray: budget, seeds, retries, and being rebuilt from the ledger at any moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from orchestrator.ledger import Ledger
from orchestrator.study.load import load_study
from orchestrator.study.schema import StudyConfig, model_info
from orchestrator.sweep.state import Sweep, Work, open_sweep
from orchestrator.sweep.trainable import run_specs
from tests.studies import tiny_study
from workers.node.storage import LocalStorage
from workers.techniques import versions
from workers.trial import TrialResult, TrialSpec

FAILS: dict[str, str] = {}
"""Recipe label and seed to how the trial ends; all others are ok."""


def fake_trial(spec: TrialSpec) -> TrialResult:
    """Ends at once, with numbers that follow from recipe and seed."""
    status = FAILS.get(f"{spec.recipe.label()}/{spec.seed}", "ok")
    value = int(spec.recipe.hash[:4], 16) / 700.0
    metrics = {"top1_pct": value + spec.seed, "size_bytes": 1000.0 + value} if status == "ok" else {}
    failure = None if status == "ok" else "told to fail"
    return TrialResult(spec.trial_id, f"{spec.seed}-{id(spec):x}", status, failure, metrics, 1.0, 0.1)


@pytest.fixture(autouse=True)
def no_failures() -> None:
    FAILS.clear()


class Bench:
    """Opens the sweep of one study again and again, as a driver does at every start."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.storage = LocalStorage(folder)
        self.config = load_study(tiny_study("s", **changes))
        self.context = self.config.context()
        self.ledger = Ledger(self.storage, "s")

    def open(self, config: StudyConfig | None = None) -> Sweep:
        return open_sweep(
            config or self.config,
            self.context,
            model_info(self.context),
            self.ledger,
            storage_url=self.storage.url,
            token="",
            versions=versions(),
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
