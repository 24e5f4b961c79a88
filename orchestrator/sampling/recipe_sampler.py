"""``sampler: {name: recipe}``: proposes whole recipes by what models of all objectives expect of them.

An Optuna sampler that asks for a recipe at once, not for one parameter after another: candidates are neighbours and crossovers
of the frontier's recipes, recipes that only convert what is trained already, and random ones, never one that was asked before.
The one with the highest expected gain of hypervolume in a second of expected work is taken.

Source: Gaussian processes with a linear and a decaying part over binary features of combinations: after Baptista and Poloczek,
Bayesian optimization of combinatorial structures, ICML 2018 (arXiv 1806.08838), section 3; expected improvement per second:
Snoek, Larochelle and Adams, NIPS 2012 (arXiv 1206.2944), section 3.2; pending trials believed to give what is predicted:
Ginsbourger, Le Riche and Carraro, 2010, section 4.1 (kriging believer).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from orchestrator.sampling.acquisition import DRAWS, OPTIMISM, TOP, Improvement, assumed_reference, draws, lengths
from orchestrator.sampling.candidates import Candidates
from orchestrator.sampling.costs import Costs
from orchestrator.sampling.model import Prediction, RecipeModel
from orchestrator.sampling.outcomes import Outcomes
from orchestrator.sampling.recipes import Features, Key, RecipeKeys, Space
from orchestrator.sampling.targets import forward
from workers.trial import Recipe

Array = NDArray[np.float64]

FIT = "recipe:fit"
"""Trial attribute with what was fitted when it was asked for."""

PREDICTED = "recipe:predicted"
"""Trial attribute: objective to mean and standard deviation, in its own units, that were expected of the recipe."""


FIRST_DRAWS = 20
"""Random draws among which a recipe without training is looked for, before the models have a say."""


class Facts(Protocol):
    """What is known of recipes before they are trained."""

    names: frozenset[str]

    def of(self, recipe: Recipe) -> Mapping[str, float] | None:
        """Returns metric to exact value; None where it is not calculated yet."""

    def ask_for(self, recipes: Sequence[Recipe]) -> None:
        """Has these calculated soon."""


@dataclass(frozen=True)
class Scored:
    """Candidates, the most promising first in no order.

    Attributes:
        keys: of the recipes.
        means, deviations: what is expected of the objectives, in their own units and signs: (recipes, objectives).
        gain: expected gain of hypervolume; ``total`` is the frontier's, in the same unit.
        worth: gain in an expected second of work.
        known: (recipes, objectives), whether it is a fact.
    """

    keys: list[Key]
    means: Array
    deviations: Array
    gain: Array
    total: float
    worth: Array
    known: NDArray[np.bool_]


@dataclass(frozen=True)
class Prospect:
    """What is expected of a recipe that was not run.

    Attributes:
        recipe: which.
        expected: objective to mean and standard deviation, in its own units; 0 where it is known beforehand.
        gain: expected gain of hypervolume, as a share of the frontier's.
    """

    recipe: Recipe
    expected: Mapping[str, tuple[float, float]]
    gain: float


class RecipeSampler(BaseSampler):
    """Proposes recipes of a space.

    Args:
        space: of recipes; the Optuna trials' parameters are its answers.
        objectives: names, in the order of the study's directions.
        seed: of everything drawn; what is drawn for a trial depends on it and the trial's number only.
        n_startup_trials: finished trials with values, known-good ones included, before the models have a say.
        constraints: names under which the trials have them.
        late: objectives and constraints that are known of recipes trained to their end only, not at a rung.
        conversions: techniques that need no training; recipes that differ in them alone share what is trained.
        reference: returns the study's reference point, in the objectives' units and order; None while it is not known.
        facts: what is known before training.
        costs: expected seconds; None takes all recipes for equally expensive.
        use_facts, use_costs: False leaves facts or costs out of account, to see what they are worth.
        possible: says of a recipe whether it can be carried out and meets the constraints on what is known of it.
    """

    def __init__(
        self,
        space: Space,
        objectives: Sequence[str],
        *,
        seed: int = 0,
        n_startup_trials: int = 10,
        constraints: Sequence[str] = (),
        late: Collection[str] = (),
        conversions: Collection[str] = (),
        reference: Callable[[], Sequence[float] | None] = lambda: None,
        facts: Facts | None = None,
        costs: Costs | None = None,
        possible: Callable[[Recipe], bool] = lambda recipe: True,
        use_facts: bool = True,
        use_costs: bool = True,
    ) -> None:
        self.space, self.objectives, self.seed = space, tuple(objectives), seed
        self.n_startup_trials, self.reference = n_startup_trials, reference
        self.facts, self.costs = facts if use_facts else None, costs if use_costs else None
        self.possible = possible
        self.keys = RecipeKeys(space, conversions)
        self.outcomes = Outcomes(space, self.keys, self.objectives, constraints)
        self._late = frozenset(late)
        self.candidates = Candidates(self.keys)
        self._features = Features(space)
        self._model: RecipeModel | None = None
        self._answers: tuple[int, dict[str, Any]] = (-1, {})

    # --- what Optuna asks ---------------------------------------------------------------------------------------------

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Nothing: which parameters there are depends on the recipe."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing; see :meth:`sample_independent`."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Returns the recipe's answer; the first question of a trial chooses the recipe.

        Raises:
            KeyError: the parameter is none of the space's.
        """
        if self._answers[0] != trial.number:
            self._answers = trial.number, self.space.params_of(self.keys.recipe(self._choose(study, trial)))
        return self._answers[1][param_name]

    # --- choosing -----------------------------------------------------------------------------------------------------

    def _choose(self, study: Study, trial: FrozenTrial) -> Key:
        rng, generator = random.Random(f"{self.seed}:{trial.number}"), np.random.default_rng([self.seed, trial.number])
        self._read(study, trial.number)
        if self.outcomes.valued + len(self.outcomes.paused) < self.n_startup_trials or self.outcomes.valued < 2:
            return self._first(rng)
        self._refit(study, trial, generator)
        scored = self._scored(rng, generator, self.outcomes.open)
        if scored is None:
            return self.candidates.unseen(rng, self.outcomes)
        order = np.argsort(-scored.worth, kind="stable").tolist()
        best = next((i for i in order if self.possible(self.keys.recipe(scored.keys[i]))), None)
        if best is None:
            return self.candidates.unseen(rng, self.outcomes)
        expected = {
            name: [float(scored.means[best, k]), float(scored.deviations[best, k])]
            for k, name in enumerate(self.objectives)
            if not scored.known[best, k]
        }
        _note(study, trial, PREDICTED, expected)
        chosen: Key = scored.keys[best]
        return chosen

    def outlook(self, study: Study, count: int) -> list[Prospect]:
        """Returns what is expected of the recipes that would be asked for next, each in the light of those before it.

        Recipes are chosen by their gain, whatever they cost. None before the models have had a say.
        """
        number = len(study.get_trials(deepcopy=False))
        self._read(study, number)
        found: list[Prospect] = []
        pending = dict(self.outcomes.open)
        while self._model is not None and len(found) < count:
            rng, generator = random.Random(f"{self.seed}:{number}"), np.random.default_rng([self.seed, number])
            self._model.follow(self.outcomes.known, pending)
            scored = self._scored(rng, generator, pending)
            order = np.argsort(-scored.gain, kind="stable").tolist() if scored else []
            best = next((i for i in order if scored and self.possible(self.keys.recipe(scored.keys[i]))), None)
            if scored is None or best is None or not scored.gain[best]:
                break
            values = zip(self.objectives, scored.means[best], scored.deviations[best], strict=True)
            expected = {name: (float(mean), float(spread)) for name, mean, spread in values}
            gain = float(scored.gain[best]) / scored.total if scored.total else 0.0
            found.append(Prospect(self.keys.recipe(scored.keys[best]), expected, gain))
            pending[number] = scored.keys[best]
            number += 1
        return found

    def _first(self, rng: random.Random) -> Key:
        """Returns a random recipe, one without training where there is: what cuts and conversions do is learnt from these for nothing."""
        draws = [self.candidates.unseen(rng, self.outcomes)]
        while self.costs and self.costs.trains(self.keys.surgery(draws[-1])) and len(draws) < FIRST_DRAWS:
            draws.append(self.candidates.unseen(rng, self.outcomes))
        return draws[-1] if len(draws) < FIRST_DRAWS else draws[0]

    def _read(self, study: Study, number: int) -> None:
        """Takes what is new in the study, and of a restored one the last fit."""
        fits = [trial.system_attrs[FIT] for trial in self.outcomes.read(study, number) if FIT in trial.system_attrs]
        if fits and (self._model is None or int(fits[-1]["number"]) > self._model.since):
            self._model = self._new_model()
            self._model.restore(fits[-1], self.outcomes.known)

    def _new_model(self) -> RecipeModel:
        return RecipeModel(self._features, self.objectives, self.outcomes.constraints, self._late)

    def _refit(self, study: Study, trial: FrozenTrial, generator: np.random.Generator) -> None:
        outcomes, known = self.outcomes, self.outcomes.known
        if self._model is None:
            self._model = self._new_model()
        if len(known) >= self._model.due_at:
            unsettled = [*outcomes.open, *outcomes.paused]
            _note(study, trial, FIT, self._model.fit(trial.number, known, outcomes.front, unsettled, generator))
        self._model.follow(known, outcomes.open)

    def _scored(self, rng: random.Random, generator: np.random.Generator, pending: Mapping[int, Key]) -> Scored | None:
        """Returns the most promising candidates; None where every one was asked for."""
        assert self._model is not None
        outcomes, taken = self.outcomes, set(pending.values())
        keys = [key for key in self.candidates.make(rng, outcomes) if key not in taken]
        if not keys:
            return None
        found, known = self._with_facts(keys, self._model.predict([*keys, *pending.values()]))
        here, believed = found.part(slice(len(keys))), found.part(slice(len(keys), None))
        front = np.concatenate([outcomes.values(outcomes.front), believed.values(0.0)[believed.feasible > 0.5]])
        improvement = self._improvement(front, generator)
        costs = self.costs.of(keys, outcomes) if self.costs else np.ones(len(keys))
        hoped = improvement.of(here.values(-OPTIMISM)) * here.feasible / costs
        top = np.argsort(-hoped, kind="stable")[:TOP]
        best = here.part(top)
        shocks = draws(DRAWS, len(self.objectives), generator)
        gain = improvement.of(best.values(shocks[:, None, :])).mean(0) * best.feasible
        low, high = outcomes.minimised(best.values(-1.0)), outcomes.minimised(best.values(1.0))
        worth = gain / costs[top] if gain.any() else hoped[top]
        means = outcomes.minimised(best.values(0.0))
        return Scored([keys[i] for i in top], means, np.abs(high - low) / 2, gain, improvement.total, worth, known[top])

    def _improvement(self, front: Array, generator: np.random.Generator) -> Improvement:
        outcomes = self.outcomes
        points = (
            front if len(front) else outcomes.values([n for n, o in outcomes.ended.items() if o.values is not None])
        )
        stated = self.reference()
        if stated is None:
            first = [n for n, outcome in sorted(outcomes.ended.items()) if outcome.values is not None][
                : self.n_startup_trials
            ]
            reference = assumed_reference(points, outcomes.values(first), far=bool(generator.random() < 0.5))
        else:
            reference = outcomes.minimised(np.array(stated, dtype=float))
        return Improvement(front, reference, lengths(points, reference), generator)

    def _with_facts(self, keys: Sequence[Key], found: Prediction) -> tuple[Prediction, NDArray[np.bool_]]:
        """Puts what is known in the place of what is predicted; returns where: (keys, objectives)."""
        known = np.zeros((len(keys), len(self.objectives)), dtype=bool)
        names = [k for k, name in enumerate(self.objectives) if self.facts and name in self.facts.names]
        if not self.facts or not names:
            return found, known
        recipes = [self.keys.recipe(key) for key in keys]
        told = [self.facts.of(recipe) for recipe in recipes]
        self.facts.ask_for([recipe for recipe, facts in zip(recipes, told, strict=True) if facts is None])
        for k in names:
            values = np.array([np.nan if f is None else f.get(self.objectives[k], np.nan) for f in told])
            here = np.flatnonzero(~np.isnan(values))
            signed = np.zeros((len(here), len(self.objectives)))
            signed[:, k] = values[here]
            exact = self.outcomes.minimised(signed)[:, k]
            scale = found.scales[k]
            found.means[here, k] = exact if scale == "ranked" else forward(scale, exact)
            found.deviations[here, k] = 0.0
            known[here, k] = True
        return found, known


def _note(study: Study, trial: FrozenTrial, name: str, value: Any) -> None:
    study._storage.set_trial_system_attr(trial._trial_id, name, value)  # as Optuna's own samplers do
