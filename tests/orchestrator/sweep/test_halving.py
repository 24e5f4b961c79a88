"""Who goes on from a rung: decided in closed-form cases, and by sweeps without Ray that are opened again at any moment."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from orchestrator.ledger import Ledger
from orchestrator.ledger.stopped import stopped_trials
from orchestrator.study.constraints import parse
from orchestrator.sweep.halving import Halving
from orchestrator.sweep.prospects import Paused, Prospects
from orchestrator.sweep.searcher import RUNG
from orchestrator.sweep.state import Sweep
from orchestrator.sweep.trainable import run_specs
from orchestrator.sweep.work import Work
from tests.orchestrator.sweep.test_state import Bench
from workers.stages.graph import recovery_key
from workers.trial import TrialResult, TrialSpec

OBJECTIVES = {"top1_pct": "maximize", "size_bytes": "minimize"}
BASELINE = {"top1_pct": 90.0, "size_bytes": 1000.0}


class Rungs:
    """Recipes a, b, ... at the rungs of a study; what is given of them is (accuracy, bytes)."""

    def __init__(self, *constraints: str, eta: float = 2.0, **more: str) -> None:
        self.outcomes: dict[str, dict[str, float] | None] = {}
        self.names: list[str] = []
        self.halving = Halving(
            (0.125, 0.375), eta, {**OBJECTIVES, **more}, [parse(c) for c in constraints], self.outcomes
        )
        self.halving.baseline = {**BASELINE, **dict.fromkeys(more, 10.0)}

    def at(self, rung: float, recovery: str | None = None, **found: tuple[float, float]) -> None:
        for name, (accuracy, size) in found.items():
            if name not in self.names:
                self.names.append(name)
            metrics = {"top1_pct": accuracy, "size_bytes": size, "top1_pct_low": accuracy, "top1_pct_high": accuracy}
            self.halving.see(name, {rung: metrics})
            self.halving.rest(self.names.index(name), name, [name], recovery)

    def end(self, recovery: str | None = None, **found: tuple[float, float]) -> None:
        for name, (accuracy, size) in found.items():
            if name not in self.names:
                self.names.append(name)
            self.halving.take(self.names.index(name))
            self.outcomes[name] = {"top1_pct": accuracy, "size_bytes": size}
            self.halving.remember(self.names.index(name), name, [name], recovery)

    def going_on(self, *, closing: bool = False) -> list[tuple[str, float | None]]:
        """Returns who goes on, one after the other, and how far."""
        found = []
        while (one := self.halving.next(closing=closing)) is not None:
            self.halving.take(one[0])
            found.append((self.names[one[0]], one[1]))
        return found


def test_the_better_half_goes_on_and_of_one_nobody_does() -> None:
    rungs = Rungs()
    rungs.at(0.125, a=(50, 500))
    assert rungs.going_on() == []
    rungs.at(0.125, b=(60, 400))
    assert rungs.going_on() == [("b", 0.375)]
    rungs.at(0.125, c=(40, 600), d=(70, 300))
    assert rungs.going_on() == [("d", 0.375)], "b and d are the best two of four"


def test_one_that_was_passed_over_goes_on_once_it_is_among_the_best() -> None:
    rungs = Rungs()
    rungs.at(0.125, a=(60, 400), b=(59, 410))
    assert rungs.going_on() == [("a", 0.375)]
    rungs.at(0.125, c=(10, 900), d=(11, 900))
    assert rungs.going_on() == [("b", 0.375)]


@pytest.mark.parametrize(("eta", "best"), [(2, 4), (3, 2), (4, 2), (2.5, 3)])
def test_eta_says_how_many(eta: float, best: int) -> None:
    rungs = Rungs(eta=eta)
    rungs.at(0.125, **{f"r{i}": (80 - i, 100 + i) for i in range(8)})
    assert rungs.going_on() == [(f"r{i}", 0.375) for i in range(best)]


def test_rank_is_over_all_objectives() -> None:
    """Two that nothing dominates, then what one of them does: the smallest is no worse than the most accurate."""
    rungs = Rungs()
    rungs.at(0.125, dominated=(59, 450), accurate=(60, 400), small=(30, 100), worst=(20, 800))
    assert {name for name, _ in rungs.going_on()} == {"accurate", "small"}


def test_from_the_last_rung_it_goes_to_the_end_before_others_begin() -> None:
    rungs = Rungs()
    rungs.at(0.375, a=(80, 300), b=(79, 400))
    rungs.at(0.125, c=(50, 200), d=(49, 250))
    assert rungs.going_on() == [("a", None), ("c", 0.375)]


def test_what_breaks_an_exact_constraint_never_goes_on_by_rank_nor_by_probability() -> None:
    rungs = Rungs("size_bytes_ratio < 0.5")
    rungs.end(x=(80, 300), y=(81, 320), z=(82, 330))
    rungs.at(0.125, large=(89, 600), a=(60, 400), b=(59, 410), c=(58, 420))
    assert ("large", 0.375) not in rungs.going_on(closing=True)


def finished(rungs: Rungs) -> None:
    """Three that gained half of what was missing, from both rungs on: what is known of gains."""
    rungs.at(0.125, f=(60, 500), g=(70, 600), h=(80, 700))
    rungs.at(0.375, f=(60, 500), g=(70, 600), h=(80, 700))
    rungs.end(f=(80, 500), g=(85, 600), h=(90, 700))


def test_in_the_end_what_may_be_on_the_frontier_goes_on_and_the_rest_is_stopped() -> None:
    """Gains are a half of what is missing, intervals are points: all probabilities are 0 or 1."""
    rungs = Rungs(eta=100)
    finished(rungs)
    # becomes (82, 500), better than f; (79, 550), which f dominates; (50, 90), the smallest
    rungs.at(0.125, better=(64, 500), worse=(58, 550), small=(0, 90))
    names = [name for name, _ in rungs.going_on(closing=True)]
    assert set(names) == {"better", "small"}
    assert rungs.halving.waiting == {rungs.names.index("worse")}


def test_before_enough_is_known_nobody_is_stopped() -> None:
    rungs = Rungs(eta=100)
    rungs.end(x=(99, 10))
    rungs.at(0.125, a=(20, 900), b=(10, 950))
    assert {name for name, _ in rungs.going_on(closing=True)} == {"a", "b"}


def test_an_interval_makes_doubt() -> None:
    """f ends at 80 with 500 bytes; at the same size one that is expected at 79 is above it in a share of the draws."""
    rungs = Rungs(eta=100)
    finished(rungs)
    for name, width in (("sure", 0.5), ("unsure", 12.0)):
        rungs.names.append(name)
        metrics = {"top1_pct": 58.0, "size_bytes": 500.0, "top1_pct_low": 58 - width, "top1_pct_high": 58 + width}
        rungs.halving.see(name, {0.125: metrics})
        rungs.halving.rest(rungs.names.index(name), name, [name], None)
    assert [name for name, _ in rungs.going_on(closing=True)] == ["unsure"]


def test_what_is_measured_at_the_end_only_does_not_count_against_it() -> None:
    """Dominated in accuracy and size, but as fast as the finished ones nearest to it: it may be on the frontier."""
    rungs = Rungs(eta=100, latency_ms_p50="minimize")
    finished(rungs)
    for name, latency in (("f", 9.0), ("g", 5.0), ("h", 2.0)):
        found = rungs.outcomes[name]
        assert found is not None
        found["latency_ms_p50"] = latency
    rungs.at(0.125, slow=(58, 550))
    assert rungs.going_on(closing=True) == [("slow", 0.375)]
    for name in ("f", "g", "h"):
        found = rungs.outcomes[name]
        assert found is not None
        found["latency_ms_p50"] = 9.0
    rungs.at(0.125, slow=(58, 550))
    rungs.halving.baseline = {**rungs.halving.baseline, "latency_ms_p50": 9.0}
    assert rungs.going_on(closing=True) == [], "now nothing can be faster than f, which dominates it"


def test_a_training_that_another_brought_further_costs_nothing() -> None:
    rungs = Rungs(eta=100)
    rungs.at(0.125, "k", a=(10, 900), b=(11, 950))
    rungs.at(0.375, "k", b=(12, 950))
    assert rungs.going_on() == [("a", 0.375)]
    rungs.at(0.375, "k", a=(12, 900))
    rungs.end("k", b=(13, 950))
    assert rungs.going_on() == [("a", None)]


def test_rungs_that_are_no_more() -> None:
    """A study that goes on with `early_stopping: none` brings what stands at its old rungs to the end."""
    halving = Halving((), 2.0, OBJECTIVES, [], {})
    halving.see("a", {0.125: {"top1_pct": 1.0}})
    halving.rest(0, "a", ["a"], None)
    assert halving.next(closing=False) == (0, None)


# --- a whole sweep ----------------------------------------------------------------------------------------------------

EPOCHS = 8
TRAINED: Counter[str] = Counter()
"""Key of a recovery to the epochs of it that were trained, as the states in its stage's folder would be."""


def fake_trial(spec: TrialSpec) -> TrialResult:
    """Trains nothing, but keeps count of it: its accuracy follows from the recipe and rises with the epochs."""
    key = recovery_key(spec.recipe, spec.seed, spec.context)
    goal = EPOCHS if spec.until is None or key is None else round(spec.until * EPOCHS)
    done = EPOCHS
    if key is not None:
        done = TRAINED[key] = max(TRAINED[key], goal)
    final = 50 + int(spec.recipe.hash[:4], 16) / 65535 * 50
    accuracy = final - (100 - final) * 0.3 * (EPOCHS - done) / EPOCHS
    size = 1000.0 + int(spec.recipe.hash[4:8], 16) if spec.recipe.steps else 70_000.0
    metrics = {"top1_pct": accuracy, "top1_pct_low": accuracy - 1, "top1_pct_high": accuracy + 1, "size_bytes": size}
    status, rung = ("ok", None) if done == EPOCHS else ("stopped", done / EPOCHS)
    return TrialResult(spec.trial_id, f"{time.time_ns():x}", status, None, metrics, time.time(), 0.1, rung=rung)


RUNNER = "tests.orchestrator.sweep.test_halving:fake_trial"
TECHNIQUES = {
    "magnitude_prune": {"head_ratio": [0.0, 0.5], "mlp_ratio": {"low": 0.1, "high": 0.6, "step": 0.05}, "round_to": [1]}
}


RECIPES = [
    [{"magnitude_prune": {"head_ratio": head, "mlp_ratio": round(0.1 + 0.05 * step, 2)}}]
    for head in (0.0, 0.5)
    for step in range(8)
]
"""All that a study of 16 trials asks for, so that no sampler has a say."""


@pytest.fixture(autouse=True)
def _nothing_trained() -> Iterator[None]:
    TRAINED.clear()
    yield
    TRAINED.clear()


def halved(tmp_path: Path, trials: int = 16, **changes: Any) -> Bench:
    training = {"baseline": {"epochs": 1}, "recovery": {"epochs": EPOCHS}}
    return Bench(tmp_path, **{"training": training, "trials": trials, "techniques": TECHNIQUES, **changes})


def stopped(bench: Bench) -> list[dict[str, Any]]:
    return stopped_trials(Ledger(bench.storage, "s", context=bench.context.digest))


def run(sweep: Sweep, most: int = 1000) -> list[Work]:
    done: list[Work] = []
    while len(done) < most and (work := sweep.next_work()) is not None:
        sweep.ended(work, run_specs(work.to_dict(RUNNER)))
        done.append(work)
    return done


def front(bench: Bench) -> set[tuple[float, float]]:
    rows = bench.ledger.trials(["status", "top1_pct", "size_bytes"]).to_pylist()
    points = {(r["top1_pct"], r["size_bytes"]) for r in rows if r["status"] == "ok"}
    return {p for p in points if not any(q[0] >= p[0] and q[1] <= p[1] and q != p for q in points)}


def test_a_halved_sweep_trains_less_and_has_the_same_frontier(tmp_path: Path) -> None:
    whole = halved(tmp_path / "whole", early_stopping="none", recipes=RECIPES)
    run(whole.open())
    epochs = TRAINED.total()
    assert epochs == 16 * EPOCHS
    TRAINED.clear()
    bench = halved(tmp_path / "halved", recipes=RECIPES)
    sweep = bench.open()
    run(sweep)
    assert sweep.finished
    assert TRAINED.total() < 0.7 * epochs
    assert front(bench) == front(whole)
    left = stopped(bench)
    assert left
    assert {t["rung"] for t in left} <= {0.125, 0.375}
    assert sweep.snapshot().paused == len(left)
    assert sweep.snapshot().done == 16
    states = Counter(t.state for t in sweep.proposer.study.trials)
    assert states == {TrialState.COMPLETE: 16 - len(left), TrialState.PRUNED: len(left)}


def test_the_trial_of_one_at_a_rung_goes_on_running_and_says_what_is_known(tmp_path: Path) -> None:
    bench = halved(tmp_path)
    sweep = bench.open()
    (_, work) = run(sweep, 2)
    assert work.specs[0].until == 0.125
    for opened in (sweep, bench.open()):
        (trial,) = opened.proposer.study.get_trials()[:1]
        assert trial.state == TrialState.RUNNING
        known = trial.system_attrs[RUNG]
        assert known["fraction"] == 0.125
        assert known["metrics"]["size_bytes"] > 0
        assert "top1_pct_drop" in known["metrics"]
        assert opened.snapshot().done == 1


@pytest.mark.parametrize("most", [2, 3, 5, 9, 14, 20, 24])
def test_a_sweep_that_is_opened_again_at_any_moment_decides_as_if_nothing_had_happened(
    tmp_path: Path, most: int
) -> None:
    whole = halved(tmp_path / "whole", recipes=RECIPES)
    expected = [(w.number, [s.until for s in w.specs]) for w in run(whole.open())]
    TRAINED.clear()
    bench = halved(tmp_path / "again", recipes=RECIPES)
    killed = bench.open()
    found = run(killed, most)
    flying = killed.next_work()  # handed out, and its driver killed
    later = run(bench.open())
    found += later
    assert flying is None or (flying.number, flying.specs) == (later[0].number, later[0].specs)
    assert [(w.number, [s.until for s in w.specs]) for w in found] == expected
    assert bench.statuses() == whole.statuses()
    assert bench.open().finished
    assert run(bench.open()) == []


def test_a_worker_lost_on_its_way_from_a_rung_begins_there_again(tmp_path: Path) -> None:
    bench = halved(tmp_path, retries=1)
    sweep = bench.open()
    while (work := sweep.next_work()) is not None and (not work.specs or work.specs[0].until in (0.125, None)):
        sweep.ended(work, run_specs(work.to_dict(RUNNER)))
    assert work is not None
    sweep.lost(work, "worker_died", "gone")
    again = sweep.next_work()
    assert again is not None
    assert (again.number, again.specs) == (work.number, work.specs)
    sweep.lost(again, "worker_died", "gone again")  # given up until the next run
    assert sweep.proposer.study.trials[work.number or 0].state == TrialState.FAIL
    resumed = bench.open()
    assert work.number in resumed.halving.waiting
    run(resumed)
    assert "worker_died" not in bench.statuses()


def test_what_a_lost_worker_reached_of_its_seeds_counts(tmp_path: Path) -> None:
    bench = halved(tmp_path, seeds=[0, 4], trials=2)
    sweep = bench.open()
    run(sweep, 1)
    work = sweep.next_work()
    assert work is not None
    run_specs({**work.to_dict(RUNNER), "specs": [work.specs[0].to_dict()]})
    sweep.lost(work, "worker_died", "gone")
    again = sweep.next_work()
    assert again is not None
    assert [s.seed for s in again.specs] == [4]
    sweep.ended(again, run_specs(again.to_dict(RUNNER)))
    assert work.number in sweep.halving.waiting


def test_a_failure_on_the_way_is_the_end(tmp_path: Path) -> None:
    bench = halved(tmp_path)
    sweep = bench.open()
    while (work := sweep.next_work()) is not None and (work.number is None or work.specs[0].until == 0.125):
        sweep.ended(work, run_specs(work.to_dict(RUNNER)))
    assert work is not None
    sweep.lost(work, "timeout", "took too long")
    assert sweep.proposer.study.trials[work.number or 0].state == TrialState.PRUNED
    assert work.number not in {w.number for w in run(sweep)}
    assert "timeout" in bench.statuses()


def test_an_extended_study_takes_up_what_was_stopped(tmp_path: Path) -> None:
    bench = halved(tmp_path, trials=6)
    run(bench.open())
    sweep = bench.open(bench.config.model_copy(update={"trials": 12}))
    waiting = set(sweep.halving.waiting)
    assert waiting
    works = run(sweep)
    assert len({w.number for w in works if w.number not in waiting}) >= 6
    assert sweep.finished


def test_a_stopped_trial_is_finished_where_somebody_wants_it(tmp_path: Path) -> None:
    bench = halved(tmp_path)
    run(bench.open())
    first, *others = stopped(bench)
    sweep = bench.open(finish=[first["trial_id"]])
    assert not sweep.finished
    (work, *_) = run(sweep)
    assert (work.number, [s.until for s in work.specs]) == (first["number"], [None])
    left = {t["trial_id"] for t in stopped(bench)}
    assert first["trial_id"] not in left
    assert left <= {t["trial_id"] for t in others}


def test_a_study_that_no_longer_stops_early_brings_all_to_their_end(tmp_path: Path) -> None:
    bench = halved(tmp_path)
    run(bench.open())
    assert "stopped" in bench.statuses()
    none = type(bench.config).from_dict({**bench.config.to_dict(), "early_stopping": "none"})
    run(bench.open(none))
    assert set(bench.statuses()) == {"ok"}


def test_conversions_of_one_recovery_share_its_training(tmp_path: Path) -> None:
    """Four recipes of one training: each is judged at the rung, and what one trains none trains again."""
    techniques = {
        "magnitude_prune": {"head_ratio": [0.0], "mlp_ratio": [0.5]},
        "dynamic_int8": {},
        "weight_only": {"bits": [8, 4]},
    }
    bench = halved(tmp_path, trials=30, techniques=techniques, max_techniques=2)
    works = run(bench.open())
    assert len(TRAINED) == 1
    assert TRAINED.total() <= EPOCHS
    assert len({w.number for w in works}) > 6
    assert len(set(bench.statuses())) == 1, "once the training is done for one, the others cost no training"


def test_a_specification_from_before_is_read(tmp_path: Path) -> None:
    sweep = halved(tmp_path).open()
    values = sweep.baseline_spec().to_dict()
    assert values.pop("until") is None
    assert TrialSpec.from_dict(values) == sweep.baseline_spec()
    with pytest.raises(ValueError, match="until must be above 0 and below 1"):
        replace(sweep.baseline_spec(), until=1.0)


@pytest.mark.parametrize(
    ("speed", "direction"), [("throughput_images_per_s", "maximize"), ("latency_ms_p50", "minimize")]
)
def test_what_saves_more_macs_than_any_before_is_not_taken_for_as_slow_as_those(speed: str, direction: str) -> None:
    done = {"top1_pct": 95.0, speed: 100.0, "macs": 1000.0}
    prospects = Prospects({"top1_pct": "maximize", speed: direction}, (), done, [done])
    paused = [Paused({"top1_pct": 90.0, "macs": macs}, {"top1_pct": [0.0, 0.0, 0.0]}) for macs in (1000.0, 400.0)]
    assert [float(prospects.probabilities([one])[0]) for one in paused] == [0.0, 1.0]
