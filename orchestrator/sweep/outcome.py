"""How a run of a study ends: what it returns and what it raises. Light: importing it loads neither torch nor Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


class StudyBusy(Exception):
    """Another live driver runs this study."""


class StudyFailed(Exception):
    """The study could not go on; the message says why. What was found is in the ledger."""


class Interrupted(KeyboardInterrupt):
    """A signal ended what ran, and there was nothing to bring to an end; ``signal`` is its number."""

    def __init__(self, signal: int) -> None:
        self.signal = signal
        super().__init__("interrupted; the same command goes on")


@dataclass(frozen=True)
class StudyRun:
    """How a run of a study ended.

    Attributes:
        folder: path or URL of the results.
        done: trials with an end, of ``budget``.
        failed: failure class to number of trials.
        complete: the budget or the space was used up; False after an interruption or a used-up time budget.
        reason: why it stopped early, "" otherwise.
        hypervolume: of the final frontier, baseline-relative.
        paused: trials that stand at a rung of their recovery training, which are ``done`` as well.
        signal: number of the signal that ended it, None without one.
    """

    name: str
    folder: str
    done: int
    budget: int
    failed: Mapping[str, int]
    complete: bool
    reason: str
    hypervolume: float | None
    elapsed_s: float
    signal: int | None = None
    paused: int = 0
