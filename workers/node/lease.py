"""Leases over a storage: who runs a stage, who drives a study.

A lease is a series of generation files ``<name>/<generation>.json``. Taking it means creating the next generation with
``put_if_absent``, so exactly one taker wins, and the files count how often the thing was started. The holder rewrites its
file every few seconds; a taker that sees no change for ``ttl_s`` on its own clock (no clock is compared across machines), or
that finds the holder's process gone on its own machine, takes the next generation.

Whether a taker won is not left to the answer of the storage, which may be lost, or be that of a repeated request: every taking
has a nonce, and what lies in the storage says whose it is.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from workers.node.identity import alive, identity
from workers.node.lease_records import generation_file, generations, holder, newest, parse, who
from workers.node.storage import Storage, StorageFault

__all__ = ["Lease", "LeaseHeld", "LeaseLost", "acquire", "generations", "holder"]

TTL_S = 30.0
"""A holder elsewhere that is silent for so long is succeeded."""

HEARTBEAT_S = 5.0

MARGIN_S = 10.0
"""So long before its time to live is over a holder that could not renew its lease starts nothing more."""

LIVING_TTL_S = 300.0
"""A holder on this machine that lives and is silent for so long is stopped or cut off: whoever waits for it goes on without it."""

TRIES = 5
"""Writes in a row that left nothing in the storage, after which its fault is the caller's."""

log = logging.getLogger("vitpareto")

_nonces: set[str] = set()
"""Of the leases that this process holds or is about to take; a record of this process with another one is nobody's."""


class LeaseHeld(Exception):
    """Somebody else holds the lease; ``owner`` says who."""

    def __init__(self, name: str, owner: dict[str, Any]) -> None:
        self.owner = owner
        super().__init__(f"{name} is held by {who(owner)}")


class LeaseLost(Exception):
    """A successor took the lease over while this process still ran."""


class Lease:
    """A held lease; a context manager that releases it. Make one with :func:`acquire`."""

    def __init__(self, storage: Storage, name: str, generation: int, owner: dict[str, Any], since: float) -> None:
        """Starts renewing.

        Args:
            since: when the storage was asked for it, by :func:`_now`.
        """
        self.storage, self.name, self.generation, self.owner = storage, name, generation, owner
        self._renewed = since
        self._successor: dict[str, Any] | None = None
        self._unheard = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {name}", daemon=True)
        self._thread.start()

    # --- renewing -----------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        count = 0
        while not self.lost and not self._stop.wait(HEARTBEAT_S):
            count += 1
            try:
                self._renew(count)
            except Exception as error:  # noqa: BLE001 - storage libraries raise anything, and a thread that ends loses the lease
                if not self._unheard:
                    log.warning(
                        "%s: the storage does not take the renewal of this lease (%s: %s); trying again every %g s",
                        self.name,
                        type(error).__name__,
                        error,
                        HEARTBEAT_S,
                    )
                self._unheard = True

    def _renew(self, count: int) -> None:
        asked = _now()
        try:
            self._write("held", beat=count)
        finally:
            self._look_for_successor()
        if not self.lost:
            self._renewed = asked
        if self._unheard:
            log.warning("%s: the storage answers again", self.name)
            self._unheard = False

    def _write(self, state: str, **more: object) -> None:
        """Rewrites the record where it lies, and nowhere else: below a lost mount nobody would see it, and all would seem well."""
        file, record = generation_file(self.name, self.generation), {**self.owner, "state": state, **more}
        try:
            found = parse(self.storage.read(file))
        except FileNotFoundError:
            raise StorageFault(f"{file} is gone: the folder was moved, or is not mounted any more") from None
        if found.get("nonce", self.owner["nonce"]) != self.owner["nonce"]:
            raise StorageFault(f"{file} is the record of {who(found)}: another folder is in the place of this one")
        self.storage.put_atomic(file, json.dumps(record).encode())

    def _look_for_successor(self) -> None:
        try:
            found = self.storage.read(generation_file(self.name, self.generation + 1))
        except FileNotFoundError:
            return
        self._successor = parse(found)

    # --- asked by its holder ------------------------------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        """A successor was seen. Asks nobody: a beat or :meth:`check` has looked."""
        return self._successor is not None

    @property
    def unrenewed_s(self) -> float:
        """Seconds since the storage was last asked to renew the lease and did; time in which the machine slept counts."""
        return _now() - self._renewed

    @property
    def secure(self) -> bool:
        """No successor can be there yet, nor within the next :data:`MARGIN_S`. Asks nobody, so it answers while nothing else does."""
        return not self.lost and self.unrenewed_s < TTL_S - MARGIN_S

    def check(self) -> None:
        """Asks the storage for a successor.

        A holder whose renewals failed for longer than its time to live, and whom nobody succeeded, still holds its lease.

        Raises:
            LeaseLost: there is one.
            StorageFault: it cannot be known.
        """
        if not self.lost:
            self._look_for_successor()
        if self._successor is not None:
            raise LeaseLost(
                f"{self.name}: {who(self._successor)} has taken over (generation {self.generation + 1}), "
                "since this process could not renew its lease in time"
            )

    def release(self, state: str = "released") -> None:
        """Stops the heartbeat and records ``state`` (``released`` or ``failed``).

        What was done under the lease is done, so a storage that does not take the record is only a warning: the lease ends
        with the process or goes stale.
        """
        self._stop.set()
        self._thread.join()
        try:
            self._write(state)
        except Exception as error:  # noqa: BLE001 - as in the heartbeat
            log.warning(
                "%s: the end of this lease could not be recorded: %s: %s", self.name, type(error).__name__, error
            )
        finally:
            _nonces.discard(self.owner["nonce"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release("released" if kind is None else "failed")


def _now() -> float:
    """The holder's clock. It does not stop while the machine sleeps, as time.monotonic() does on Linux: others waited meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


# --- taking -----------------------------------------------------------------------------------------------------------


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
        ttl_s: seconds without a heartbeat after which a holder on another machine counts as dead; and for which one who
            waits, or does not know whether his own write was executed, bears with a storage that does not answer.
        note: plain values that are recorded with the owner.

    Returns:
        The lease, or None where ``wait`` ended the waiting.

    Raises:
        LeaseHeld: the holder lives and ``wait`` is None.
        StorageFault: the storage does not answer, or does not take the write.
    """
    owner = {**(note or {}), **identity(), "nonce": uuid.uuid4().hex}
    _nonces.add(owner["nonce"])  # before the write: another thread may see it first
    lease = None
    try:
        lease = _Taker(storage, name, owner, wait, ttl_s).take(poll_s)
        return lease
    finally:
        if lease is None:
            _nonces.discard(owner["nonce"])


class _Taker:
    """Somebody who wants a lease, between two looks at the storage."""

    def __init__(
        self, storage: Storage, name: str, owner: dict[str, Any], wait: Callable[[], bool] | None, ttl_s: float
    ) -> None:
        self.storage, self.name, self.owner, self.wait, self.ttl_s = storage, name, owner, wait, ttl_s
        self.watched: bytes | None = None  # the holder's record, unchanged since
        self.since = 0.0
        self.asked = 0  # generation that may be ours: written, but the answer was not yes
        self.asked_at = 0.0
        self.refused = 0  # times that it was not there afterwards
        self.gave_up = False
        self.fault: OSError = StorageFault()

    def take(self, poll_s: float) -> Lease | None:
        answered = time.monotonic()
        while True:
            try:
                ended, lease = self._look()
                answered = time.monotonic()
                if ended:
                    return lease
            except OSError:
                patient = not self.gave_up and (self.asked or self.wait is not None)
                if not patient or time.monotonic() - answered > self.ttl_s:
                    raise
            time.sleep(poll_s)

    def _look(self) -> tuple[bool, Lease | None]:
        """One look at the storage, and a write where the lease is free; (True, what :func:`acquire` returns) ends it."""
        if not self.asked and self._done():
            return True, None
        last, content = newest(self.storage, self.name, self.asked)
        record = parse(content)
        if record.get("nonce") == self.owner["nonce"]:
            return True, self._lease(last)
        if self.asked > last:
            self._count_refusal()
        elif self.asked:  # somebody else's
            self.asked = self.refused = 0
        if not self._free(record, content):
            return False, None
        if self._done():  # the holder finished between the first look and its release
            return True, None
        return self._write(last + 1)

    def _done(self) -> bool:
        return self.wait is not None and self.wait()

    def _lease(self, generation: int) -> Lease:
        return Lease(self.storage, self.name, generation, self.owner, self.asked_at)

    def _count_refusal(self) -> None:
        """Raises the storage's fault where it takes no write: at once for who does not wait, the others have time."""
        self.refused += 1
        self.gave_up = self.refused >= TRIES and (self.wait is None or _now() - self.asked_at > self.ttl_s)
        if self.gave_up:
            raise self.fault

    def _free(self, record: dict[str, Any], content: bytes) -> bool:
        """Says whether nobody holds the lease whose newest record this is.

        Raises:
            LeaseHeld: somebody does, and nobody waits.
        """
        if record.get("state") != "held":
            return True
        lives = _lives(record)
        beaten = self.watched is not None and content != self.watched
        if self.wait is None and (lives or beaten):
            raise LeaseHeld(self.name, record)
        if content != self.watched:
            self.watched, self.since = content, time.monotonic()
        silent_s = time.monotonic() - self.since  # asleep, this machine has not listened: that time must not count
        return lives is False or silent_s > (LIVING_TTL_S if lives else self.ttl_s)

    def _write(self, generation: int) -> tuple[bool, Lease | None]:
        if generation != self.asked:
            self.asked, self.asked_at = generation, _now()
        file = generation_file(self.name, generation)
        try:
            if self.storage.put_if_absent(file, json.dumps({**self.owner, "state": "held"}).encode()):
                return True, self._lease(generation)
            self.fault = StorageFault(f"{file}: the storage says that it is there, and does not show it")
        except OSError as error:
            self.fault = error
        return False, None


def _lives(record: dict[str, Any]) -> bool | None:
    """As :func:`alive`; but what this very process does not hold it has given up, whatever the record says."""
    lives = alive(record)
    if lives and record.get("pid") == os.getpid():
        return record.get("nonce") in _nonces
    return lives
