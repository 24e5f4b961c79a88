"""Leases over a storage: who runs a stage, who drives a study.

A lease is a series of generation files ``<name>/<generation>.json``. Taking it means creating the next generation with
``put_if_absent``, so exactly one taker wins, and the files count how often the thing was started. The holder rewrites its
file every few seconds; a taker that sees no change for ``ttl_s`` on its own clock (no clock is compared across machines), or
that finds the holder's process gone on its own machine, takes the next generation.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import psutil

from workers.node.storage import Storage

TTL_S = 30.0
HEARTBEAT_S = 5.0


class LeaseHeld(Exception):
    """Somebody else holds the lease; ``owner`` says who."""

    def __init__(self, name: str, owner: dict[str, Any]) -> None:
        self.owner = owner
        super().__init__(f"{name} is held by process {owner.get('pid')} on {owner.get('host')}")


class LeaseLost(Exception):
    """A successor took the lease over while this process still ran."""


class Lease:
    """A held lease; a context manager that releases it. Make one with :func:`acquire`."""

    def __init__(self, storage: Storage, name: str, generation: int, owner: dict[str, Any]) -> None:
        self.storage, self.name, self.generation, self.owner = storage, name, generation, owner
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {name}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(HEARTBEAT_S):
            count += 1
            try:
                self._write("held", beat=count)
            except OSError:
                continue  # the next beat tries again; a lease that cannot be written goes stale by itself

    def _write(self, state: str, **more: object) -> None:
        record = {**self.owner, "state": state, **more}
        self.storage.put_atomic(_file(self.name, self.generation), json.dumps(record).encode())

    def check(self) -> None:
        """Raises LeaseLost if a successor has taken over."""
        if self.storage.exists(_file(self.name, self.generation + 1)):
            raise LeaseLost(
                f"{self.name}: generation {self.generation + 1} exists, this process is no longer the owner"
            )

    def release(self, state: str = "released") -> None:
        """Stops the heartbeat and records ``state`` (``released`` or ``failed``)."""
        self._stop.set()
        self._thread.join()
        self._write(state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release("released" if kind is None else "failed")


def _file(name: str, generation: int) -> str:
    return f"{name}/{generation:06d}.json"


def generations(storage: Storage, name: str) -> int:
    """Returns how often the lease was taken so far: how often the thing it guards was started."""
    return len(storage.files(name))


def holder(storage: Storage, name: str) -> dict[str, Any] | None:
    """Returns who holds the lease; None where nobody does, or a process of this machine that is gone."""
    files = storage.files(name)
    record = _parse(storage.read(f"{name}/{files[-1]}")) if files else {}
    return record if record.get("state") == "held" and alive(record) is not False else None


def identity() -> dict[str, Any]:
    """Returns what names this process among all machines' past and present ones; :func:`alive` reads it."""
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": process.pid, "process_started": process.create_time()}


def alive(record: Mapping[str, Any]) -> bool | None:
    """Says whether the process with the :func:`identity` in ``record`` lives; None where it cannot be known from here."""
    if record.get("host") != socket.gethostname():
        return None
    try:
        process = psutil.Process(int(record["pid"]))
        if abs(process.create_time() - float(record["process_started"])) > 1.0:
            return False
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except (KeyError, TypeError, ValueError):
        return None


def acquire(
    storage: Storage,
    name: str,
    *,
    wait: Callable[[], bool] | None = None,
    poll_s: float = 0.2,
    ttl_s: float = TTL_S,
    note: dict[str, Any] | None = None,
) -> Lease | None:
    """Takes the lease ``name``, taking over from a dead holder.

    Args:
        wait: called at every look while somebody else holds the lease; returning True ends the wait with None (what was
            wanted is there by now). None does not wait while the holder is alive: it raises.
        ttl_s: seconds without a heartbeat after which a holder on another machine counts as dead.
        note: plain values that are recorded with the owner.

    Returns:
        The lease, or None where ``wait`` ended the waiting.

    Raises:
        LeaseHeld: the holder lives and ``wait`` is None.
    """
    watched: bytes | None = None
    since = 0.0
    while True:
        if wait is not None and wait():
            return None
        files = storage.files(name)
        last = int(files[-1].removesuffix(".json")) if files else 0
        content = storage.read(_file(name, last)) if last else b""
        record = _parse(content)
        if record.get("state") == "held":
            lives = alive(record)
            beaten = watched is not None and content != watched
            if wait is None and (lives or beaten):
                raise LeaseHeld(name, record)
            if content != watched:
                watched, since = content, time.monotonic()
            if lives or (lives is None and time.monotonic() - since <= ttl_s):
                time.sleep(poll_s)
                continue
        if wait is not None and wait():  # the holder finished between the first look and its release
            return None
        owner = {**(note or {}), **identity()}
        if storage.put_if_absent(_file(name, last + 1), json.dumps({**owner, "state": "held"}).encode()):
            return Lease(storage, name, last + 1, owner)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
