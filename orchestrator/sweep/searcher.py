"""Optuna ask/tell over a search space of recipes.

Why not Ray Tune's OptunaSearch: several objectives with failures, constraints and duplicates need a say in every tell
(docs/decisions/0002-own-searcher.md). What is asked is written down before it is run, what was told can be rebuilt from the
ledger: :meth:`Proposer.restore` makes the same Optuna study again, trial numbers and sampler state included.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from orchestrator.sampling.foresight import foresight
from orchestrator.sampling.outcomes import RUNG, SECONDS
from orchestrator.sampling.recipe_sampler import RecipeSampler
from orchestrator.sampling.recipes import Space
from orchestrator.sampling.suggestions import NearSuggest, RandomSuggest
from orchestrator.study.constraints import Constraint
from orchestrator.sweep.work import Proposal
from workers.techniques import registry
from workers.trial import INFRASTRUCTURE, Recipe

RANDOM_DRAWS = 300
"""Random tries for an unseen recipe before the space is enumerated."""

MODEL_TRIES = 10
"""Asks of a sampler that does not repeat itself: what it proposed may be known under another recipe, or refused."""


class TrialSuggest:
    """What :meth:`SearchSpace.sample` draws from: an Optuna trial."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.trial.suggest_categorical(name, choices)

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        return self.trial.suggest_int(name, low, high, step=step)

    def floating(self, name: str, low: float, high: float, step: float) -> float:
        return self.trial.suggest_float(name, low, high, step=step)


def _surgery(recipe: Recipe) -> Recipe:
    """Returns the part of a recipe that changes the structure, which stands in front."""
    known = registry()
    return Recipe(tuple(step for step in recipe.steps if known[step.technique].stage == "surgery"))


class Proposer:
    """Asks Optuna for recipes and tells it how they ended.

    Args:
        space: where recipes come from.
        objectives: name to direction, in the order of the Optuna study's values.
        constraints: told with every finished trial; a violated one makes it infeasible, not failed.
        sampler: see :func:`orchestrator.sampling.samplers.make_sampler`.
        first: recipes to ask for before the sampler has its say.
        seed: of the random draws that replace repeated suggestions.
        refusal: says why a recipe is not run, or None; by default whether the space can carry it out.
    """

    def __init__(
        self,
        space: Space,
        objectives: Mapping[str, str],
        constraints: Sequence[Constraint],
        sampler: BaseSampler,
        first: Sequence[Recipe] = (),
        seed: int = 0,
        refusal: Callable[[Recipe], str | None] | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = space
        self.objectives, self.constraints = dict(objectives), tuple(constraints)
        self.study = optuna.create_study(
            directions=[StudyDirection[d.upper()] for d in objectives.values()], sampler=sampler
        )
        self.refusal = refusal or space.fault
        self.first = list(first)
        self.outcomes: dict[str, Mapping[str, float] | None] = {}
        self.open: dict[int, Proposal] = {}
        self.recipes: dict[str, Recipe] = {}
        self.asked: dict[int, Recipe] = {}
        self.rejected: list[tuple[Recipe, str]] = []
        self.lost: set[str] = set()
        self.equals: dict[str, list[Recipe]] = {}
        self._again: list[Proposal] = []
        self._waiting: dict[str, list[int]] = {}
        self._random = random.Random(seed)

    # --- ask ----------------------------------------------------------------------------------------------------------

    def ask(self) -> tuple[Proposal | None, list[dict[str, Any]]]:
        """Returns the next recipe to run (None: the space is exhausted) and the states of answered duplicates.

        A recipe already known is answered at once from its outcome; one that cannot work on this model is told as pruned;
        neither is ever run again.
        """
        if self._again:
            return self._again.pop(0), []
        answered: list[dict[str, Any]] = []
        patience = MODEL_TRIES if isinstance(self.study.sampler, RecipeSampler) else 1
        while patience:
            patience -= not self._enqueue_first()
            proposal = self._ask_once(answered)
            if proposal is not None:
                return proposal, answered
        unseen = self._unseen(answered[-1]["params"])
        if unseen is None:
            return None, answered
        self.study.enqueue_trial(self.space.params_of(unseen))
        return self._ask_once(answered), answered

    def _enqueue_first(self) -> bool:
        while self.first:
            recipe = self.first.pop(0)
            if recipe.hash in self._seen():
                continue
            try:
                self.study.enqueue_trial(self.space.params_of(recipe))
            except ValueError as error:  # one of its techniques is infeasible on this model
                self.rejected.append((recipe, str(error)))
                continue
            return True
        return False

    def _ask_once(self, answered: list[dict[str, Any]]) -> Proposal | None:
        trial = self.study.ask()
        if not isinstance(self.study.sampler, optuna.samplers.TPESampler):
            _ = (
                trial.relative_params
            )  # puts enqueued recipes too into NSGA-II's generations; costs TPE and gives it nothing
        recipe = self.space.sample(TrialSuggest(trial))
        self.recipes[recipe.hash] = self.asked[trial.number] = recipe
        proposal = Proposal(trial.number, recipe, self._state(trial.number, recipe))
        names = self._names(recipe)
        known = next((name for name in names if name in self.outcomes), None)
        if known is not None:
            self._tell(trial.number, self.outcomes[known])
            answered.append({**proposal.state, "duplicate": True})
            return None
        if self._unanswered().intersection(names):
            self.study.tell(trial.number, state=TrialState.FAIL)
            answered.append({**proposal.state, "running": True})
            return None
        reason = self.refusal(recipe)
        if reason:
            self.rejected.append((recipe, reason))
            self.outcomes[recipe.hash] = None
            self._tell(trial.number, None)
            answered.append({**proposal.state, "rejected": reason})
            return None
        self.open[trial.number] = proposal
        return proposal

    def _seen(self) -> set[str]:
        return set(self.outcomes) | self._unanswered()

    def same(self, recipe: Recipe, first: Recipe) -> None:
        """Takes that the surgery of ``recipe`` makes what that of ``first`` made: recipes with one end as those with the other."""
        surgery, known = _surgery(recipe), _surgery(first)
        group = self.equals.setdefault(known.hash, [known])
        if surgery not in group:
            group.append(surgery)
        self.equals[surgery.hash] = group

    def _names(self, recipe: Recipe) -> tuple[str, ...]:
        """Returns the hashes under which the outcome of a recipe may be known: its own, and those of the ones it is equal to."""
        if not self.equals:  # nothing was found equal yet, and a space of something else than techniques has no surgery
            return (recipe.hash,)
        surgery = _surgery(recipe)
        rest = recipe.steps[len(surgery.steps) :]
        return recipe.hash, *(Recipe(equal.steps + rest).hash for equal in self.equals.get(surgery.hash, ()))

    def _unanswered(self) -> set[str]:
        """Recipes that are not run again by this process and whose outcome is not known: in flight, or given up."""
        return self.lost | {p.recipe.hash for p in self.open.values()}

    def _unseen(self, params: Mapping[str, Any]) -> Recipe | None:
        """Returns a recipe not seen yet, near the one that ``params`` stand for; None if the space is exhausted.

        A sampler that repeats itself means that region: a neighbour of it is worth more than a second look.
        """
        seen = self._seen()
        for suggest in (NearSuggest(self._random, params), RandomSuggest(self._random)):
            for _ in range(RANDOM_DRAWS):
                recipe = self.space.sample(suggest)
                if seen.isdisjoint(self._names(recipe)) and self._possible(recipe):
                    return recipe
        unseen = (r for r in self.space.enumerate() if seen.isdisjoint(self._names(r)) and self._possible(r))
        return next(unseen, None)

    def _possible(self, recipe: Recipe) -> bool:
        return self.refusal(recipe) is None

    def _state(self, number: int, recipe: Recipe) -> dict[str, Any]:
        frozen = self._frozen(number)
        return {
            "number": number,
            "recipe": recipe.to_json(),
            "params": dict(frozen.params),
            "distributions": {k: distribution_to_json(d) for k, d in frozen.distributions.items()},
            "system_attrs": dict(frozen.system_attrs),  # a copy: what is told later does not belong to what was asked
        }

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    # --- tell ---------------------------------------------------------------------------------------------------------

    def tell(
        self,
        number: int,
        statuses: Sequence[str],
        metrics: Sequence[Mapping[str, float]],
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Tells Optuna how a proposal ended: one status and one mapping of metrics a seed.

        ``seconds`` are those of work that went into it: ``train`` and ``all``.

        All seeds ok: the means of the metrics. A deterministic failure: pruned. An infrastructure failure: failed, which
        samplers ignore; this process does not ask for the recipe again, the next one does (see :meth:`restore`).
        """
        proposal = self.open.pop(number)
        if seconds is not None:
            Trial(self.study, self._frozen(number)._trial_id).set_user_attr(SECONDS, dict(seconds))
        if all(status == "ok" for status in statuses):
            outcome = {k: sum(m[k] for m in metrics) / len(metrics) for k in metrics[0] if all(k in m for m in metrics)}
            told = outcome if self.objectives.keys() <= outcome.keys() else None  # of a row that was not written here
            self._answer(number, proposal.recipe.hash, told)
        elif any(status in INFRASTRUCTURE for status in statuses):
            self.lost.add(proposal.recipe.hash)
            for one in (number, *self._waiting.pop(proposal.recipe.hash, ())):
                self.study.tell(one, state=TrialState.FAIL)
        else:
            self._answer(number, proposal.recipe.hash, None)

    def pause(self, number: int, fraction: float, metrics: Mapping[str, float]) -> None:
        """Takes that a proposal stands at a rung of its training: its trial goes on running, with what is known of it.

        Args:
            fraction: of the training that is done.
            metrics: found there, the means over its seeds.
        """
        self._again = [proposal for proposal in self._again if proposal.number != number]
        known: Any = {"fraction": fraction, "metrics": dict(metrics), "violations": self._violations(metrics)}
        self.study._storage.set_trial_system_attr(self._frozen(number)._trial_id, RUNG, known)

    def _answer(self, number: int, recipe: str, outcome: Mapping[str, float] | None) -> None:
        """Tells a proposal, and the duplicates of it that wait for the same answer."""
        self.outcomes[recipe] = outcome
        for one in (number, *self._waiting.pop(recipe, ())):
            self._tell(one, outcome)

    def _tell(self, number: int, outcome: Mapping[str, float] | None) -> None:
        if outcome is None:
            self.study.tell(number, state=TrialState.PRUNED)
            return
        frozen = self._frozen(number)
        trial = Trial(self.study, frozen._trial_id)
        for name, value in self._violations(outcome).items():
            trial.set_constraint(name, value)
        self.study.tell(number, [outcome[name] for name in self.objectives])

    def _violations(self, outcome: Mapping[str, float]) -> dict[str, float]:
        known = [c for c in self.constraints if c.metric in outcome]  # at a rung not all are
        return {str(c): c.violation(outcome) for c in known}

    # --- rebuild ------------------------------------------------------------------------------------------------------

    def restore(
        self,
        asks: Sequence[Mapping[str, Any]],
        outcomes: Mapping[int, tuple[list[str], list[dict[str, float]]]],
        spent: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        """Rebuilds the Optuna study from what was asked and how it ended.

        Args:
            asks: the ``state`` of every proposal and duplicate, with ``rejected``/``duplicate``/``running`` where they were.
            outcomes: number to (statuses, metrics) of the proposals that ended; the others are asked for again, under
                the same number and with the same parameters.
            spent: number to the seconds of work that went into a proposal.
        """
        by_number = {int(a["number"]): a for a in asks}
        for kept in asks:
            if kept.get("stages_of"):
                self.same(Recipe.from_json(kept["recipe"]), Recipe.from_json(kept["stages_of"]))
        for number in range(max(by_number, default=-1) + 1):
            ask = by_number.get(number)
            if ask is None or not self._add(ask):  # its file is lost: an empty failed trial keeps the numbers right
                self.study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
                continue
            recipe = Recipe.from_json(ask["recipe"])
            self.recipes[recipe.hash] = self.asked[number] = recipe
            if ask.get("running"):
                self.study.tell(number, state=TrialState.FAIL)
            elif ask.get("rejected"):
                self.outcomes[recipe.hash] = None
                self._tell(number, None)
            elif ask.get("duplicate"):
                names = self._names(recipe)
                known = [name for name in names if name in self.outcomes]
                asked = [p.recipe.hash for p in self.open.values() if p.recipe.hash in names]  # again
                if asked and not known:
                    self._waiting.setdefault(asked[0], []).append(number)
                else:
                    self._tell(number, self.outcomes[known[0]] if known else None)
            else:
                self.open[number] = Proposal(number, recipe, ask)
                if number in outcomes:
                    self.tell(number, *outcomes[number], (spent or {}).get(number))
        self._again = list(self.open.values())

    def _add(self, ask: Mapping[str, Any]) -> bool:
        """Adds the trial of an ask; False where its record is none that Optuna made."""
        try:
            distributions = {k: json_to_distribution(d) for k, d in ask["distributions"].items()}
            trial = optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=dict(ask["params"]),
                distributions=distributions,
                system_attrs=dict(ask["system_attrs"]),
            )
            trial.datetime_start = datetime.now()
            self.study.add_trial(trial)
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        return True

    # --- look ---------------------------------------------------------------------------------------------------------

    def foresight(self) -> dict[str, Any]:
        """Returns how well the sampler predicted, and what it expects of going on: :func:`orchestrator.sampling.foresight.foresight`."""
        return foresight(self.study, self.study.sampler, tuple(self.objectives))
