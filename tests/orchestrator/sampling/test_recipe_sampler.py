"""The sampler on made-up studies whose best recipes are known: what it learns from, and what it is told."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from orchestrator.sampling.costs import Costs
from orchestrator.sampling.outcomes import RUNG, SECONDS
from orchestrator.sampling.recipe_sampler import FIT, PREDICTED, RecipeSampler
from orchestrator.sampling.suggestions import GivenSuggest
from orchestrator.study.space import SearchSpace
from orchestrator.sweep.searcher import TrialSuggest
from tests.orchestrator.sampling.test_recipes import TECHNIQUES
from workers.trial import Recipe, Step

PRUNED, PRUNED_HALF = (
    Recipe((Step("magnitude_prune", {"head_ratio": 0.0, "mlp_ratio": ratio}),)) for ratio in (0.2, 0.5)
)
CONVERSIONS = ("dynamic_int8", "weight_only")
SPACE = SearchSpace(TECHNIQUES, max_techniques=3)
OBJECTIVES = ("top1_pct", "size_bytes")
DIRECTIONS = ("maximize", "minimize")


def outcome(recipe: Recipe) -> tuple[float, float]:
    """Effects that add up, and one of a pair."""
    accuracy, size = 98.0, 100.0
    for step in recipe.steps:
        match step.technique, step.config:
            case "magnitude_prune", config:
                accuracy -= 8 * config["head_ratio"] ** 2 + 6 * config["mlp_ratio"] ** 2
                size *= 1 - 0.3 * config["head_ratio"] - 0.6 * config["mlp_ratio"]
            case "tome", config:
                accuracy -= 0.4 * config["r"] - (0.3 if config.get("schedule") == "decreasing" else 0.0)
            case "nystrom", config:
                accuracy -= 12 / config["landmarks"]
            case "dynamic_int8", _:
                accuracy, size = accuracy - 0.3, size / 4
            case "weight_only", config:
                accuracy -= {2: 20.0, 4: 1.5, 8: 0.1}[config["bits"]]
                size *= config["bits"] / 32
    if {"tome", "nystrom"} <= set(recipe.techniques):
        accuracy -= 5
    return accuracy, size


Told = Callable[[optuna.Study, optuna.Trial, Recipe], None]


def plainly(study: optuna.Study, trial: optuna.Trial, recipe: Recipe) -> None:
    study.tell(trial, list(outcome(recipe)))


def sampler(seed: int = 0, **more: Any) -> RecipeSampler:
    more = {"reference": lambda: [60.0, 110.0], "n_startup_trials": 8, "conversions": CONVERSIONS} | more
    return RecipeSampler(SPACE, OBJECTIVES, seed=seed, **more)


def study_with(made: RecipeSampler) -> optuna.Study:
    return optuna.create_study(directions=list(DIRECTIONS), sampler=made)


def run(study: optuna.Study, trials: int, tell: Told = plainly) -> list[Recipe]:
    asked = []
    for _ in range(trials):
        trial = study.ask()
        asked.append(SPACE.sample(TrialSuggest(trial)))
        tell(study, trial, asked[-1])
    return asked


def share(recipes: Sequence[Recipe]) -> float:
    """The hypervolume of recipes, as a share of the whole space's."""

    def hypervolume(found: Sequence[Recipe]) -> float:
        points = np.array([outcome(r) for r in found])
        reached, best = 0.0, 60.0
        for accuracy, size in sorted(points.tolist(), key=lambda p: p[1]):
            if accuracy > best and size < 110:
                reached += (accuracy - best) * (110 - size)
                best = accuracy
        return reached

    return hypervolume(recipes) / hypervolume(list(SPACE.enumerate()))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_finds_most_of_a_frontier_with_few_recipes_and_repeats_none(seed: int) -> None:
    recipes = run(study_with(sampler(seed)), 50)
    assert len({r.hash for r in recipes}) == 50
    assert share(recipes) > 0.995
    at_random = optuna.create_study(directions=list(DIRECTIONS), sampler=optuna.samplers.RandomSampler(seed))
    assert share(recipes) > share(run(at_random, 50))


def test_a_restored_study_goes_on_as_the_one_that_was_stopped() -> None:
    """What is asked next follows from the trials alone: their attributes hold what was fitted, to what."""
    original = study_with(sampler())
    run(original, 40)
    flying = [(t, SPACE.sample(TrialSuggest(t))) for t in (original.ask() for _ in range(3))]
    plainly(original, *flying[1])
    again = study_with(sampler())
    for trial in json_round_trip(original):
        again.add_trial(trial)
    assert [r.hash for r in run(again, 12)] == [r.hash for r in run(original, 12)]
    assert sum(FIT in t.system_attrs for t in original.trials) > 3


def json_round_trip(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    trials = study.get_trials(deepcopy=True)
    for trial in trials:
        trial.system_attrs = json.loads(json.dumps(trial.system_attrs))
    return trials


def test_what_is_drawn_depends_on_the_seed() -> None:
    one, two, other = (run(study_with(sampler(seed)), 12) for seed in (0, 0, 1))
    assert [r.hash for r in one] == [r.hash for r in two] != [r.hash for r in other]


def test_failures_are_avoided() -> None:
    def fails(study: optuna.Study, trial: optuna.Trial, recipe: Recipe) -> None:
        if "tome" in recipe.techniques:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            plainly(study, trial, recipe)

    recipes = run(study_with(sampler()), 60, fails)
    assert sum("tome" in r.techniques for r in recipes[:10]) >= 3
    assert sum("tome" in r.techniques for r in recipes[30:]) <= 3


def test_a_value_that_is_no_number_counts_as_a_failure() -> None:
    def odd(study: optuna.Study, trial: optuna.Trial, recipe: Recipe) -> None:
        trial.set_constraint("top1_pct >= 50", float("inf") if trial.number % 5 == 0 else -40.0)
        study.tell(trial, [outcome(recipe)[0], float("inf") if trial.number % 7 == 0 else outcome(recipe)[1]])

    recipes = run(study_with(sampler(constraints=["top1_pct >= 50"])), 30, odd)
    assert len({r.hash for r in recipes}) == 30


def test_constraints_are_learnt_and_met() -> None:
    def limited(study: optuna.Study, trial: optuna.Trial, recipe: Recipe) -> None:
        trial.set_constraint("top1_pct >= 93", 93 - outcome(recipe)[0])
        plainly(study, trial, recipe)

    free = run(study_with(sampler()), 60)
    bound = run(study_with(sampler(constraints=["top1_pct >= 93"])), 60, limited)
    met = [sum(outcome(r)[0] >= 93 for r in recipes[30:]) for recipes in (free, bound)]
    assert met[1] >= 24 > met[0]


def test_trials_in_flight_are_not_repeated_and_push_the_next_ones_away() -> None:
    study = study_with(sampler())
    run(study, 30)
    flying = [SPACE.sample(TrialSuggest(study.ask())) for _ in range(12)]
    assert len({r.hash for r in flying}) == 12
    expected = [t.system_attrs[PREDICTED]["size_bytes"][0] for t in study.trials[30:]]
    assert max(expected) / min(expected) > 3  # along the frontier, not at one end of it


class Known:
    """All sizes are known beforehand."""

    names = frozenset({"size_bytes"})

    def __init__(self, answers: bool = True) -> None:
        self.answers, self.asked = answers, list[Recipe]()

    def of(self, recipe: Recipe) -> Mapping[str, float] | None:
        return {"size_bytes": outcome(recipe)[1]} if self.answers else None

    def ask_for(self, recipes: Sequence[Recipe]) -> None:
        self.asked += recipes


def test_facts_are_no_predictions() -> None:
    facts = Known()
    study = study_with(sampler(facts=facts))
    recipes = run(study, 30)
    predicted = [t.system_attrs[PREDICTED] for t in study.trials if PREDICTED in t.system_attrs]
    assert len(predicted) >= 20
    assert all(set(p) == {"top1_pct"} for p in predicted)
    assert facts.asked == []
    assert share(recipes) >= share(run(study_with(sampler()), 30)) - 0.002


def test_facts_and_costs_can_be_left_out_of_account() -> None:
    made = sampler(facts=Known(), costs=Costs(bool), use_facts=False, use_costs=False)
    study = study_with(made)
    with_nothing = [r.hash for r in run(study_with(sampler()), 14)]
    assert [r.hash for r in run(study, 14)] == with_nothing
    assert set(study.trials[-1].system_attrs[PREDICTED]) == set(OBJECTIVES)


def test_what_is_not_known_yet_is_asked_for_and_predicted_meanwhile() -> None:
    facts = Known(answers=False)
    study = study_with(sampler(facts=facts))
    run(study, 12)
    assert len({r.hash for r in facts.asked}) > 50
    assert set(study.trials[-1].system_attrs[PREDICTED]) == set(OBJECTIVES)


def test_what_cannot_be_carried_out_is_not_proposed() -> None:
    recipes = run(study_with(sampler(possible=lambda r: "nystrom" not in r.techniques)), 40)
    assert all("nystrom" not in r.techniques for r in recipes[8:])


def test_a_training_is_followed_by_its_conversions() -> None:
    """Where a training costs fifty conversions, what is trained is converted in several ways before the next training."""

    def slow(study: optuna.Study, trial: optuna.Trial, recipe: Recipe) -> None:
        surgery = recipe.techniques[0] not in CONVERSIONS
        new = surgery and cut(recipe) not in seen
        seen.add(cut(recipe))
        trial.set_user_attr(SECONDS, {"train": 50.0 if new else 0.0, "all": 51.0 if new else 1.0})
        plainly(study, trial, recipe)

    def cut(recipe: Recipe) -> tuple[str, ...]:
        return tuple(str(s) for s in recipe.steps if s.technique not in CONVERSIONS)

    trainings = []
    for costs in (None, Costs(lambda surgery: bool(surgery))):
        seen: set[tuple[str, ...]] = set()
        recipes = run(study_with(sampler(costs=costs)), 50, slow)
        trainings.append(len({cut(r) for r in recipes}))
        assert share(recipes) > 0.98
    assert trainings[1] < 0.75 * trainings[0]


def test_before_the_models_have_a_say_recipes_without_training_come_first() -> None:
    costs = Costs(lambda surgery: any(name == "magnitude_prune" for name, _ in surgery))
    recipes = run(study_with(sampler(costs=costs)), 8)
    assert all("magnitude_prune" not in r.techniques for r in recipes)
    assert any("magnitude_prune" in r.techniques for r in run(study_with(sampler()), 8))


def test_nobody_waits_for_a_training_that_another_runs() -> None:
    """What shares a training in flight costs as much as a new one: its worker would only wait."""
    made = sampler(costs=Costs(lambda surgery: bool(surgery)))
    study = study_with(made)
    ended, flying = SPACE.params_of(PRUNED_HALF), SPACE.params_of(PRUNED)
    for params in (ended, flying):
        study.enqueue_trial(params)
    trials = [study.ask(), study.ask()]
    recipes = [SPACE.sample(TrialSuggest(trial)) for trial in trials]
    trials[0].set_user_attr(SECONDS, {"train": 50.0, "all": 51.0})
    plainly(study, trials[0], recipes[0])
    made.outcomes.read(study, 2)
    assert made.costs is not None
    keys = [made.keys.key(Recipe((*r.steps, Step("dynamic_int8", {})))) for r in recipes]
    assert made.costs.of([key for key in keys if key], made.outcomes) == pytest.approx([1.0, 51.0])


def test_what_stands_at_a_rung_counts_with_what_others_gained_from_there() -> None:
    """Accuracies at the rung are 30 points low; half are stopped there. Nothing of that may mislead the search."""
    rounds = itertools.count()

    def halved(study: optuna.Study, trial: optuna.Trial, recipe: Recipe) -> None:
        accuracy, size = outcome(recipe)
        at = {"fraction": 0.5, "metrics": {"top1_pct": accuracy - 30, "size_bytes": size}, "violations": {}}
        study._storage.set_trial_system_attr(trial._trial_id, RUNG, at)
        if next(rounds) % 2:
            plainly(study, trial, recipe)

    made = sampler()
    study = study_with(made)
    recipes = run(study, 50, halved)
    assert share(recipes) > 0.99
    made.outcomes.read(study, len(study.trials))
    thought = made.outcomes.paused
    assert len(thought) == 25
    for number, one in thought.items():
        assert one.values == pytest.approx((-outcome(recipes[number])[0], outcome(recipes[number])[1]))
    assert not set(thought) & set(made.outcomes.front)


def test_what_is_measured_at_the_end_only_is_learnt_from_what_ended() -> None:
    """The size stands for a speed, which no rung tells."""
    rounds = itertools.count()

    def halved(study: optuna.Study, trial: optuna.Trial, recipe: Recipe) -> None:
        at = {"fraction": 0.5, "metrics": {"top1_pct": outcome(recipe)[0] - 1}, "violations": {}}
        study._storage.set_trial_system_attr(trial._trial_id, RUNG, at)
        if next(rounds) % 2:
            plainly(study, trial, recipe)

    recipes = run(study_with(sampler(late=["size_bytes"])), 60, halved)
    assert share(recipes[1::2]) > 0.98


def test_a_space_that_is_used_up_is_drawn_from_all_the_same() -> None:
    small = SearchSpace({"tome": {"r": {"low": 1, "high": 4, "step": 1}}})
    made = RecipeSampler(small, OBJECTIVES, n_startup_trials=2, reference=lambda: [60.0, 110.0])
    study = study_with(made)
    asked = []
    for _ in range(6):
        trial = study.ask()
        asked.append(small.sample(TrialSuggest(trial)))
        study.tell(trial, list(outcome(asked[-1])))
    assert len({r.hash for r in asked[:4]}) == 4


def test_other_trials_of_a_study_are_passed_over() -> None:
    """Of another space, failed without a word, enqueued by hand: nothing stops the search."""
    study = study_with(sampler())
    run(study, 10)
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
    study.enqueue_trial(SPACE.params_of(next(SPACE.enumerate())))
    run(study, 10)
    with pytest.raises(KeyError):
        SPACE.sample(GivenSuggest(study.trials[10].params))
    assert len(study.trials) == 21
