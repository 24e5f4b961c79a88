"""When something that a driver does again and again is due: so rarely that it stays a small share of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SHARE = 0.02
"""Most of the driver's time that one thing may take: it must not be what trials wait for."""


class Pace:
    """Says when a thing is due again: after ``shortest_s``, or after so long that it takes at most :data:`SHARE` of the time.

    Args:
        shortest_s: seconds between two times where it takes no time at all.
        first_s: seconds before the first time.
    """

    def __init__(self, shortest_s: float, first_s: float = 0.0) -> None:
        self.shortest_s = shortest_s
        self._next = time.monotonic() + first_s

    @property
    def due(self) -> bool:
        """It is time."""
        return time.monotonic() >= self._next

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Does it in the block; what that takes decides when it is due again, also where it fails."""
        start = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            self._next = end + max(self.shortest_s, (end - start) / SHARE)
