"""A driver that cannot renew its lease: it starts nothing, goes on when it can again, and ends where another one came."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.sweep import after_search
from orchestrator.sweep.lease_watch import LeaseWatch
from orchestrator.sweep.progress import Progress
from tests.clocks import Clock
from tests.orchestrator.sweep.test_state import Bench, numbers
from tests.processes import Study, kill_group, until
from tests.studies import tiny_study
from workers.node import lease as lease_module
from workers.node.identity import identity
from workers.node.lease import MARGIN_S, TTL_S, Lease, LeaseLost, acquire

SUCCESSOR = {**identity(), "host": "another-machine", "pid": 7, "state": "held"}


class Driver:
    """A sweep with its lease and what supervises it; no Ray. Its heart beats when told to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lease_module, "HEARTBEAT_S", 1e6)
        self.clock = Clock(monkeypatch, lease_module)
        self.bench = Bench(folder, trials=4)
        lease = acquire(self.bench.storage, "s/lease")
        assert lease is not None
        self.lease: Lease = lease
        self.sweep = self.bench.open()
        self.sweep.lease = lease
        self.turn = LeaseWatch(self.sweep, lease).turn

    def succeed(self) -> None:
        self.bench.storage.put_atomic("s/lease/000002.json", json.dumps(SUCCESSOR).encode())


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver(tmp_path, monkeypatch)
    yield made
    made.lease.release()


def test_nothing_is_issued_while_a_successor_may_come(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    assert numbers(driver.bench.run(driver.sweep, 2)) == [None, 0]
    driver.clock.sleep(TTL_S - MARGIN_S)
    for _ in range(3):
        driver.turn()
    assert driver.sweep.next_work() is None
    assert not driver.sweep.finished, "it waits"
    driver.lease._renew(1)
    for _ in range(3):
        driver.turn()
    assert numbers(driver.bench.run(driver.sweep)) == [1, 2, 3]
    assert caplog.messages == [
        "study s: its lease could not be renewed for 20 s, since the storage does not answer; nothing new is started until it does",
        "study s: the storage answers again; going on",
    ]


def test_a_successor_ends_the_run(driver: Driver) -> None:
    driver.bench.run(driver.sweep, 2)
    driver.succeed()
    driver.lease._renew(1)
    driver.turn()
    assert driver.sweep.next_work() is None
    assert driver.sweep.finished
    assert driver.sweep.stopping == "another driver has taken study s over"
    with pytest.raises(LeaseLost, match=r"process 7 on another-machine has taken over \(generation 2\)"):
        driver.lease.check()
    with pytest.raises(LeaseLost, match="another-machine"):
        after_search.report_split(driver.sweep, Progress(quiet=True))


QUICKER = """
from workers.node import lease
lease.HEARTBEAT_S, lease.TTL_S, lease.MARGIN_S = 0.2, 4.0, 1.0
"""
"""What every Python of a run begins with, so that the driver, a process of its own, has a lease with a short time to live."""


def lines(process: subprocess.Popen[str], wanted: str) -> list[str]:
    """Reads what a driver prints up to a line with ``wanted``."""
    assert process.stdout is not None
    found = []
    for line in process.stdout:
        found.append(line)
        if wanted in line:
            return found
    raise AssertionError(f"no line with {wanted!r}: {''.join(found)}")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("taken", [False, True])
def test_a_real_driver_whose_lease_cannot_be_written(tmp_path: Path, taken: bool) -> None:
    """The lease's folder is away, and a file in its place: every renewal fails, everything else works."""
    study = Study(tmp_path, tiny_study("cut_off", trials=8))
    lease, away = tmp_path / "results/cut_off/lease", tmp_path / "away"
    (tmp_path / "sitecustomize.py").write_text(QUICKER)
    study.env["PYTHONPATH"] += os.pathsep + str(tmp_path)
    process = study.start()
    try:
        until(lambda: len(study.attempts()) >= 2, process)
        lease.rename(away)
        lease.write_text("")
        lines(process, "nothing new is started until it does")
        until(lambda: not study.marks(), process)
        asked = study.asks()
        if taken:
            (away / "000002.json").write_text(json.dumps(SUCCESSOR))
        lease.unlink()
        away.rename(lease)
        output = process.communicate()[0]
        assert process.returncode == (1 if taken else 0), output
    finally:
        kill_group(process)
    if taken:
        assert "process 7 on another-machine has taken over (generation 2)" in output
        assert "Traceback" not in output
        assert study.asks() == asked, "nothing was issued"
        assert study.storage.files(f"{study.name}/attempts"), "the ledger is the successor's to compact"
    else:
        assert "the storage answers again; going on" in output
        assert len(study.attempts()) == 9
        assert set(study.executions().values()) == {1}
