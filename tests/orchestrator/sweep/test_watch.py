"""What is seen of Ray and of trials from outside, without Ray: ports, waiting, signals, what crosses to the keeper."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator.ledger import Ledger
from orchestrator.ledger.status import study_status
from orchestrator.study.load import StudyRefused
from orchestrator.sweep import trainable, watch
from orchestrator.sweep.driver_process import raised, told
from orchestrator.sweep.marked import MARK, end_marked
from orchestrator.sweep.outcome import StudyBusy
from orchestrator.sweep.signals import Interruption, taken
from orchestrator.sweep.watch import Watch, listens
from tests.cli_calls import refused
from tests.ledger_rows import make_row
from workers.node.deadline import Deadline, guard
from workers.node.lane import Lane
from workers.node.lease import acquire
from workers.node.storage import LocalStorage
from workers.trial import TrialResult, TrialSpec

LANE = "of-test-watch"


def listener() -> socket.socket:
    found = socket.create_server(("127.0.0.1", 0))
    assert listens(found.getsockname())
    return found


def test_a_part_of_ray_that_listens_no_more_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.01)
    lost: queue.Queue[str] = queue.Queue()
    stays, dies = listener(), listener()
    places = {"one": stays.getsockname(), "the other": dies.getsockname()}
    with stays, Watch(lost.put).over(places):
        dies.close()
        assert lost.get() == f"the other does not answer at 127.0.0.1:{places['the other'][1]}"
    assert lost.empty(), "once"


def test_a_driver_that_stands_still_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.01)
    monkeypatch.setattr(watch, "STANDSTILL_S", 0.05)
    lost: queue.Queue[str] = queue.Queue()
    with listener() as stays, Watch(lost.put).over({"it": stays.getsockname()}):
        assert lost.get().startswith("the driver has waited for Ray for ")


def test_what_a_run_started_is_ended_whoever_owns_it() -> None:
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"
    mine, other = (
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, MARK: mark}) for mark in ("mine", "other")
    )
    try:
        end_marked("mine")
        assert mine.poll() is not None
        assert other.poll() is None
    finally:
        end_marked("other")
        other.wait()


@pytest.mark.parametrize(
    "error",
    [StudyBusy("held by another"), StudyRefused("another question"), FileNotFoundError(2, "No such file", "a.txt")],
)
def test_errors_cross_to_the_keeper(error: Exception) -> None:
    again = raised(json.loads(json.dumps(told(error))))
    assert (type(again), str(again)) == (type(error), str(error))


def test_an_error_that_cannot_be_made_again_keeps_its_words() -> None:
    class Local(Exception):
        pass

    again = raised(told(Local("what went wrong")))
    assert (type(again), str(again)) == (RuntimeError, f"{Local.__qualname__}: what went wrong")
    assert "Traceback" not in str(again)
    assert any("what went wrong" in note for note in again.__notes__)


def test_the_first_signal_interrupts_and_further_ones_do_not() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        check_first_signal()
    finally:
        signal.signal(signal.SIGINT, before)


def check_first_signal() -> None:
    interruption = Interruption()
    with taken(interruption):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGHUP)
    assert interruption.signal == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with taken(Interruption()):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


# --- waiting ----------------------------------------------------------------------------------------------------------


def takes_the_lane(spec: TrialSpec) -> TrialResult:
    """A trial that measures, and nothing else."""
    deadline = Deadline(None)
    with guard(deadline), Lane(LANE, deadline=deadline).exclusive():
        return TrialResult(spec.trial_id, "a1", "ok", None, {"top1_pct": 1.0}, 1.0, 0.1)


CONFIG = {"objectives": {"top1_pct": "maximize"}, "techniques": {"tome": {}}, "constraints": []}


def test_a_trial_that_waits_for_the_lane_is_told_as_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainable, "MARK_S", 0.05)
    storage = LocalStorage(tmp_path)
    row = make_row(1)
    spec = {**row["spec"], "storage": storage.url}
    ledger = Ledger(storage, spec["study"])
    ledger.write_study(
        {"config": {**CONFIG, "trials": 3, "seeds": [0], "retries": 2}, "context": row["context"], "token": ""}
    )
    work = {"specs": [spec], "optuna": None, "runner": f"{__name__}:{takes_the_lane.__name__}"}
    lease = acquire(storage, f"{spec['study']}/lease")
    assert lease is not None
    with lease:
        with Lane(LANE).exclusive():
            thread = threading.Thread(target=trainable.run_specs, args=[work])
            thread.start()
            while not ledger.waiting():
                assert thread.is_alive()
            status = study_status(ledger)
            assert (status["running"], status["waiting"]) == (0, 1)
        thread.join()
        status = study_status(ledger)
        assert (status["running"], status["waiting"]) == (0, 0)
    assert ledger.running() == {}


def test_a_recipe_is_done_when_its_seeds_or_its_retries_are(tmp_path: Path) -> None:
    ledger = Ledger(LocalStorage(tmp_path), "digits")
    rows = [
        make_row(1, seed=0),
        make_row(1, seed=1),
        make_row(2, seed=0),  # its other seed was in flight
        make_row(3, status="error"),
        make_row(4, status="node_lost"),  # handed back
        *(make_row(5, status="worker_died", attempt=a) for a in ("a", "b")),
    ]
    for row in rows:
        ledger.write_attempt(row)
    ledger.write_study(
        {"config": {**CONFIG, "trials": 9, "seeds": [0, 1], "retries": 1}, "context": rows[0]["context"]}
    )
    known = Ledger(LocalStorage(tmp_path), "digits", context=rows[0]["context"])
    assert study_status(known)["done"] == 3


# --- the budget -------------------------------------------------------------------------------------------------------


def test_a_budget_below_what_is_done_is_refused_before_anything_starts() -> None:
    old = Path(__file__).parents[1] / "before_the_wings"
    said = refused("resume", "before_the_wings", "--trials", "2", storage=old)
    assert "--trials 2: must not be less than the 3 trials that study before_the_wings has already" in said
