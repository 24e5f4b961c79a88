"""What is learnt of a study's recipes: every objective, every constraint, and what fails.

What was fitted, to which points, is plain data (:meth:`RecipeModel.fitted`), so that a study that is resumed has the very model that
it was stopped with; points that came later are added in the order of their numbers, whenever they came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import rankdata

from orchestrator.sampling.gaussian_process import Products, scale_of, variances
from orchestrator.sampling.recipes import Features, Key
from orchestrator.sampling.targets import SCALES, Fitted, Target, backward, learn

Array = NDArray[np.float64]

MOST = 300
"""Points of a fit: time and memory grow with their number's cube and square."""

MOST_LEARNT = 160
"""Points from which the processes' numbers are learnt."""

GROWTH = 1.25
"""Points, in multiples of those of the last fit, at which the next is due."""

FAILED = "failed"

SIGNED = ("raw",)
"""Scales of constraints and of failing, where it matters on which side of a number a value lies."""


@dataclass(frozen=True)
class Outcome:
    """How a recipe ended: ``values`` of the objectives, less is better, and the constraints' violations; None: it failed."""

    number: int
    key: Key
    values: tuple[float, ...] | None
    violations: tuple[float, ...] = ()

    @property
    def feasible(self) -> bool:
        """It gave values, and no constraint is violated."""
        return self.values is not None and all(v <= 0 for v in self.violations)


@dataclass(frozen=True)
class Prediction:
    """What is expected of m recipes.

    Attributes:
        means, deviations: of the objectives on their models' scales: (m, objectives) each.
        scales: one an objective; see :data:`orchestrator.sampling.targets.SCALES`.
        feasible: (m,) probabilities that a recipe gives values and violates no constraint.
    """

    means: Array
    deviations: Array
    scales: tuple[str, ...]
    feasible: Array

    def part(self, which: slice | Array) -> Prediction:
        """Returns what is expected of some of them."""
        return Prediction(self.means[which], self.deviations[which], self.scales, self.feasible[which])

    def values(self, z: float | Array) -> Array:
        """Returns the objectives at ``z`` standard deviations from the mean, less is better: (..., m, objectives)."""
        found: Array = self.means + self.deviations * z
        for k, scale in enumerate(self.scales):
            found[..., k] = backward(scale, found[..., k])
        return found


class _Points:
    """Some outcomes, and the quantities learnt from them."""

    def __init__(
        self, features: Features, outcomes: Sequence[Outcome], fitted: Mapping[str, Fitted], scale: float | None = None
    ) -> None:
        self._features = features
        self.rows = features([o.key for o in outcomes])
        self.names: list[object] = [o.number for o in outcomes]
        self.scale = scale_of(self.rows) if scale is None else scale
        products = Products.of(self.rows, self.rows, self.scale)
        self.targets = {name: Target(one, products) for name, one in fitted.items()}
        self.first = len(outcomes)

    def follow(self, names: Sequence[object], keys: Sequence[Key]) -> None:
        """Makes the points after the first ones those with these names."""
        old = self.names[self.first :]
        same = next((i for i, (a, b) in enumerate(zip(old, names, strict=False)) if a != b), min(len(old), len(names)))
        kept = self.first + same
        self.names = [*self.names[:kept], *names[same:]]
        self.rows = np.concatenate([self.rows[:kept], self._features(keys[same:])])
        products = Products.of(self.rows[kept:], self.rows, self.scale)
        for target in self.targets.values():
            target.process.truncate(kept)
            target.process.add(products)

    def predict(self, rows: Array, values: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
        products = Products.of(self.rows, rows, self.scale)
        return {
            name: target.predict(products, variances(rows, self.scale, target.process.theta), values[name])
            for name, target in self.targets.items()
        }


class RecipeModel:
    """Processes of all objectives and constraints, and of failing.

    Args:
        features: of the recipes.
        objectives: how many.
        constraints: their names, in the order of :attr:`Outcome.violations`.

    Attributes:
        since: number of the trial for which it was fitted; -1 before that.
        due_at: ended trials at which it is to be fitted again.
    """

    def __init__(self, features: Features, objectives: int, constraints: Sequence[str]) -> None:
        self.features, self.constraints = features, tuple(constraints)
        self.objectives = objectives
        self.names = [*(f"objective {k}" for k in range(objectives)), *(f"constraint {c}" for c in constraints)]
        self._fitted: dict[str, Fitted] = {}
        self._valued: _Points | None = None
        self._ended: _Points | None = None
        self.since = -1
        self._open: frozenset[int] = frozenset()
        self.due_at = 0

    # --- fit ----------------------------------------------------------------------------------------------------------

    def fit(
        self,
        number: int,
        outcomes: Mapping[int, Outcome],
        front: Sequence[int],
        pending: Sequence[int],
        generator: np.random.Generator,
    ) -> dict[str, Any]:
        """Fits to what is known when trial ``number`` is asked for; returns plain values for :meth:`restore`.

        Args:
            outcomes: by number; some with values.
            front: numbers of the frontier's.
            pending: numbers of trials whose outcome is open.
        """
        valued = [n for n, o in outcomes.items() if o.values is not None]
        failed = [n for n, o in outcomes.items() if o.values is None]
        active = _select(valued, outcomes, front, generator)
        points = [outcomes[n] for n in active]
        some = sorted(generator.choice(len(active), min(MOST_LEARNT, len(active)), replace=False).tolist())
        columns = self._columns(points)
        rows = self.features([points[i].key for i in some])
        products = Products.of(rows, rows, scale_of(self.features([p.key for p in points])))
        scales = [SCALES] * self.objectives + [SIGNED] * len(self.constraints)
        fitted = {
            name: learn(columns[name][some], products, self._fitted.get(name), allowed)
            for name, allowed in zip(self.names, scales, strict=True)
        }
        ended: list[int] = []
        if failed:
            ended = sorted([*failed[-MOST // 2 :], *valued[-MOST // 2 :]])
            rows = self.features([outcomes[n].key for n in ended])
            labels = np.array([float(outcomes[n].values is None) for n in ended])
            fitted[FAILED] = learn(labels, Products.of(rows, rows, scale_of(rows)), self._fitted.get(FAILED), SIGNED)
        state = {
            "number": number,
            "active": active,
            "ended": ended,
            "pending": sorted(pending),
            "seen": len(outcomes),
            "fits": {name: one.to_list() for name, one in fitted.items()},
        }
        self.restore(state, outcomes)
        return state

    def restore(self, state: Mapping[str, Any], outcomes: Mapping[int, Outcome]) -> None:
        """Takes a fit from what :meth:`fit` returned."""
        self._fitted = {name: Fitted.from_list(values) for name, values in state["fits"].items()}
        learnt = {n: f for n, f in self._fitted.items() if n != FAILED}
        self._valued = _Points(self.features, [outcomes[n] for n in state["active"]], learnt)
        self._ended = None
        if FAILED in self._fitted:
            points = [outcomes[n] for n in state["ended"]]
            self._ended = _Points(self.features, points, {FAILED: self._fitted[FAILED]})
        self.since, self._open = int(state["number"]), frozenset(state["pending"])
        self.due_at = min(math.ceil(state["seen"] * GROWTH), state["seen"] + MOST // 2)

    def _columns(self, points: Sequence[Outcome]) -> dict[str, Array]:
        table = np.array([[*(p.values or ()), *p.violations] for p in points])
        return {name: table[:, k] for k, name in enumerate(self.names)}

    # --- predict ------------------------------------------------------------------------------------------------------

    def follow(self, outcomes: Mapping[int, Outcome], pending: Mapping[int, Key]) -> None:
        """Adds what came after the fit, and the recipes whose outcome is open: near them less is to be learnt."""
        assert self._valued is not None
        later = sorted(n for n in outcomes if n >= self.since or n in self._open)
        valued = [n for n in later if outcomes[n].values is not None]
        self._known = len(self._valued.names[: self._valued.first]) + len(valued)
        names: list[object] = [*valued, *(("open", n) for n in sorted(pending))]
        keys = [*(outcomes[n].key for n in valued), *(pending[n] for n in sorted(pending))]
        self._valued.follow(names, keys)
        known = [outcomes[int(str(n))] for n in self._valued.names[: self._known]]
        self._values = self._columns(known)
        if self._ended is not None:
            self._ended.follow(later, [outcomes[n].key for n in later])
            ended = [outcomes[int(str(n))] for n in self._ended.names]
            self._labels = {FAILED: np.array([float(o.values is None) for o in ended])}

    def predict(self, keys: Sequence[Key]) -> Prediction:
        """Predicts recipes from what :meth:`follow` took."""
        assert self._valued is not None
        rows = self.features(keys)
        found = self._valued.predict(rows, self._values)
        objectives = self.names[: self.objectives]
        feasible = np.ones(len(keys))
        for name in self.names[self.objectives :]:
            mean, deviation = found[name]
            feasible *= ndtr(-mean / deviation)
        if self._ended is not None:
            mean, _ = self._ended.predict(rows, self._labels)[FAILED]
            feasible *= np.clip(1 - mean, 0.0, 1.0)
        return Prediction(
            np.stack([found[name][0] for name in objectives], -1),
            np.stack([found[name][1] for name in objectives], -1),
            tuple(self._valued.targets[name].fitted.scale for name in objectives),
            feasible,
        )


def _select(
    valued: Sequence[int], outcomes: Mapping[int, Outcome], front: Sequence[int], generator: np.random.Generator
) -> list[int]:
    """Returns the numbers of at most :data:`MOST` points: the frontier's, the newest, half of the rest near the frontier."""
    if len(valued) <= MOST:
        return sorted(valued)
    kept = {*list(front)[-MOST // 3 :], *sorted(valued)[-MOST // 4 :]}
    rest = np.array(sorted(set(valued) - kept))
    table = np.array([outcomes[int(n)].values for n in rest])
    ranks = sum(rankdata(column) for column in table.T)
    near = rest[np.argsort(ranks, kind="stable")[: (MOST - len(kept)) // 2]]
    kept |= set(near.tolist())
    others = np.array(sorted(set(rest.tolist()) - kept))
    kept |= set(generator.choice(others, MOST - len(kept), replace=False).tolist())
    return sorted(int(n) for n in kept)
