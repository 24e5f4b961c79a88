"""A look from outside Tune's loop: does the cluster live, and does the driver still turn?

Where the GCS dies, the main thread waits inside Ray where no exception and no signal reaches it, and after a minute Ray ends the
process; where the raylet dies (it goes with its agents) Tune's loop turns for ever over what will not come. Both are seen here by
their ports: the kernel closes those of a dead process at once, whatever its clients are waiting for.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

LOOK_S = 2.0
"""Seconds between two looks."""

REFUSALS = 2
"""Looks in a row at which nobody listens: one may fall between two Rays of a cluster that is restarted."""

SILENCE_S = 45.0
"""No answer of any kind: a network may be gone for a while. Ray itself gives up after a minute, and ends the process."""

STANDSTILL_S = 600.0
"""Without a turn of Tune's loop. The slowest thing inside it is a storage that is retried for minutes."""


class Watch:
    """Watches a cluster from a thread and calls ``lost`` with a reason, once; that is expected not to return.

    Args:
        lost: takes the reason.
    """

    def __init__(self, lost: Callable[[str], None]) -> None:
        self._lost = lost
        self._turned = time.monotonic()

    def turn(self) -> None:
        """Says that the main thread goes on."""
        self._turned = time.monotonic()

    def lose(self, reason: str) -> None:
        """Says that the cluster is of no use any more, where somebody else noticed."""
        self._lost(reason)

    @contextmanager
    def over(self, places: Mapping[str, tuple[str, int]]) -> Iterator[None]:
        """Watches during the block.

        Args:
            places: what listens there to host and port.
        """
        done = threading.Event()
        self.turn()
        thread = threading.Thread(target=self._look, args=(places, done), name="watch over Ray", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()

    def _look(self, places: Mapping[str, tuple[str, int]], done: threading.Event) -> None:
        refused = dict.fromkeys(places, 0)
        heard = dict.fromkeys(places, time.monotonic())
        while not done.wait(LOOK_S):
            for name, place in places.items():
                answer = listens(place)
                refused[name] = refused[name] + 1 if answer is False else 0
                if answer:
                    heard[name] = time.monotonic()
                silent = time.monotonic() - heard[name]
                if (refused[name] >= REFUSALS or silent > SILENCE_S) and not done.is_set():
                    self._lost(f"{name} does not answer at {place[0]}:{place[1]}")
                    return
            still = time.monotonic() - self._turned
            if still > STANDSTILL_S and not done.is_set():
                self._lost(f"the driver has waited for Ray for {still:.0f} s")
                return


def listens(place: tuple[str, int], timeout_s: float = LOOK_S) -> bool | None:
    """Says whether somebody listens at a host and port; None where it cannot be told, no answer being none."""
    try:
        socket.create_connection(place, timeout_s).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return None
    return True
