"""What a recipe may still become whose recovery training is paused, told from those that were trained to their end.

An accuracy at a rung is known with its interval, and gains by the end a share of what is missing to 100 %: of digits' recipes at an
eighth of their recovery .27 to .62 of it at accuracies of 80 to 90 %, .30 to .58 at 90 to 95 % (decision 0032). So the shares that finished
recipes gained from the same rung on are the distribution of what this one will. What its structure tells (bytes, MACs,
parameters) is known; what is measured at the end only (speeds) is what the recipes have that are nearest to it in MACs, in proportion to these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.frontier import dominance
from orchestrator.ledger.trials import feasible
from orchestrator.study.constraints import DROPS, Constraint, derived
from workers.metrics import ACCURACIES, METRICS, OBJECTIVES

Floats = npt.NDArray[np.float64]

DRAWS = 200
"""Possible ends of the study that a probability is counted over: its standard error is .02 at a probability of .1."""

ENOUGH = 3
"""Finished recipes that must be known from a rung on before anything is said of what others gain from there."""

_WIDTH = 2 * 1.959963984540054
"""Of a 95 % interval, in standard deviations of the normal distribution."""

NEIGHBOURS = 8
"""Finished recipes, nearest in MACs, whose values stand for one that is measured at the end only."""


@dataclass(frozen=True)
class Paused:
    """A recipe at a rung: ``metrics`` found there, and ``gains``, accuracy to the shares of what was missing that finished recipes
    gained from that rung to their end."""

    metrics: Mapping[str, float]
    gains: Mapping[str, Sequence[float]]

    @property
    def is_judged(self) -> bool:
        """Whether enough is known of what trainings gain from here on."""
        accuracies = [name for name in self.metrics if name in ACCURACIES]
        return all(len(self.gains.get(name, ())) >= ENOUGH for name in accuracies)


def gained(at_rung: float, at_end: float) -> float:
    """Returns the share of the accuracy missing at a rung, in per cent, that was there at the end; negative where some was lost."""
    return (at_end - at_rung) / (100 - at_rung) if at_rung < 100 else 0.0


class Prospects:
    """Judges paused recipes against what is finished.

    Args:
        objectives: name to direction.
        constraints: of the study.
        baseline: metrics of the uncompressed model.
        finished: metrics of the recipes that ran to their end.
    """

    def __init__(
        self,
        objectives: Mapping[str, str],
        constraints: Sequence[Constraint],
        baseline: Mapping[str, float],
        finished: Sequence[Mapping[str, float]],
    ) -> None:
        self.objectives, self.directions = list(objectives), list(objectives.values())
        self.constraints, self.baseline = list(constraints), dict(baseline)
        self.finished = [self.baseline, *finished]
        named = [DROPS.get(c.metric, c.metric.removesuffix("_ratio")) for c in constraints]
        self.names = list(dict.fromkeys([*self.objectives, *named]))

    # --- the expected end ---------------------------------------------------------------------------------------------

    def ranks(self, paused: Sequence[Paused]) -> npt.NDArray[np.int64]:
        """Returns the non-dominated rank of the expected end of each, 0 for the best, (n,); -1 where it would break a constraint."""
        expected = [self._expected(one) for one in paused]
        values = np.array([[end.get(name, math.nan) for name in self.objectives] for end in expected])
        values = values.reshape(len(paused), len(self.objectives))
        values = values[:, ~np.isnan(values).any(axis=0)]
        directions = [
            d for name, d in zip(self.objectives, self.directions, strict=True) if all(name in end for end in expected)
        ]
        fine = np.array(
            [self._keeps_constraints(one, end) for one, end in zip(paused, expected, strict=True)], np.bool_
        )
        found = np.full(len(paused), -1)
        if fine.any():
            found[fine] = dominance.ranks(values[fine], directions) if directions else 0
        return found

    def _expected(self, one: Paused) -> dict[str, float]:
        """Returns the middle of what is possible, as far as something is known."""
        found = {}
        for name in self.names:
            if name in one.metrics:
                value = one.metrics[name]
                shares = one.gains.get(name, ()) if name in ACCURACIES else ()
                found[name] = value + float(np.median(shares)) * (100 - value) if shares else value
            elif len(near := self._near(one, name)):
                found[name] = float(np.median(near))
        return found

    def _keeps_constraints(self, one: Paused, expected: Mapping[str, float]) -> bool:
        """What is not known yet breaks nothing: what is measured at the end, and an accuracy before enough is known of gains."""
        known = {n: v for n, v in expected.items() if n in one.metrics and (one.is_judged or n not in ACCURACIES)}
        values = derived(known, self.baseline)
        return all(c.satisfied(values) for c in self.constraints if c.metric in values)

    # --- the possible ends --------------------------------------------------------------------------------------------

    def probabilities(self, paused: Sequence[Paused]) -> Floats:
        """Returns how probable it is that each is on the frontier in the end, (n,): against what is finished and the others paused.

        1 where too little is known of what trainings gain, and nothing that is known breaks a constraint.
        """
        draws = np.full((len(paused), len(self.objectives), DRAWS), np.nan)
        generator = np.random.default_rng(0)  # the same draws for the same rows: a successor decides alike
        for row, one in enumerate(paused):
            drawn = self._drawn(one, generator)
            draws[row] = [drawn[name] for name in self.objectives]
            draws[row][:, ~self._kept(drawn)] = np.nan
        front = self._front()
        counts = np.zeros(len(paused))
        for world in range(DRAWS):
            points = np.vstack([front, draws[:, :, world]])
            counts += dominance.nondominated(points, self.directions)[len(front) :]
        known = np.array([one.is_judged for one in paused], np.bool_)
        fine = np.array([self._keeps_constraints(one, self._expected(one)) for one in paused], np.bool_)
        return np.where(known, counts / DRAWS, fine)

    def _drawn(self, one: Paused, generator: np.random.Generator) -> dict[str, Floats]:
        """Returns (draws,) possible values at the end of each metric that matters; NaN where nothing is known."""
        found: dict[str, Floats] = {}
        for name in self.names:
            value = one.metrics.get(name)
            if value is None:
                near = self._near(one, name)
                found[name] = generator.choice(near, DRAWS) if len(near) else np.full(DRAWS, np.nan)
            elif name in ACCURACIES:
                spread = (one.metrics.get(f"{name}_high", value) - one.metrics.get(f"{name}_low", value)) / _WIDTH
                now = generator.normal(value, spread, DRAWS)
                share = generator.choice(np.asarray(one.gains.get(name) or [0.0]), DRAWS)
                found[name] = np.clip(now + share * (100 - now), 0, 100)
            else:
                found[name] = np.full(DRAWS, value)
        return found

    def _kept(self, drawn: Mapping[str, Floats]) -> npt.NDArray[np.bool_]:
        """Says in which draws every constraint holds, (draws,)."""

        def metric(name: str) -> Floats:
            if name in DROPS:
                return self.baseline.get(DROPS[name], math.nan) - drawn[DROPS[name]]
            if name in drawn:
                return drawn[name]
            objective = name.removesuffix("_ratio")
            return drawn[objective] / (self.baseline.get(objective) or math.nan)

        return feasible(np.ones(DRAWS, np.bool_), metric, self.constraints)

    def _near(self, one: Paused, name: str) -> Floats:
        """Returns the values of a metric that the finished recipes nearest in MACs have; of a speed, what they would be with the MACs of
        this one, so that a recipe that saves more than any before it is not taken for as slow as those.
        """
        known = [m for m in self.finished if name in m]
        macs = one.metrics.get("macs")
        if not macs:
            return np.array([m[name] for m in known])
        known = [m for m in known if m.get("macs")] or known
        known.sort(key=lambda m: abs(math.log(m.get("macs", macs) / macs)))
        power = 0 if METRICS[name].kind != "speed" else 1 if OBJECTIVES[name] == "maximize" else -1
        return np.array([m[name] * (m.get("macs", macs) / macs) ** power for m in known[:NEIGHBOURS]])

    def _front(self) -> Floats:
        """Returns the frontier of what is finished and keeps the constraints, (k, objectives)."""
        rows = []
        for metrics in self.finished:
            values = derived(metrics, self.baseline)
            if all(name in metrics for name in self.objectives) and all(
                c.metric in values and c.satisfied(values) for c in self.constraints
            ):
                rows.append([metrics[name] for name in self.objectives])
        points = np.array(rows, dtype=np.float64).reshape(len(rows), len(self.objectives))
        return points[dominance.nondominated(points, self.directions)]
