"""What is learnt of a study's recipes: every objective, every constraint, and what fails.

What was fitted, to which points, is plain data (:meth:`RecipeModel.fitted`), so that a study that is resumed has the very model that
it was stopped with; points that came later are added in the order of their numbers, whenever they came.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
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
    """How a recipe ended, or what is thought of one that stands at a rung of its training.

    Attributes:
        values: of the objectives, less is better; None: it failed. NaN is what is not known at a rung.
        violations: of the constraints, positive where violated.
        whole: it has been trained to its end.
    """

    number: int
    key: Key
    values: tuple[float, ...] | None
    violations: tuple[float, ...] = ()
    whole: bool = True

    @property
    def feasible(self) -> bool:
        """It gave values at its end, and no constraint is violated."""
        return self.whole and self.values is not None and all(v <= 0 for v in self.violations)


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

    def part(self, which: slice | NDArray[np.int64]) -> Prediction:
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
        objectives: their names.
        constraints: their names, in the order of :attr:`Outcome.violations`.
        late: those of both that are known of recipes trained to their end only.

    Attributes:
        since: number of the trial for which it was fitted; -1 before that.
        due_at: known outcomes at which it is to be fitted again.
    """

    def __init__(
        self, features: Features, objectives: Sequence[str], constraints: Sequence[str], late: Collection[str] = ()
    ) -> None:
        self.features, self.objectives = features, tuple(objectives)
        self.names = [*(f"objective {k}" for k in objectives), *(f"constraint {c}" for c in constraints)]
        plain = [*objectives, *constraints]
        self._groups = {
            "early": [i for i, name in enumerate(plain) if name not in late],
            "late": [i for i, name in enumerate(plain) if name in late],
        }
        self._fitted: dict[str, Fitted] = {}
        self._points: dict[str, _Points] = {}
        self._values: dict[str, dict[str, Array]] = {}
        self.since = -1
        self._open: frozenset[int] = frozenset()
        self.due_at = 0

    # --- fit ----------------------------------------------------------------------------------------------------------

    def fit(
        self,
        number: int,
        outcomes: Mapping[int, Outcome],
        front: Sequence[int],
        unsettled: Collection[int],
        generator: np.random.Generator,
    ) -> dict[str, Any]:
        """Fits to what is known when trial ``number`` is asked for; returns plain values for :meth:`restore`.

        Args:
            outcomes: by number; at least two whole ones with values.
            front: numbers of the frontier's.
            unsettled: numbers of trials of which more will be known.
        """
        active: dict[str, list[int]] = {}
        fitted: dict[str, Fitted] = {}
        for group, columns in self._groups.items():
            usable = [n for n, o in outcomes.items() if _usable(group, o)]
            if columns:
                active[group] = _select(usable, outcomes, front, columns, generator)
                fitted |= self._learn(active[group], outcomes, columns, generator)
        failed = [n for n, o in outcomes.items() if o.values is None]
        if failed:
            valued = [n for n, o in outcomes.items() if o.values is not None]
            active[FAILED] = sorted([*failed[-MOST // 2 :], *valued[-MOST // 2 :]])
            rows = self.features([outcomes[n].key for n in active[FAILED]])
            labels = np.array([float(outcomes[n].values is None) for n in active[FAILED]])
            products = Products.of(rows, rows, scale_of(rows))
            fitted[FAILED] = learn(labels, products, self._fitted.get(FAILED), SIGNED)
        state = {
            "number": number,
            "active": active,
            "unsettled": sorted(unsettled),
            "seen": len(outcomes),
            "fits": {name: one.to_list() for name, one in fitted.items()},
        }
        self.restore(state, outcomes)
        return state

    def _learn(
        self,
        active: Sequence[int],
        outcomes: Mapping[int, Outcome],
        columns: Sequence[int],
        generator: np.random.Generator,
    ) -> dict[str, Fitted]:
        some = sorted(generator.choice(len(active), min(MOST_LEARNT, len(active)), replace=False).tolist())
        all_rows = self.features([outcomes[n].key for n in active])
        rows = all_rows[some]
        products = Products.of(rows, rows, scale_of(all_rows))
        table = _table([outcomes[active[i]] for i in some])
        return {
            self.names[i]: learn(
                table[:, i],
                products,
                self._fitted.get(self.names[i]),
                SCALES if i < len(self.objectives) else SIGNED,
            )
            for i in columns
        }

    def restore(self, state: Mapping[str, Any], outcomes: Mapping[int, Outcome]) -> None:
        """Takes a fit from what :meth:`fit` returned."""
        self._fitted = {name: Fitted.from_list(values) for name, values in state["fits"].items()}
        groups = {**{g: [self.names[i] for i in columns] for g, columns in self._groups.items()}, FAILED: [FAILED]}
        self._points = {
            group: _Points(
                self.features, [outcomes[n] for n in numbers], {name: self._fitted[name] for name in groups[group]}
            )
            for group, numbers in state["active"].items()
        }
        self.since, self._open = int(state["number"]), frozenset(state["unsettled"])
        self.due_at = min(math.ceil(state["seen"] * GROWTH), state["seen"] + MOST // 2)

    # --- predict ------------------------------------------------------------------------------------------------------

    def follow(self, outcomes: Mapping[int, Outcome], pending: Mapping[int, Key]) -> None:
        """Adds what came after the fit, and the recipes of which nothing is known yet: near them less is to be learnt."""
        later = sorted(n for n in outcomes if n >= self.since or n in self._open)
        for group, points in self._points.items():
            first = frozenset(points.names[: points.first])
            new = [n for n in later if n not in first and _usable(group, outcomes[n])]
            names: list[object] = list(new)
            keys = [outcomes[n].key for n in new]
            if group != FAILED:
                names += [("open", n) for n in sorted(pending)]
                keys += [pending[n] for n in sorted(pending)]
            points.follow(names, keys)
            known = [outcomes[n] for n in [*points.names[: points.first], *new] if isinstance(n, int)]
            if group == FAILED:
                self._values[group] = {FAILED: np.array([float(o.values is None) for o in known])}
            else:
                table = _table(known)
                self._values[group] = {self.names[i]: table[:, i] for i in self._groups[group]}

    def predict(self, keys: Sequence[Key]) -> Prediction:
        """Predicts recipes from what :meth:`follow` took."""
        rows = self.features(keys)
        found: dict[str, tuple[Array, Array]] = {}
        for group, points in self._points.items():
            found |= points.predict(rows, self._values[group])
        objectives = self.names[: len(self.objectives)]
        feasible = np.ones(len(keys))
        for name in self.names[len(self.objectives) :]:
            mean, deviation = found[name]
            feasible *= ndtr(-mean / deviation)
        if FAILED in found:
            feasible *= np.clip(1 - found[FAILED][0], 0.0, 1.0)
        return Prediction(
            np.stack([found[name][0] for name in objectives], -1),
            np.stack([found[name][1] for name in objectives], -1),
            tuple(self._fitted[name].scale for name in objectives),
            feasible,
        )


def _usable(group: str, outcome: Outcome) -> bool:
    return group == FAILED or (outcome.values is not None and (outcome.whole or group == "early"))


def _table(outcomes: Sequence[Outcome]) -> Array:
    """Returns objectives and violations, a row an outcome."""
    return np.array([[*(o.values or ()), *o.violations] for o in outcomes])


def _select(
    valued: Sequence[int],
    outcomes: Mapping[int, Outcome],
    front: Sequence[int],
    columns: Sequence[int],
    generator: np.random.Generator,
) -> list[int]:
    """Returns the numbers of at most :data:`MOST` points: the frontier's, the newest, half of the rest near the frontier."""
    if len(valued) <= MOST:
        return sorted(valued)
    kept = {*list(front)[-MOST // 3 :], *sorted(valued)[-MOST // 4 :]}
    rest = np.array(sorted(set(valued) - kept))
    table = _table([outcomes[int(n)] for n in rest])[:, columns]
    ranks = sum(rankdata(column) for column in table.T)
    near = rest[np.argsort(ranks, kind="stable")[: (MOST - len(kept)) // 2]]
    kept |= set(near.tolist())
    others = np.array(sorted(set(rest.tolist()) - kept))
    kept |= set(generator.choice(others, MOST - len(kept), replace=False).tolist())
    return sorted(int(n) for n in kept)
