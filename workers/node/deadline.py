"""A trial's time limit: own work only, checked between chunks, with an alarm for code that never checks."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

MIN_ALARM_S = 0.05
"""Shortest time to which the alarm is set again, so that a paused deadline does not spin."""


GRACE = 0.1
"""Share of its limit that a trial gets beyond it to stop by itself, where what it does is whole, before the alarm breaks in."""

_guarded: list[Deadline] = []
"""The deadlines that run in this process, the innermost last: a process runs one trial at a time."""


class DeadlineExceeded(Exception):
    """The trial used up its ``timeout_s``."""


class Deadline:
    """A limit of ``timeout_s`` seconds from now, None for no limit. Time inside :meth:`paused` does not count."""

    def __init__(self, timeout_s: float | None) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s must be greater than 0, or None for no limit; got {timeout_s}")
        self.timeout_s = timeout_s
        self._started = time.monotonic()
        self._paused_s = 0.0
        self._paused_since: float | None = None
        self.told = False

    @property
    def spent_s(self) -> float:
        """Seconds of own work so far."""
        now = time.monotonic() if self._paused_since is None else self._paused_since
        return now - self._started - self._paused_s

    @property
    def remaining_s(self) -> float:
        """Seconds left; infinite without a limit, negative once exceeded."""
        return math.inf if self.timeout_s is None else self.timeout_s - self.spent_s

    @property
    def waiting_s(self) -> float:
        """Seconds since this was paused, 0.0 where it runs."""
        since = self._paused_since
        return 0.0 if since is None else time.monotonic() - since

    def check(self) -> None:
        """Raises DeadlineExceeded if no time is left; from then on ``told`` is true."""
        if self.remaining_s <= 0:
            self.told = True
            raise DeadlineExceeded(
                f"budget.trial_timeout must not be exceeded: {self.spent_s:.1f} s of work of {self.timeout_s:g} s allowed; "
                "raise it in the study, or search a cheaper range"
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count; may be nested."""
        if self._paused_since is not None:
            yield
            return
        self._paused_since = time.monotonic()
        try:
            yield
        finally:
            self._paused_s += time.monotonic() - self._paused_since
            self._paused_since = None


def waiting_s() -> float:
    """Returns for how long the trial of this process has waited for the lane or for another's stage; 0.0 where it works."""
    return _guarded[-1].waiting_s if _guarded else 0.0


@contextmanager
def guard(deadline: Deadline) -> Iterator[None]:
    """Raises DeadlineExceeded inside the block when the deadline is passed by :data:`GRACE`, in Python code that has not called
    ``check`` since.

    An alarm signal does it, so it works in the main thread of a POSIX process only and does nothing elsewhere. It
    cannot interrupt a single native call; code that swallows the exception meets it again at the next ``check``. Once the
    exception was raised, what winds up is not broken off.
    """
    _guarded.append(deadline)
    try:
        with _alarm(deadline):
            yield
    finally:
        _guarded.remove(deadline)


@contextmanager
def _alarm(deadline: Deadline) -> Iterator[None]:
    usable = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not usable or deadline.timeout_s is None:
        yield
        return

    grace_s = deadline.timeout_s * GRACE

    def arm() -> None:
        signal.setitimer(signal.ITIMER_REAL, max(deadline.remaining_s + grace_s, MIN_ALARM_S))

    def ring(number: int, frame: FrameType | None) -> None:
        if deadline.told:
            return
        if deadline.remaining_s + grace_s > 0:
            arm()  # time was added by a pause
        else:
            deadline.check()

    previous = signal.signal(signal.SIGALRM, ring)
    try:
        arm()
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
