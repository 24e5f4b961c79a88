"""Leases: one holder, a successor for a dead one at once, for a silent one after the time to live."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from workers import lease as lease_module
from workers.lease import LeaseHeld, LeaseLost, acquire, generations, holder, identity
from workers.storage import LocalStorage

NAME = "studies/lease"
HOLD = """
import sys, time
from workers.lease import acquire
from workers.storage import LocalStorage
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
    process.send_signal(signal.SIGKILL)
    started = time.monotonic()
    while process.poll() is None and holder(storage, NAME):
        time.sleep(0.01)
    with acquire(storage, NAME) as successor:  # a zombie counts as dead: nobody has waited for it yet
        assert time.monotonic() - started < 2.0
        assert successor.generation == 2
    process.wait()
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


def test_a_silent_holder_elsewhere_is_succeeded_after_the_ttl(storage: LocalStorage) -> None:
    held_elsewhere(storage)
    started = time.monotonic()
    with acquire(storage, NAME, ttl_s=0.5, poll_s=0.05) as successor:
        assert time.monotonic() - started > 0.5
        assert successor.generation == 2


def test_a_heartbeat_elsewhere_is_respected(storage: LocalStorage) -> None:
    held_elsewhere(storage)
    threading.Timer(0.3, held_elsewhere, (storage, 1, 1)).start()
    with pytest.raises(LeaseHeld, match="another-machine"):
        acquire(storage, NAME, ttl_s=5.0, poll_s=0.05)
    assert generations(storage, NAME) == 1


def test_a_waiter_waits_while_the_holder_beats(storage: LocalStorage) -> None:
    held_elsewhere(storage)
    done = threading.Event()

    def beat() -> None:
        for count in range(1, 8):
            time.sleep(0.1)
            held_elsewhere(storage, 1, count)
        done.set()

    threading.Thread(target=beat).start()
    assert acquire(storage, NAME, wait=done.is_set, ttl_s=0.5, poll_s=0.02) is None
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
