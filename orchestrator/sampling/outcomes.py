"""What an Optuna study says of the recipes of a space: how they ended, which are on the frontier, which are open.

Each trial is read once when it appears and once when it has ended: an ask costs as much after ten thousand trials as after ten.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from orchestrator.sampling.model import Outcome
from orchestrator.sampling.recipes import Key, RecipeKeys, Space
from orchestrator.sampling.suggestions import GivenSuggest

SECONDS = "seconds"
"""Trial attribute of a user: the seconds of work that went into its recipe, ``train`` and ``all``."""


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

    Attributes:
        ended: number to outcome, of distinct recipes, in the order of their numbers as far as they were read together.
        valued: how many of them have values.
        front: numbers of the feasible ones that none dominates, ascending.
        open: number to recipe of the trials that run.
        seen: every recipe that was asked for.
        trained: surgeries of recipes that were asked for.
        spent: what recipes took.
    """

    def __init__(self, space: Space, keys: RecipeKeys) -> None:
        self._space, self.keys = space, keys
        self.ended: dict[int, Outcome] = {}
        self.valued = 0
        self.front: list[int] = []
        self.open: dict[int, Key] = {}
        self.seen: set[Key] = set()
        self.trained: set[Key] = set()
        self.spent = Spent()
        self.constraints: tuple[str, ...] = ()
        self._answered: set[Key] = set()
        self._read = 0
        self._signs: NDArray[np.float64] = np.zeros(0)

    def read(self, study: Study, current: int) -> list[FrozenTrial]:
        """Takes what is new, but for trial number ``current``, which is being asked for; returns the new trials."""
        trials = study.get_trials(deepcopy=False)
        self._signs = np.array([1.0 if d == StudyDirection.MINIMIZE else -1.0 for d in study.directions])
        new = [t for t in trials[self._read : current]]
        for trial in new:
            key = self._key(trial)
            if key is not None:
                self.seen.add(key)
                self.trained.add(self.keys.surgery(key))
                self.open[trial.number] = key
        self._read = max(self._read, current)
        for number in [n for n in self.open if trials[n].state.is_finished()]:
            self._end(trials[number], self.open.pop(number))
        return new

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
            self.ended[trial.number] = Outcome(trial.number, key, None)
            return
        self.constraints = self.constraints or tuple(trial.constraints)
        values = tuple(float(v) for v in self.minimised(np.array(trial.values)))
        violations = tuple(float(trial.constraints.get(name, 0.0)) for name in self.constraints)
        found = Outcome(trial.number, key, values, violations)
        self.ended[trial.number] = found
        self.valued += 1
        if isinstance(spent := trial.user_attrs.get(SECONDS), dict):
            self.spent.add(float(spent.get("train", 0.0)), float(spent["all"]))
        if found.feasible:
            self._to_front(found)

    def _to_front(self, new: Outcome) -> None:
        front, point = self.values(self.front), np.array(new.values)
        if len(front) and (front <= point).all(1).any():
            return  # dominated, or as good as one that is there
        kept = [n for n, worse in zip(self.front, (point <= front).all(1), strict=True) if not worse]
        self.front = sorted([*kept, new.number])
