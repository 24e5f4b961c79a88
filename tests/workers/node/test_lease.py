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
from workers.node.identity import alive, identity
from workers.node.lease import (
    HEARTBEAT_S,
    LIVING_TTL_S,
    MARGIN_S,
    TTL_S,
    LeaseHeld,
    LeaseLost,
    acquire,
    generations,
    holder,
)
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
    record = {**identity(), "host": "another-machine", "state": "held", "beat": beat, "nonce": "another"}
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
    record = {**identity(), "start_ticks": 1, "state": "held"}
    storage.put_atomic(f"{NAME}/000001.json", json.dumps(record).encode())
    with acquire(storage, NAME) as successor:
        assert successor.generation == 2


def test_a_clock_that_was_set_lets_nobody_in(storage: LocalStorage) -> None:
    """A process's start by the wall clock moves with that clock: here by hours."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, storage.url, NAME], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        record = json.loads(storage.read(f"{NAME}/000001.json"))
        record["process_started"] -= 7200
        storage.put_atomic(f"{NAME}/000001.json", json.dumps(record).encode())
        assert holder(storage, NAME) is not None
        with pytest.raises(LeaseHeld):
            acquire(storage, NAME)
    finally:
        process.kill()
        process.communicate()


def test_foreign_files_in_the_folder_are_no_generations(storage: LocalStorage) -> None:
    storage.put_atomic(f"{NAME}/notes.txt", b"do not touch")
    storage.put_atomic(f"{NAME}/1e3.json", b"{}")
    with acquire(storage, NAME) as lease:
        assert lease.generation == generations(storage, NAME) == 1


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


def test_a_waiter_goes_on_without_a_stopped_process_of_this_machine(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives, so a driver does not take over; but a stage that it holds would make everybody wait for ever."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, storage.url, NAME], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGSTOP)
        clock = Clock(monkeypatch, lease_module)
        with pytest.raises(LeaseHeld):
            acquire(storage, NAME)
        with acquire(storage, NAME, wait=lambda: False, poll_s=1.0) as successor:
            assert clock.passed_s == LIVING_TTL_S + 1.0
            assert successor.generation == 2
    finally:
        process.kill()
        process.communicate()


class Broken(LocalStorage):
    """Fails with what storage libraries raise, which is no OSError, while ``down``."""

    down = False

    def put_atomic(self, name: str, data: bytes) -> None:
        if self.down:
            raise RuntimeError("EndpointConnectionError")
        super().put_atomic(name, data)


def beats(storage: LocalStorage) -> int:
    return int(json.loads(storage.read(f"{NAME}/000001.json")).get("beat", 0))


def test_the_heartbeat_survives_whatever_the_storage_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    storage = Broken(tmp_path)
    with acquire(storage, NAME) as lease:
        storage.down = True
        while not caplog.messages:
            time.sleep(0.01)
        time.sleep(0.1)  # several beats more
        storage.down = False
        seen = beats(storage)
        while beats(storage) == seen:
            time.sleep(0.01)
        while len(caplog.messages) < 2:
            time.sleep(0.01)
        assert lease.secure
    assert caplog.messages == [
        f"{NAME}: the storage does not take the renewal of this lease (RuntimeError: EndpointConnectionError); "
        "trying again every 0.01 s",
        f"{NAME}: the storage answers again",
    ]
    storage.down = True
    with acquire(storage, NAME):
        pass  # a record of the end that is not taken undoes nothing
    assert "the end of this lease could not be recorded" in caplog.messages[-1]
    storage.down = False
    with acquire(storage, NAME, wait=lambda: False) as third:
        assert third.generation == 3, "its own record says held, but it has given it up"


def test_a_renewal_below_a_lost_mount_is_none(
    tmp_path: Path, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What lies in the place of the storage takes every write; whoever watches the real one sees a silent holder."""
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    with acquire(storage, NAME) as lease:
        (tmp_path / "studies").rename(tmp_path / "away")
        while not caplog.messages:
            time.sleep(0.01)
        seen = lease._renewed
        time.sleep(0.1)  # several beats more
        assert lease._renewed == seen
        assert not (tmp_path / "studies").exists(), "nothing was written in its place"
        held_elsewhere(storage)
        time.sleep(0.1)
        assert json.loads(storage.read(f"{NAME}/000001.json"))["nonce"] == "another"
        (tmp_path / "studies").rename(tmp_path / "of another")
        (tmp_path / "away").rename(tmp_path / "studies")
        while len(caplog.messages) < 2:
            time.sleep(0.01)
        assert lease._renewed > seen
    assert [m.partition(": ")[2][:27] for m in caplog.messages] == [
        "the storage does not take t",
        "the storage answers again",
    ]


def test_a_holder_knows_when_a_successor_may_come(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 1e6)
    clock = Clock(monkeypatch, lease_module)
    with acquire(storage, NAME) as lease:
        clock.sleep(TTL_S - MARGIN_S - 0.5)
        assert lease.secure
        clock.sleep(0.5)
        assert not lease.secure
        assert not lease.lost
        clock.sleep(TTL_S)
        lease.check()  # nobody came, so it still holds it
        lease._renew(1)
        assert lease.secure
        held_elsewhere(storage, generation=2)
        clock.sleep(1.0)
        lease._renew(2)
        assert lease.lost
        assert not lease.secure
        assert lease.unrenewed_s == 1.0, "a renewal beside a successor is none"


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


def test_other_files_in_the_folder_of_a_lease_are_no_generations(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for name in ("notes.txt", "zz.json", "000001.json.orig", "7.json"):
        storage.put_atomic(f"job/{name}", b"mine")
    assert (generations(storage, "job"), holder(storage, "job")) == (0, None)
    lease = acquire(storage, "job")
    assert lease is not None
    with lease:
        assert (lease.generation, generations(storage, "job")) == (1, 1)
        assert (holder(storage, "job") or {})["pid"] == os.getpid()
