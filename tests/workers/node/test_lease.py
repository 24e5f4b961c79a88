"""Leases: one holder, a successor for a dead one at once, for a silent one after the time to live."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.clocks import Clock
from workers.node import lease as lease_module
from workers.node.lease import HEARTBEAT_S, TTL_S, LeaseHeld, LeaseLost, acquire, alive, generations, holder, identity
from workers.node.storage import LocalStorage

NAME = "studies/lease"
HOLD = """
import sys, time
from workers.node.lease import acquire
from workers.node.storage import LocalStorage
lease = acquire(LocalStorage(sys.argv[1]), sys.argv[2], note={"study": "s"})
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def held_elsewhere(storage: LocalStorage, generation: int = 1, beat: int = 0) -> None:
    """Writes what the holder on another machine writes at a beat."""
    record = {**identity(), "host": "another-machine", "state": "held", "beat": beat}
    storage.put_atomic(f"{NAME}/{generation:06d}.json", json.dumps(record).encode())


def test_taken_refused_released_and_counted(storage: LocalStorage) -> None:
    assert holder(storage, NAME) is None
    with acquire(storage, NAME, note={"study": "s"}):
        with pytest.raises(LeaseHeld, match=f"held by process {os.getpid()}") as refused:
            acquire(storage, NAME)
        assert refused.value.owner["study"] == "s"
        found = holder(storage, NAME)
        assert found is not None
        assert found["pid"] == os.getpid()
    assert holder(storage, NAME) is None
    with acquire(storage, NAME) as second:
        assert second.generation == generations(storage, NAME) == 2


def test_a_killed_process_is_succeeded_at_once(storage: LocalStorage) -> None:
    command = [sys.executable, "-c", HOLD, storage.url, NAME]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(LeaseHeld):
        acquire(storage, NAME)
    record = holder(storage, NAME)
    assert record is not None
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but a zombie: nobody has waited for it yet
    # Its silence lets nobody in, and time.sleep refuses less than 0: the first look must do.
    with acquire(storage, NAME, ttl_s=math.inf, poll_s=-1) as successor:
        assert successor.generation == 2
    process.wait()
    assert alive(record) is False
    process.stdout.close()


def test_a_reused_process_id_is_not_the_holder(storage: LocalStorage) -> None:
    record = {**identity(), "process_started": 1.0, "state": "held"}
    storage.put_atomic(f"{NAME}/000001.json", json.dumps(record).encode())
    with acquire(storage, NAME) as successor:
        assert successor.generation == 2


@pytest.mark.parametrize("content", [b"", b"[]", b'{"state": "held"', b'{"state": "failed"}'])
def test_a_damaged_or_failed_record_does_not_block(storage: LocalStorage, content: bytes) -> None:
    storage.put_atomic(f"{NAME}/000001.json", content)
    with acquire(storage, NAME) as successor:
        assert successor.generation == 2


class Elsewhere(Clock):
    """Time that passes only while the taker sleeps, in which a holder on another machine beats ``beats`` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, storage: LocalStorage, beats: int) -> None:
        super().__init__(monkeypatch, lease_module)
        self.storage, self.beats, self.beaten = storage, beats, 0
        held_elsewhere(storage)

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        while self.beaten < min(self.beats, self.passed_s // HEARTBEAT_S):
            self.beaten += 1
            held_elsewhere(self.storage, 1, self.beaten)


def test_a_silent_holder_elsewhere_is_succeeded_after_the_ttl(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Elsewhere(monkeypatch, storage, beats=0)
    with acquire(storage, NAME, poll_s=0.5) as successor:
        assert clock.passed_s == TTL_S + 0.5  # the first look after it
        assert successor.generation == 2


def test_the_ttl_counts_from_the_last_beat(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Elsewhere(monkeypatch, storage, beats=3)
    with acquire(storage, NAME, wait=lambda: False, poll_s=0.5) as successor:
        assert clock.passed_s == 3 * HEARTBEAT_S + TTL_S + 0.5
        assert successor.generation == 2


def test_a_heartbeat_elsewhere_is_respected(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Elsewhere(monkeypatch, storage, beats=1)
    with pytest.raises(LeaseHeld, match="another-machine"):
        acquire(storage, NAME, poll_s=0.5)
    assert clock.passed_s == HEARTBEAT_S
    assert generations(storage, NAME) == 1


def test_a_waiter_waits_while_the_holder_beats(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Elsewhere(monkeypatch, storage, beats=7)
    assert acquire(storage, NAME, wait=lambda: clock.beaten == 7, poll_s=0.5) is None
    assert clock.passed_s == 7 * HEARTBEAT_S > TTL_S
    assert generations(storage, NAME) == 1


def test_the_old_owner_sees_that_it_lost(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)
    old = acquire(storage, NAME)
    assert old is not None
    old.check()
    held_elsewhere(storage, generation=2)
    with pytest.raises(LeaseLost, match="generation 2"):
        old.check()
    before = storage.read(f"{NAME}/000002.json")
    time.sleep(0.2)
    old.release()
    assert storage.read(f"{NAME}/000002.json") == before


def test_what_is_done_between_two_looks_is_not_started_again(storage: LocalStorage) -> None:
    """A holder that finishes after the waiter's first look leaves a released lease, which must not count a new run."""
    storage.put_atomic(f"{NAME}/000001.json", b'{"state": "released"}')
    looks = iter([False, True])
    assert acquire(storage, NAME, wait=lambda: next(looks)) is None
    assert generations(storage, NAME) == 1


def test_one_of_many_takers_wins(storage: LocalStorage) -> None:
    won, lost = [], []
    barrier = threading.Barrier(8)

    def take() -> None:
        barrier.wait()
        try:
            won.append(acquire(storage, NAME))
        except LeaseHeld as error:
            lost.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost), generations(storage, NAME)) == (1, 7, 1)
    won[0].release()
