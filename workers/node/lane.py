"""The lane: who may use a device of this node right now.

Training holds a device's lane shared, in chunks; measurement takes it exclusively and with priority, so that nothing
else runs while it is timed. Two files locked with ``flock`` do it: ``lane`` is the right to work, and the way to it
leads through ``gate``, which a waiting or running measurement keeps closed. The kernel releases the locks of a process
that dies.

Covers the processes of one user on one machine; it does not see foreign load. A child forked while a lock is held would
share it, therefore child processes are spawned.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from workers.node.deadline import Deadline
from workers.node.private_folder import private_folder

TICK_S = 0.1
"""Shortest time between two looks at the gate; a measurement waits for about one training chunk."""


class Lane:
    """The lane of one device, for one thread.

    Attributes:
        waited_s: seconds spent waiting for others; they do not count towards ``deadline``.
    """

    def __init__(self, device_key: str, *, deadline: Deadline | None = None) -> None:
        """Opens the lane.

        Args:
            device_key: ``cpu``, or what identifies a GPU on this node (its UUID).
            deadline: paused while this lane waits.
        """
        self.waited_s = 0.0
        self._deadline = deadline
        folder = private_folder("lane", "VITPARETO_LANE_DIR")
        name = re.sub(r"[^A-Za-z0-9-]+", "_", device_key)
        self._gate, self._lane = (
            os.open(folder / f"{name}.{part}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            for part in ("gate", "lane")
        )
        self._held: str | None = None
        self._looked = 0.0

    def __del__(self) -> None:
        for fd in (getattr(self, "_gate", None), getattr(self, "_lane", None)):
            if fd is not None:
                os.close(fd)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Work beside others of the same kind; call :meth:`tick` between chunks."""
        self._enter("shared")
        try:
            self._take_shared()
            yield
        finally:
            self._leave()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Work alone: those who hold the lane finish their chunk, nobody else gets in before."""
        self._enter("exclusive")
        try:
            with self._waiting():
                fcntl.flock(self._gate, fcntl.LOCK_EX)
                fcntl.flock(self._lane, fcntl.LOCK_EX)
            yield
        finally:
            self._leave()

    def tick(self) -> None:
        """Between two chunks of shared work: steps aside for who waits to measure. Cheap; does nothing outside."""
        now = time.monotonic()
        if self._held != "shared" or now - self._looked < TICK_S:
            return
        self._looked = now
        try:
            fcntl.flock(self._gate, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self._lane, fcntl.LOCK_UN)
            self._take_shared()
        else:
            fcntl.flock(self._gate, fcntl.LOCK_UN)

    def _take_shared(self) -> None:
        with self._waiting():
            fcntl.flock(self._gate, fcntl.LOCK_EX)  # exclusive too: overlapping readers would starve a measurement
            try:
                fcntl.flock(self._lane, fcntl.LOCK_SH)
            finally:
                fcntl.flock(self._gate, fcntl.LOCK_UN)

    def _enter(self, kind: str) -> None:
        if self._held is not None:
            raise RuntimeError(f"the lane is held {self._held} already; leave that block before taking it {kind}")
        self._held = kind

    def _leave(self) -> None:
        fcntl.flock(self._lane, fcntl.LOCK_UN)
        fcntl.flock(self._gate, fcntl.LOCK_UN)
        self._held = None

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            with self._deadline.paused() if self._deadline is not None else nullcontext():
                yield
        finally:
            self.waited_s += time.monotonic() - start
