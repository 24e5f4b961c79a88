"""The lane and the deadline, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workers.deadline import Deadline, DeadlineExceeded, guard
from workers.lane import TICK_S, Lane
from workers.private_folder import private_folder

ROOT = Path(__file__).parent.parent

TRAINER = """
import sys, time
from workers.lane import Lane
lane = Lane("cpu")
with lane.shared():
    print("in", flush=True)
    while True:
        time.sleep(0.05)
        lane.tick()
"""

HOLDER = """
import time
from workers.lane import Lane
with Lane("cpu").exclusive():
    print("in", flush=True)
    time.sleep(600)
"""

RECORDER = """
import sys, time
from workers.lane import Lane
kind, log = sys.argv[1:]
lane = Lane("cpu")
def note(what):
    with open(log, "a") as file:
        file.write(f"{time.monotonic():.6f} {kind} {what}\\n")
for _ in range(20):
    with getattr(lane, kind)():
        note("in")
        time.sleep(0.005)
        note("out")
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITPARETO_LANE_DIR", str(tmp_path / "lane"))


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for_line(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"


def stop(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_exclusive_excludes_everybody_and_shared_does_not_exclude_shared(tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [start(RECORDER, kind, str(log)) for kind in ("shared", "shared", "exclusive", "exclusive")]
    for process in processes:
        assert process.wait(timeout=120) == 0
    stop(*processes)
    events = sorted((float(t), kind, what) for t, kind, what in (line.split() for line in log.read_text().splitlines()))
    assert len(events) == 160
    inside = {"shared": 0, "exclusive": 0}
    for _, kind, what in events:
        inside[kind] += 1 if what == "in" else -1
        assert inside["exclusive"] <= 1
        assert inside["exclusive"] == 0 or inside["shared"] == 0


def test_a_measurement_gets_in_while_two_trainers_never_leave() -> None:
    trainers = [start(TRAINER), start(TRAINER)]
    try:
        for trainer in trainers:
            wait_for_line(trainer)
        lane = Lane("cpu")
        for _ in range(3):
            before = lane.waited_s
            with lane.exclusive():
                pass
            # a chunk is 0.05 s and the gate is looked at every TICK_S; the rest is for a busy machine
            assert lane.waited_s - before < TICK_S + 5
    finally:
        stop(*trainers)


def test_a_killed_holder_releases_the_lane() -> None:
    holder = start(HOLDER)
    wait_for_line(holder)
    probe = start("from workers.lane import Lane\nwith Lane('cpu').shared(): print('in', flush=True)")
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            probe.wait(timeout=1.5)
        os.kill(holder.pid, signal.SIGKILL)
        wait_for_line(probe)
    finally:
        stop(holder, probe)


def test_devices_have_lanes_of_their_own() -> None:
    with Lane("cpu").exclusive(), Lane("GPU-1").exclusive():
        pass


def test_waiting_is_counted_and_pauses_the_deadline() -> None:
    holder = start(HOLDER)
    wait_for_line(holder)
    deadline = Deadline(60)
    lane = Lane("cpu", deadline=deadline)
    started, spent = time.monotonic(), deadline.spent_s
    killer = subprocess.Popen([sys.executable, "-c", f"import os,time; time.sleep(.5); os.kill({holder.pid}, 9)"])
    with lane.shared():
        passed = time.monotonic() - started
    stop(holder, killer)
    assert lane.waited_s > 0.2
    assert deadline.spent_s - spent < passed - 0.9 * lane.waited_s + 0.5


def test_the_lane_cannot_be_taken_twice_by_one_holder() -> None:
    lane = Lane("cpu")
    with lane.shared(), pytest.raises(RuntimeError, match="held shared already"), lane.exclusive():
        pass
    with lane.exclusive():  # free again
        lane.tick()
    lane.tick()


def test_a_private_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITPARETO_LANE_DIR")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folder = private_folder("lane", "VITPARETO_LANE_DIR")
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match="mode 0755; remove it, or set VITPARETO_LANE_DIR"):
        private_folder("lane", "VITPARETO_LANE_DIR")
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="must be a folder of user"):
        private_folder("lane", "VITPARETO_LANE_DIR")


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("workers.deadline.time.monotonic", lambda: self.now)


def test_the_deadline_counts_own_work_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    deadline = Deadline(10)
    clock.now += 4
    with deadline.paused():
        clock.now += 100
        assert deadline.remaining_s == 6
        with deadline.paused():
            clock.now += 1
        clock.now += 1
    deadline.check()
    clock.now += 5.9
    deadline.check()
    clock.now += 0.2
    with pytest.raises(DeadlineExceeded, match=r"10\.1 s of work of 10 s allowed"):
        deadline.check()


def test_no_limit_is_never_exceeded_and_a_limit_is_positive() -> None:
    assert Deadline(None).remaining_s == float("inf")
    with pytest.raises(ValueError, match="greater than 0"):
        Deadline(0)


def test_the_guard_stops_code_that_never_checks() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(DeadlineExceeded), guard(Deadline(0.1)):
        time.sleep(60)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_guard_waits_while_the_deadline_is_paused() -> None:
    deadline = Deadline(0.2)
    with guard(deadline):
        with deadline.paused():
            time.sleep(0.6)
        assert deadline.remaining_s < 0.2
