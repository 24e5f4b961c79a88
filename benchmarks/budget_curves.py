"""What a search has found for the training seconds it has spent, and how much of another search's seconds that is.

Pure: lists of trials in the order in which they ended go in, curves and shares come out. ``bench_budget`` makes the runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from orchestrator.frontier.dominance import hypervolume

Floats = npt.NDArray[np.float64]

COSTS = ("train_s", "train_cpu_s", "cpu_s", "trial_s")
"""What a trial spends: wall and CPU seconds of surgery, recovery and conversion; CPU and wall seconds of all it does."""


@dataclass(frozen=True)
class Spent:
    """One attempt: what it cost, and its metrics where it was finished (None: it failed, or was stopped at a rung)."""

    costs: Mapping[str, float]
    metrics: Mapping[str, float] | None
    recipe: str = ""
    status: str = "ok"


@dataclass(frozen=True)
class Run:
    """One search: its attempts in the order in which they ended.

    Attributes:
        objectives: name to direction.
        baseline: metrics of the uncompressed model, which every search knows from the start and none pays for.
        reference: of the hypervolume, one number an objective, in the objectives' own units.
        notes: machine, versions, study, wall seconds; not used here.
    """

    data: str
    side: str
    seed: int
    objectives: Mapping[str, str]
    baseline: Mapping[str, float]
    reference: tuple[float, ...]
    trials: tuple[Spent, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads what :meth:`to_dict` and JSON made of a run."""
        trials = tuple(Spent(**trial) for trial in values["trials"])
        return cls(**{**values, "reference": tuple(values["reference"]), "trials": trials})

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON takes; :meth:`from_dict` reads them back."""
        return asdict(self)

    @property
    def name(self) -> tuple[str, str, int]:
        """What tells one run from another."""
        return self.data, self.side, self.seed

    def spent(self, cost: str = "train_s") -> float:
        """Returns what all attempts cost together."""
        return sum(trial.costs[cost] for trial in self.trials)

    def curve(self, cost: str = "train_s") -> tuple[Floats, Floats]:
        """Returns cost and hypervolume after each attempt, (n + 1,) each; the first point is the baseline for nothing.

        The hypervolume is that of values divided by the baseline's, up to the reference divided likewise.
        """
        base = np.array([self.baseline[name] for name in self.objectives])
        corner, directions = np.array(self.reference) / base, list(self.objectives.values())
        points, costs, volumes = [np.ones(len(base))], [0.0], [0.0]
        volumes[0] = hypervolume(np.array(points), directions, corner)
        for trial in self.trials:
            costs.append(costs[-1] + trial.costs[cost])
            if trial.metrics is not None:
                points.append(np.array([trial.metrics[name] for name in self.objectives]) / base)
            volumes.append(hypervolume(np.array(points), directions, corner))
        return np.array(costs), np.array(volumes)

    @property
    def volume(self) -> float:
        """The hypervolume at the end."""
        return float(self.curve()[1][-1])


def reached(costs: Floats, volumes: Floats, level: float) -> float:
    """Returns the cost at which a curve first is at ``level``; infinity where it never is."""
    at = np.flatnonzero(volumes >= level)
    return float(costs[at[0]]) if len(at) else math.inf


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns first quartile, median and third quartile, each one of the values (or the lower of two), so that infinities may be among them."""
    low, middle, high = np.quantile(np.array(values, dtype=np.float64), [0.25, 0.5, 0.75], method="inverted_cdf")
    return float(low), float(middle), float(high)


@dataclass(frozen=True)
class Share:
    """How much of the stock search's cost another one needs for the stock search's hypervolume.

    Attributes:
        level: median of the stock runs' hypervolumes.
        stock: median cost of the stock runs.
        needed: first quartile, median and third quartile of the cost at which the runs reach ``level``; infinity: never.
        reached: runs that reach it, of ``runs``.
    """

    level: float
    stock: float
    needed: tuple[float, float, float]
    reached: int
    runs: int

    @property
    def of_stock(self) -> tuple[float, float, float]:
        """``needed`` as shares of ``stock``."""
        low, middle, high = (value / self.stock for value in self.needed)
        return low, middle, high


def share(stock: Sequence[Run], other: Sequence[Run], cost: str = "train_s") -> Share:
    """Compares runs with those of stock, on the same data.

    Raises:
        ValueError: one side has no run, or the two did not ask the same question.
    """
    if not stock or not other:
        raise ValueError(f"a share needs runs of both sides, got {len(stock)} of stock and {len(other)} of the other")
    questions = {(run.data, tuple(run.objectives.items()), run.reference) for run in (*stock, *other)}
    if len(questions) > 1:
        raise ValueError(f"runs of {len(questions)} questions do not compare: {sorted(map(str, questions))}")
    level = quartiles([run.volume for run in stock])[1]
    found = [reached(*run.curve(cost), level) for run in other]
    costs = quartiles([run.spent(cost) for run in stock])[1]
    return Share(level, costs, quartiles(found), sum(map(math.isfinite, found)), len(found))


def on_grid(runs: Sequence[Run], grid: Floats, cost: str = "train_s") -> Floats:
    """Returns the hypervolume of each run at each cost of ``grid``, (runs, points): the last one at or before it, NaN
    after the run's end."""
    found = np.full((len(runs), len(grid)), math.nan)
    for row, run in zip(found, runs, strict=True):
        costs, volumes = run.curve(cost)
        inside = grid <= costs[-1]
        row[inside] = volumes[np.searchsorted(costs, grid[inside], side="right") - 1]
    return found
