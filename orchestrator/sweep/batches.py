"""How many works a worker is handed at once: one where trials take long, several where handing over would take longer than they do.

Tune spends tens of milliseconds of the driver's CPU on a trial of its own, whatever that does (docs/decisions/0033-throughput.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # workers import this file, and have no use for what a sweep imports
    from orchestrator.sweep.state import Sweep
    from orchestrator.sweep.work import Work

MOST = 16
"""Works of a batch: beyond it Tune's share of a trial is smaller than everything else that is done for it."""

SHARE = 20
"""A batch is at most this part of the trials so far: what a sampler does not know yet stays small beside what it knows."""

LAST = 8
"""Works whose seconds are remembered; the slowest of them counts."""

BATCH_S = 1.0
"""Longest time that a batch is meant to take. After it a worker starts no further work of the batch and hands the rest back."""


class Batches:
    """Sizes batches by what works took.

    Args:
        most: works of a batch; 1 hands over one at a time, whatever they take.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._seconds: deque[float] = deque(maxlen=LAST)

    def note(self, seconds: Sequence[float]) -> None:
        """Takes how long works took that have ended, in seconds each."""
        self._seconds.extend(seconds)

    def size(self, done: int) -> int:
        """Returns how many works the next batch has, 1 or more.

        Args:
            done: trials that have ended in this study.
        """
        if len(self._seconds) < LAST:
            return 1
        fitting = int(BATCH_S / max(*self._seconds, 1e-9))
        return max(1, min(self.most, fitting, done // SHARE))


def take_back(sweep: Sweep, works: Sequence[Work], outcomes: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Takes what the trainable reported of a batch. Works beyond the last outcome were not started: they are issued again."""
    for work, found in zip(works, outcomes, strict=False):
        sweep.ended(work, found)
    for work in works[len(outcomes) :]:
        sweep.again(work)


def take_loss(sweep: Sweep, works: Sequence[Work], status: str, reason: str, marked: Collection[str]) -> None:
    """Takes that the worker of a batch is gone: the work that it ran pays for it. Those before have ended, those after were not started.

    Args:
        status, reason: see :meth:`Sweep.lost`.
        marked: trials that are marked as running. Where none of the batch is, the worker may never have come to its first work,
            which then pays, so that a worker that cannot start is not tried for ever.
    """
    for place, work in enumerate(works):
        if place == 0 or any(spec.trial_id in marked for spec in work.specs):
            sweep.lost(work, status, reason)
        else:
            sweep.again(work)
