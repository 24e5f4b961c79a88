"""What an Optuna study says of the recipes of a space: how they ended, which are on the frontier, which are open.

Each trial is read once when it appears and once when it has ended: an ask costs as much after ten thousand trials as after ten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from orchestrator.sampling.model import Outcome
from orchestrator.sampling.recipes import Key, RecipeKeys, Space
from orchestrator.sampling.suggestions import GivenSuggest

SECONDS = "seconds"
"""Trial attribute of a user: the seconds of work that went into its recipe, ``train`` and ``all``."""


RUNG = "vitpareto:rung"
"""Trial attribute of a recipe that stands, or stood last, at a rung: ``fraction`` of its training, ``metrics`` and ``violations`` there."""


@dataclass(frozen=True)
class _Rung:
    """What was seen at a rung: objectives in their own units, then violations; NaN where it is not known."""

    fraction: float
    values: NDArray[np.float64]

    @classmethod
    def read(cls, rung: Mapping[str, Any], objectives: Sequence[str], constraints: Sequence[str]) -> Self:
        found = [rung["metrics"].get(name) for name in objectives]
        found += [rung.get("violations", {}).get(name) for name in constraints]
        return cls(float(rung["fraction"]), np.array([np.nan if v is None else v for v in found], dtype=float))


@dataclass
class Spent:
    """Seconds of work that went into recipes: trainings, and all else."""

    recipes: int = 0
    trainings: int = 0
    training_s: float = 0.0
    others_s: float = 0.0

    def add(self, training_s: float, all_s: float) -> None:
        """Adds a recipe; no training counts where its training was there already."""
        self.recipes += 1
        self.others_s += max(0.0, all_s - training_s)
        if training_s > 0:
            self.trainings += 1
            self.training_s += training_s


class Outcomes:
    """The trials of one study.

    Args:
        space: of the recipes.
        keys: theirs.
        objectives: names, in the order of the study's directions.
        constraints: names under which trials have them.

    Attributes:
        ended: number to outcome, of distinct recipes, in the order of their numbers as far as they were read together.
        paused: the same of those that stand at a rung, with what is thought of their end.
        valued: how many ended with values.
        front: numbers of the feasible ones that none dominates, ascending.
        open: number to recipe of the trials that run and of which nothing is known yet.
        seen: every recipe that was asked for.
        trained: surgeries of recipes that ended with values; what is still being trained would only be waited for.
        spent: what recipes took.
    """

    def __init__(
        self, space: Space, keys: RecipeKeys, objectives: Sequence[str], constraints: Sequence[str] = ()
    ) -> None:
        self._space, self.keys = space, keys
        self.objectives, self.constraints = tuple(objectives), tuple(constraints)
        self.ended: dict[int, Outcome] = {}
        self.paused: dict[int, Outcome] = {}
        self.valued = 0
        self.front: list[int] = []
        self.open: dict[int, Key] = {}
        self._running: dict[int, Key] = {}
        self._rungs: dict[int, tuple[Key, _Rung]] = {}
        self._gains: dict[int, NDArray[np.float64]] = {}
        self.seen: set[Key] = set()
        self.trained: set[Key] = set()
        self.spent = Spent()
        self._answered: set[Key] = set()
        self._read = 0
        self._signs: NDArray[np.float64] = np.zeros(0)

    def read(self, study: Study, current: int) -> list[FrozenTrial]:
        """Takes what is new, but for trial number ``current``, which is being asked for; returns the new trials."""
        trials = study.get_trials(deepcopy=False)
        self._signs = np.array([1.0 if d == StudyDirection.MINIMIZE else -1.0 for d in study.directions])
        new = trials[self._read : current]
        for trial in new:
            key = self._key(trial)
            if key is not None:
                self.seen.add(key)
                self._running[trial.number] = key
        self._read = max(self._read, current)
        for number in [n for n in self._running if trials[n].state.is_finished()]:
            self._end(trials[number], self._running.pop(number))
        self._at_rungs(trials)
        self.open = {n: key for n, key in self._running.items() if n not in self.paused}
        return new

    @property
    def known(self) -> dict[int, Outcome]:
        """All that something is known of, by number."""
        return {**self.ended, **self.paused}

    def _at_rungs(self, trials: list[FrozenTrial]) -> None:
        """Takes for the end of a paused training what it gave at its rung, and the median of what others gained from there."""
        for number, key in self._running.items():
            if (rung := trials[number].system_attrs.get(RUNG)) is not None:
                self._rungs[number] = key, _Rung.read(rung, self.objectives, self.constraints)
        gains: dict[float, list[NDArray[np.float64]]] = {}
        for number, seen in self._gains.items():
            gains.setdefault(self._rungs[number][1].fraction, []).append(seen)
        for number, (key, rung) in self._rungs.items():
            if number in self.ended:
                self.paused.pop(number, None)
                continue
            some = gains.get(rung.fraction)
            with_gain = rung.values + np.median(some, axis=0) if some else rung.values
            count = len(self._signs)
            values = self.minimised(with_gain[:count])
            self.paused[number] = Outcome(number, key, tuple(values), tuple(with_gain[count:]), whole=False)

    def minimised(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Turns the signs of objectives that are maximised: (..., objectives); the same brings them back."""
        return values * self._signs

    def values(self, numbers: list[int]) -> NDArray[np.float64]:
        """Returns the values of some, less is better: (len(numbers), objectives)."""
        return np.array([self.ended[n].values for n in numbers]).reshape(len(numbers), len(self._signs))

    def _key(self, trial: FrozenTrial) -> Key | None:
        try:
            return self.keys.key(self._space.sample(GivenSuggest(trial.params)))
        except (KeyError, ValueError):  # another space's, or one whose record is lost
            return None

    def _end(self, trial: FrozenTrial, key: Key) -> None:
        if trial.state == TrialState.FAIL or key in self._answered:  # says nothing of the recipe, or nothing new
            return
        self._answered.add(key)
        if trial.state == TrialState.PRUNED:
            if RUNG not in trial.system_attrs:  # else it stays where it stood
                self.ended[trial.number] = Outcome(trial.number, key, None)
            return
        values = tuple(float(v) for v in self.minimised(np.array(trial.values)))
        violations = tuple(float(trial.constraints.get(name, 0.0)) for name in self.constraints)
        if not np.isfinite([*values, *violations]).all():  # of such a row nothing can be learnt but that
            self.ended[trial.number] = Outcome(trial.number, key, None)
            return
        found = Outcome(trial.number, key, values, violations)
        self.ended[trial.number] = found
        self.valued += 1
        self.trained.add(self.keys.surgery(key))
        if (rung := trial.system_attrs.get(RUNG)) is not None:
            seen = _Rung.read(rung, self.objectives, self.constraints)
            self._rungs[trial.number] = key, seen
            self._gains[trial.number] = np.array([*trial.values, *violations]) - seen.values
        if isinstance(spent := trial.user_attrs.get(SECONDS), dict):
            self.spent.add(float(spent.get("train", 0.0)), float(spent["all"]))
        if found.feasible:
            self._to_front(found)

    def _to_front(self, new: Outcome) -> None:
        front, point = self.values(self.front), np.array(new.values)
        if len(front) and (front <= point).all(1).any():
            return  # dominated, or as good as one that is there
        worse = np.all(point <= front, axis=1).tolist()
        kept = [n for n, dominated in zip(self.front, worse, strict=True) if not dominated]
        self.front = sorted([*kept, new.number])
