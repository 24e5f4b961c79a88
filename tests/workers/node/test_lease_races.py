"""Leases over a storage that answers badly: every race has one winner, and nobody waits for himself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.places import ROOT
from tests.unreliable import WAYS, Unreliable
from workers.node.lease import Lease, LeaseHeld, acquire, generations
from workers.node.storage import LocalStorage, StorageFault

RACES, RACERS = 1000, 3

RACE = """
import json, sys
from tests.unreliable import Unreliable
from workers.node.lease import LeaseHeld, acquire
from workers.node.storage import LocalStorage, StorageFault
number = int(sys.argv[2])
storage = Unreliable(LocalStorage(sys.argv[1]), number, ("well", "answer lost", "twice", "never arrives"), blind=0.1)
print("ready", flush=True)
sys.stdin.readline()
leases = []
for race in range(40):
    try:
        leases.append(acquire(storage, f"{race}/lease", poll_s=0.001))
    except (LeaseHeld, StorageFault):
        pass
print(json.dumps([lease.name for lease in leases]), flush=True)
sys.stdin.readline()
for lease in leases:
    lease.release()
"""


def within(looks: int) -> Callable[[], bool]:
    """Returns what ends a waiting with a failure after so many looks."""
    left = iter(range(looks))

    def wait() -> bool:
        assert next(left, None) is not None, "waits for itself"
        return False

    return wait


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("waits", [False, True])
def test_nobody_waits_for_himself(tmp_path: Path, way: str, waits: bool) -> None:
    storage = Unreliable(LocalStorage(tmp_path), 0, [way])
    if way == "never arrives":
        storage.ways = (way, "well")
    lease = acquire(storage, "stage/leases", wait=within(100) if waits else None, poll_s=0.01)
    assert lease is not None
    storage.settle()
    assert generations(storage, "stage/leases") == lease.generation == 1
    lease.release()
    assert json.loads(storage.read("stage/leases/000001.json"))["state"] == "released"


def test_a_write_that_never_arrives_is_no_lease(tmp_path: Path) -> None:
    storage = Unreliable(LocalStorage(tmp_path), 0, ["never arrives"])
    with pytest.raises(StorageFault, match="no connection"):
        acquire(storage, "study/lease", poll_s=0.001)
    with pytest.raises(StorageFault, match="no connection"):
        acquire(storage, "study/lease", wait=within(1000), poll_s=0.001, ttl_s=0.05)


def test_a_lease_that_was_given_up_is_not_waited_for(tmp_path: Path) -> None:
    """The write of somebody who has given up, a thread of this very process, arrives when nobody minds it any more."""
    storage = Unreliable(LocalStorage(tmp_path), 0, ["never arrives"])
    lost: list[bytes] = []
    storage.put_if_absent, put = lambda name, data: lost.append(data) or put(name, data), storage.put_if_absent
    with pytest.raises(StorageFault):
        acquire(storage, "stage/leases", poll_s=0.001)
    storage.put_atomic("stage/leases/000001.json", lost[-1])
    with acquire(storage.storage, "stage/leases", wait=within(2), poll_s=0.001) as lease:
        assert lease.generation == 2


def test_a_thousand_races_of_threads_have_a_winner_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # most of the time, and nothing to the point
    storage = Unreliable(LocalStorage(tmp_path), 1, blind=0.05)
    barrier = threading.Barrier(RACERS)

    def race(number: int) -> Lease | None:
        barrier.wait()
        try:
            return acquire(storage, f"{number}/lease", poll_s=0.001)
        except (LeaseHeld, StorageFault):
            return None

    with ThreadPoolExecutor(RACERS) as racers:
        for number in range(RACES):
            found = [f.result() for f in [racers.submit(race, number) for _ in range(RACERS)]]
            winners = [lease for lease in found if lease is not None]
            assert len(winners) == 1, f"race {number} has {len(winners)} winners"
            assert not winners[0].lost
            winners[0].release()
    storage.settle()


def test_races_of_processes_have_a_winner_each(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    racers = [
        subprocess.Popen([*command, str(n)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]

    def read(racer: subprocess.Popen[str]) -> str:
        assert racer.stdout is not None
        return racer.stdout.readline()

    def go(racer: subprocess.Popen[str]) -> None:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()

    assert [read(racer) for racer in racers] == ["ready\n"] * 3
    for racer in racers:
        go(racer)
    won = [name for racer in racers for name in json.loads(read(racer))]
    for racer in racers:
        go(racer)
        racer.communicate()
    assert sorted(won) == sorted(f"{n}/lease" for n in range(40))
