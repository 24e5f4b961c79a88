"""A driver killed with its whole process group at several moments: nothing that ended is lost or repeated."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cli_calls import call
from tests.processes import Study, kill_group, until
from tests.studies import fault_study, tiny_study

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

TRIALS = 8


def pruned(ratio: float) -> dict[str, dict[str, float]]:
    return {"magnitude_prune": {"head_ratio": 0.0, "mlp_ratio": ratio, "round_to": 1}}


FIRST = [[pruned(0.1)], ["dynamic_int8"], [pruned(0.1), "dynamic_int8"], ["precision"], [pruned(0.2)]]
"""The last one trains what no other does, so that a training is left after four of them have ended."""


def in_flight(study: Study, before: dict[str, int]) -> list[str]:
    """Returns the stages that were started since ``before`` (executions of each then) and have no artefact."""
    done = study.completed()
    return [key for key, count in study.executions().items() if count > before.get(key, 0) and key not in done]


def in_training(study: Study, kind: str, before: dict[str, int]) -> list[str]:
    """Returns the stages of a kind that run right now; a lease of a killed process still reads as held."""
    found = []
    for key in in_flight(study, before):
        folder = f"stages/{key}/leases"
        record = json.loads(study.storage.read(f"{folder}/{study.storage.files(folder)[-1]}"))
        if record["stage"] == kind and record["state"] == "held":
            found.append(key)
    return found


def test_killed_sweeps_end_with_exactly_the_budgeted_set(tmp_path: Path) -> None:
    config = tiny_study("survivor", trials=TRIALS, recipes=FIRST, resources={"max_concurrent": 2})
    study = Study(tmp_path, config)
    generator = random.Random(7)
    moments = [
        ("training", lambda: in_training(study, "baseline", before)),
        ("4", lambda: len(study.attempts()) >= 4),  # of the two workers one waits, the other is anywhere
        ("training", lambda: in_training(study, "recovery", before)),
    ]
    before: dict[str, int] = {}
    kept: dict[str, str] = {}
    stages: dict[str, int] = {}
    for hold, moment in moments:
        study.hold(hold)
        process = study.start()
        try:
            until(lambda: study.held() and moment(), process)  # noqa: B023 - called in this round only
            time.sleep(generator.uniform(0, 0.3))
        finally:
            study.kill(process)
        study.release()
        kept |= {r["attempt_id"]: r["trial_id"] for r in study.attempts() if r["status"] == "ok"}
        for key in in_flight(study, before):
            stages[key] = stages.get(key, 0) + 1
        before = study.executions()
    assert 4 <= len(kept) < TRIALS + 1
    study.run()

    attempts = study.attempts()
    trials = study.ledger.trials().to_pylist()
    assert len(trials) == len(attempts) == TRIALS + 1  # the baseline too
    assert {r["status"] for r in attempts} == {"ok"}
    assert kept.items() <= {r["attempt_id"]: r["trial_id"] for r in attempts}.items()
    assert study.executions() == {key: 1 + stages.get(key, 0) for key in study.completed()}
    check_numbers(study, TRIALS)
    assert not study.marks()

    study.finish("resume", study.name, "--quiet", "--trials", str(TRIALS + 2))
    more = study.attempts()
    assert [r["attempt_id"] for r in more[: len(attempts)]] == [r["attempt_id"] for r in attempts]
    assert len(more) == TRIALS + 3
    check_numbers(study, TRIALS + 2)

    asked = study.asks()
    done = call("resume", study.name, "--quiet", storage=tmp_path / "results")
    assert done.exit_code == 0, done.output
    assert study.attempts() == more
    assert study.asks() == asked


def check_numbers(study: Study, trials: int) -> None:
    """Optuna's numbers have no gap, and every proposal that was to be run has its row under its own number."""
    asks = study.asks()
    assert [a["number"] for a in asks] == list(range(len(asks)))
    run = {a["number"]: a["recipe"] for a in asks if "specs" in a}
    assert len(run) == trials
    assert run == {r["number"]: r["recipe"] for r in study.attempts() if not r["is_baseline"]}


def test_a_second_driver_is_refused_and_a_termination_ends_like_an_interrupt(tmp_path: Path) -> None:
    study = Study(tmp_path, fault_study("shared", ["sleep"]))
    lease = f"{study.name}/lease"

    def asleep(other: Sequence[int] = ()) -> set[int]:
        """Returns the worker that runs the sleeping trial, if it is not one of ``other``."""
        found = {m["pid"] for m in study.marks().values()} - set(other)
        return found if study.storage.files(f"{study.name}/asks") else set()

    first = study.start()
    try:
        sleeper = until(asleep, first)
        refused = study.finish("run", str(study.file), "--quiet", status=1)
        assert f"study shared in {study.storage.url} is being run by process {study.driver()}" in refused
    finally:
        study.kill(first)

    second = study.start()
    try:
        until(lambda: asleep(sleeper), second)
        second.terminate()
        output = second.communicate()[0]
    finally:
        kill_group(second)
    assert second.returncode == 128 + signal.SIGTERM, output
    assert f"go on with: vitpareto resume shared --storage {study.storage.url}" in output
    assert "Traceback" not in output
    assert not study.marks()
    assert study.ledger.compact() == 0, "it was done"
    assert [r["status"] for r in study.attempts()] == ["ok"]  # the baseline
    assert json.loads(study.storage.read(f"{lease}/000002.json"))["state"] == "released"
    assert study.left() == []


class ShortStudy(Study):
    """A study whose trials end at once, so that several share a Tune trial."""

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "tests.short_trials", str(self.file), self.storage.url]


def test_batches_survive_the_death_of_a_worker_and_of_the_driver(tmp_path: Path) -> None:
    mlp = {"head_ratio": [0.0, 0.25, 0.5], "mlp_ratio": {"low": 0.1, "high": 0.6, "step": 0.05}, "round_to": [1]}
    techniques = {"magnitude_prune": mlp, "tome": {"r": {"low": 1, "high": 2, "step": 1}}, "dynamic_int8": {}}
    trials = 160
    study = ShortStudy(
        tmp_path,
        tiny_study(
            "short",
            trials=trials,
            techniques=techniques,
            sampler={"name": "random"},
            resources={"cpus": 1, "max_concurrent": 1},
        ),
    )

    def ended() -> int:
        return len(study.ledger.attempts(["attempt_id"]))

    def batch() -> int:
        """Returns how many of those that the driver has handed out are on their way."""
        done = ended()
        return len([a for a in study.asks() if "specs" in a]) - (done - 1) if done else 0  # one is the baseline's

    process = study.start()
    try:
        until(lambda: batch() >= 3, process)
        mark = until(lambda: next(iter(study.marks().values()), None), process)
        os.kill(mark["pid"], signal.SIGKILL)
        until(lambda: ended() >= 120 and batch() >= 3, process)
    finally:
        study.kill(process)
    before = {r["attempt_id"]: r["trial_id"] for r in study.attempts() if r["status"] == "ok"}
    study.finish()
    rows = study.attempts()
    ok = [r["trial_id"] for r in rows if r["status"] == "ok"]
    assert len(ok) == len(set(ok)) == trials + 1, "nothing is lost, nothing repeated"
    assert before.items() <= {r["attempt_id"]: r["trial_id"] for r in rows}.items()
    lost = [r for r in rows if r["status"] != "ok"]
    assert [r["status"] for r in lost] in ([], ["worker_died"]), (
        "of the batch of a dead worker the running one alone pays"
    )
    check_numbers(study, trials)
    assert not study.marks()
