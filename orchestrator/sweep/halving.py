"""Successive halving over several objectives: which paused recovery training goes on, and how far.

Asynchronous: whatever stands at a rung and is among the best 1/eta of all that were there goes on, at any time, and before anything
new is begun, unless it is known to have next to no chance. Best is by non-dominated rank of the expected ends, chance the
probability of being on the final frontier (:mod:`orchestrator.sweep.prospects`). Nothing is stopped for good before the budget of
recipes is used up; then all goes on whose probability is :data:`LIKELY` or more, whatever its rank. Every decision follows
from rows of the ledger, so that a successor decides alike.

Source: Li et al., A System for Massively Parallel Hyperparameter Tuning (ASHA), arXiv 1810.05934, section 3, algorithm 2;
non-dominated rank in place of the loss: Schmucker et al., Multi-objective Asynchronous Successive Halving, arXiv 2106.12639,
section 4.
Differs: known objectives are exact, nothing goes on without a chance nor is stopped with one, and a recipe goes on at once where its
training is that of another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.ledger.stopped import Rungs
from orchestrator.study.constraints import Constraint
from orchestrator.sweep.prospects import Paused, Prospects, gained
from workers.metrics import ACCURACIES

LIKELY = 0.1
"""A recipe that is on the final frontier with this probability or a higher one is not stopped."""

_SLACK = 1e-9
"""Shares of a training are floating-point numbers."""


@dataclass(frozen=True)
class _Known:
    """A proposal that stood at a rung at some time.

    Attributes:
        recipe: its hash; recovery: key of its recovery training, which others may share.
        share: of the training that is done under every seed that stands at a rung; level: how many rungs that is.
        at: what was found at each level, the mean over the trials that were seen there.
    """

    recipe: str
    recovery: str | None
    share: float
    level: int
    at: Mapping[int, Mapping[str, float]]


class Halving:
    """What stands where, and what goes on next. Without rungs nothing ever pauses.

    Args:
        rungs: shares of the recovery training, ascending.
        eta: one in so many goes on.
        objectives, constraints: of the study.
        outcomes: recipe hash to the metrics of its end, or None where it failed; looked at, never changed.

    Attributes:
        waiting: numbers of the proposals that stand at a rung and are not on their way.
        finish: numbers of those that are to be brought to their end whatever is decided.
        baseline: metrics of the uncompressed model.
    """

    def __init__(
        self,
        rungs: Sequence[float],
        eta: float,
        objectives: Mapping[str, str],
        constraints: Sequence[Constraint],
        outcomes: Mapping[str, Mapping[str, float] | None],
    ) -> None:
        self.rungs, self.eta = tuple(rungs), eta
        self.objectives, self.constraints, self.outcomes = objectives, constraints, outcomes
        self.waiting: set[int] = set()
        self.finish: set[int] = set()
        self.baseline: Mapping[str, float] = {}
        self._seen: dict[str, Rungs] = {}
        self._known: dict[int, _Known] = {}
        self._trained: dict[str, int] = {}
        self._events = 0
        self._answer: tuple[tuple[int, int, bool], tuple[int, float | None] | None] | None = None

    # --- what is known ------------------------------------------------------------------------------------------------

    @property
    def first(self) -> float | None:
        """How far a new proposal is trained; None: to its end."""
        return self.rungs[0] if self.rungs else None

    def see(self, trial: str, found: Mapping[float, Mapping[str, float]]) -> None:
        """Takes what was found of a trial at rungs."""
        self._seen.setdefault(trial, {}).update({rung: dict(metrics) for rung, metrics in found.items()})
        self._events += 1

    def reached(self, trial: str) -> float:
        """Returns the share of its recovery training at which a trial was seen last; 0 for never."""
        return max(self._seen.get(trial, {}), default=0.0)

    def rest(
        self, number: int, recipe: str, trials: Sequence[str], recovery: str | None
    ) -> tuple[float, Mapping[str, float]]:
        """Takes that a proposal stands at a rung; returns how far it came and what was found there, the mean over its trials.

        Args:
            recipe: its hash.
            trials: one a seed, of which one or more were seen at a rung.
            recovery: key of its recovery training.
        """
        known = self._known[number] = self._describe(recipe, trials, recovery)
        self.waiting.add(number)
        self._events += 1
        self._train(recovery, known.level)
        return known.share, known.at[known.level]

    def remember(self, number: int, recipe: str, trials: Sequence[str], recovery: str | None) -> None:
        """Takes that a proposal has ended, which may have stood at rungs before."""
        if any(trial in self._seen for trial in trials):
            self._known[number] = self._describe(recipe, trials, recovery)
        if self.outcomes.get(recipe) is not None:
            self._train(recovery, len(self.rungs) + 1)
        self._events += 1

    def take(self, number: int) -> None:
        """Takes that a proposal goes on."""
        self.waiting.discard(number)
        self.finish.discard(number)
        self._events += 1

    def _train(self, recovery: str | None, level: int) -> None:
        if recovery is not None:
            self._trained[recovery] = max(level, self._trained.get(recovery, 0))

    def _level_of(self, share: float) -> int:
        """Returns how many rungs lie at or before a share of the training."""
        return sum(rung <= share + _SLACK for rung in self.rungs)

    def _describe(self, recipe: str, trials: Sequence[str], recovery: str | None) -> _Known:
        seen = [trial for trial in trials if trial in self._seen]
        share = min(map(self.reached, seen))
        found: dict[int, list[Mapping[str, float]]] = {}
        for trial in seen:
            for rung, metrics in self._seen[trial].items():
                found.setdefault(self._level_of(rung), []).append(metrics)
        at = {level: _mean(metrics) for level, metrics in found.items()}
        return _Known(recipe, recovery, share, self._level_of(share), at)

    # --- what goes on -------------------------------------------------------------------------------------------------

    def next(self, *, closing: bool) -> tuple[int, float | None] | None:
        """Returns the proposal that goes on next, and to which share of its training (None: its end); None: none does.

        Args:
            closing: nothing new will be begun, so that what does not go on now is stopped.
        """
        now = (self._events, len(self.outcomes), closing)
        if self._answer is None or self._answer[0] != now:
            self._answer = now, self._next(closing)
        return self._answer[1]

    def _next(self, closing: bool) -> tuple[int, float | None] | None:
        if not self.waiting:
            return None
        if wanted := self.finish & self.waiting:
            return min(wanted), None
        for number in sorted(self.waiting):
            known = self._known[number]
            if known.level == 0:  # it stands where there is no rung any more
                return number, self.first
            trained = self._trained.get(known.recovery or "", 0)
            if trained > known.level:  # by another that shares it: it costs no training
                return number, self._until(trained - 1)
        if closing:
            best = self._likely(sorted(self.waiting))
        else:
            levels = range(len(self.rungs), 0, -1)
            best = next((one for level in levels if (one := self._likely(self._best(level))) is not None), None)
        return None if best is None else (best, self._until(self._known[best].level))

    def _until(self, level: int) -> float | None:
        """Returns the rung after so many of them."""
        return self.rungs[level] if level < len(self.rungs) else None

    def _best(self, level: int) -> list[int]:
        """Returns the proposals that wait at a rung and are among the best 1/eta of all that were seen there."""
        here = {number for number in self.waiting if self._known[number].level == level}
        pool = [number for number in sorted(self._known) if level in self._known[number].at]
        most = math.floor(len(pool) / self.eta + _SLACK)
        if not here or most == 0:
            return []
        ranks = self._ranks(pool, level)
        best = sorted((rank, number) for number, rank in ranks.items() if rank >= 0)
        return [number for _, number in best[:most] if number in here]

    def _likely(self, waiting: Sequence[int]) -> int | None:
        """Returns the one of these that most probably is on the final frontier, if the probability is enough; of equal ones the one
        that is furthest, then the one of the best rank."""
        if not waiting:
            return None
        level = {number: self._known[number].level for number in waiting}
        here = {one: [number for number in waiting if level[number] == one] for one in sorted(set(level.values()))}
        paused = {one: self._paused(numbers, one) for one, numbers in here.items()}
        order = [number for numbers in here.values() for number in numbers]
        found = self._prospects().probabilities([one for of_level in paused.values() for one in of_level])
        rank = {number: r for one, numbers in here.items() for number, r in self._ranks(numbers, one).items()}
        key = {n: (-p, -level[n], rank[n], n) for n, p in zip(order, found.tolist(), strict=True) if p >= LIKELY}
        return min(key, key=key.__getitem__, default=None)

    def _ranks(self, numbers: Sequence[int], level: int) -> dict[int, int]:
        found = self._prospects().ranks(self._paused(numbers, level)).tolist()
        return dict(zip(numbers, found, strict=True))

    def _paused(self, numbers: Sequence[int], level: int) -> list[Paused]:
        gains = self._gains(level)
        return [Paused(self._known[number].at[level], gains) for number in numbers]

    def _prospects(self) -> Prospects:
        finished = [metrics for metrics in self.outcomes.values() if metrics is not None]
        return Prospects(self.objectives, self.constraints, self.baseline, finished)

    def _gains(self, level: int) -> dict[str, list[float]]:
        """Returns accuracy to the shares of what was missing that finished proposals gained from a rung to their end."""
        found: dict[str, list[float]] = {}
        for number in sorted(self._known):
            known = self._known[number]
            end, start = self.outcomes.get(known.recipe), known.at.get(level)
            if end is None or start is None:
                continue
            for name in ACCURACIES:
                if name in end and name in start:
                    found.setdefault(name, []).append(gained(start[name], end[name]))
        return found


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = set.intersection(*(set(metrics) for metrics in found))
    return {name: sum(metrics[name] for metrics in found) / len(found) for name in sorted(names)}
