"""The lane and the deadline, with real processes."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clocks import Clock
from tests.places import ROOT
from workers.node import deadline as deadline_module
from workers.node import lane as lane_module
from workers.node.deadline import Deadline, DeadlineExceeded, guard
from workers.node.lane import TICK_S, Lane
from workers.node.private_folder import private_folder

CHUNK_S = 0.05

TRAINER = """
import sys, time
from workers.node.lane import Lane
chunk_s, log = float(sys.argv[1]), open(sys.argv[2], "ab", buffering=0)
lane = Lane("cpu")
with lane.shared():
    print("in", flush=True)
    while True:
        time.sleep(chunk_s)
        log.write(b".")
        lane.tick()
"""

HOLDER = """
import time
from workers.node.lane import Lane
with Lane("cpu").exclusive():
    print("in", flush=True)
    time.sleep(600)
"""

RECORDER = """
import sys, time
from workers.node.lane import Lane
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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, deadline_module, lane_module)


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


def patched_flock(monkeypatch: pytest.MonkeyPatch, taken: Callable[[], None]) -> None:
    """Calls ``taken`` whenever this process has got a lock."""
    flock = fcntl.flock

    def told(fd: int, how: int) -> None:
        flock(fd, how)
        if how != fcntl.LOCK_UN:
            taken()

    monkeypatch.setattr(fcntl, "flock", told)


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


def test_a_measurement_gets_in_while_two_trainers_never_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"  # a byte a chunk
    sizes: list[int] = []
    trainers = [start(TRAINER, str(CHUNK_S), str(log)) for _ in range(2)]
    try:
        for trainer in trainers:
            wait_for_line(trainer)
        patched_flock(monkeypatch, lambda: sizes.append(log.stat().st_size))
        lane = Lane("cpu")
        for _ in range(3):
            sizes.clear()
            with lane.exclusive():
                at_the_gate, inside = sizes
                time.sleep(2 * CHUNK_S)
                assert log.stat().st_size == inside
            assert inside - at_the_gate <= 2 * math.ceil(TICK_S / CHUNK_S)  # chunks until both look at the gate
            while log.stat().st_size == inside:
                time.sleep(0.01)
    finally:
        stop(*trainers)


def test_a_killed_holder_releases_the_lane() -> None:
    holder = start(HOLDER)
    wait_for_line(holder)
    probe = start("from workers.node.lane import Lane\nwith Lane('cpu').shared(): print('in', flush=True)")
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


def test_waiting_is_counted_and_pauses_the_deadline(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    patched_flock(monkeypatch, lambda: clock.sleep(10))
    deadline = Deadline(60)
    lane = Lane("cpu", deadline=deadline)
    for times, hold in enumerate((lane.shared, lane.exclusive), 1):
        with hold():  # the gate and the lane
            assert lane.waited_s == 20 * times
            clock.sleep(3)
        assert deadline.spent_s == 3 * times


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


def test_the_deadline_counts_own_work_only(clock: Clock) -> None:
    deadline = Deadline(10)
    clock.sleep(4)
    with deadline.paused():
        clock.sleep(100)
        assert deadline.remaining_s == 6
        with deadline.paused():
            clock.sleep(1)
        clock.sleep(1)
    deadline.check()
    clock.sleep(5.875)
    deadline.check()
    clock.sleep(0.25)
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


def test_the_guard_waits_while_the_deadline_is_paused(clock: Clock) -> None:
    deadline = Deadline(3600)
    with guard(deadline):
        with deadline.paused():
            clock.sleep(7200)
            signal.raise_signal(signal.SIGALRM)
        clock.sleep(600)
        signal.setitimer(signal.ITIMER_REAL, 0)  # as an alarm that rang leaves it
        signal.raise_signal(signal.SIGALRM)
        assert 3350 < signal.getitimer(signal.ITIMER_REAL)[0] < 3361, "set again to what a pause left, and the grace"
        clock.sleep(3300)
        signal.raise_signal(signal.SIGALRM)  # what checks by itself may
        clock.sleep(100)
        with pytest.raises(DeadlineExceeded):
            signal.raise_signal(signal.SIGALRM)
        signal.raise_signal(signal.SIGALRM)  # what winds up is not broken off
