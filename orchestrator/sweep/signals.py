"""What ends a run early: SIGINT, SIGTERM and SIGHUP, each like Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def taken(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Has ``handler`` take the signals that end a run for the time of the block; in the main thread only.

    SIGINT is taken even where it was ignored, because a shell starts what runs in the background so; an ignored SIGHUP stays
    ignored, because that is what `nohup` asks for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    for number in ENDING:
        if number == signal.SIGINT or before[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


class Interruption:
    """Turns the first signal into a KeyboardInterrupt, and takes no notice of further ones: `docker stop`, systemd and Slurm
    send theirs to several processes of a run, which pass it on to each other.

    Attributes:
        signal: number of the signal that came, None without one.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._ignored = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if number == getattr(signal, "SIGHUP", None):
            leave_terminal()
        if self.signal is not None or self._ignored:
            return
        self.signal = number
        if signal.getsignal(signal.SIGINT) is not self:  # Tune's, which ends its trials
            os.kill(os.getpid(), signal.SIGINT)
        else:
            raise KeyboardInterrupt

    def ignore(self) -> None:
        """From here on nothing is broken off: what is left to do takes moments."""
        self._ignored = True


def leave_terminal() -> None:
    """Writes nowhere from here on where a terminal was written to: it is gone, and every line would be an error."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                if stream.isatty():
                    os.dup2(null, stream.fileno())
        os.close(null)
