"""What passes between the parts of a sweep: a recipe that was asked for, the work that it becomes, and how far a study is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.trial import Recipe, TrialSpec


@dataclass(frozen=True)
class Proposal:
    """One recipe that Optuna asked for; ``state`` is what :meth:`orchestrator.sweep.searcher.Proposer.restore` needs to rebuild its Optuna trial."""

    number: int
    recipe: Recipe
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """What one Tune trial runs: one recipe under the seeds that are still to do. ``number`` is None for the baseline."""

    number: int | None
    recipe: Recipe
    specs: tuple[TrialSpec, ...]
    state: Mapping[str, Any] | None

    def to_dict(self, runner: str) -> dict[str, Any]:
        """Returns plain values for the trainable."""
        return {"specs": [s.to_dict() for s in self.specs], "optuna": self.state, "runner": runner}


@dataclass
class Snapshot:
    """What a person wants to know while a study runs; ``paused`` are trials that stand at a rung, which count as done."""

    done: int
    budget: int
    running: int
    waiting: int
    failed: Counter[str]
    best: dict[str, tuple[float, str]]
    hypervolume: float | None
    elapsed_s: float
    left_s: float | None
    note: str = ""
    paused: int = 0
