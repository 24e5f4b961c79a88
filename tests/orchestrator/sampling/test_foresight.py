"""What a search says of its own predictions, and of what it would run next."""

from __future__ import annotations

import optuna
import pytest

from orchestrator.sampling.foresight import foresight
from orchestrator.sampling.recipe_sampler import PREDICTED
from tests.orchestrator.sampling.test_recipe_sampler import (
    DIRECTIONS,
    OBJECTIVES,
    outcome,
    run,
    sampler,
    share,
    study_with,
)
from workers.trial import Recipe


def test_predictions_are_judged_on_recipes_that_the_model_had_not_seen() -> None:
    made = sampler()
    study = study_with(made)
    run(study, 40)
    told = foresight(study, made, OBJECTIVES)["predictions"]
    assert (
        told["size_bytes"]["count"]
        == told["top1_pct"]["count"]
        == sum(PREDICTED in t.system_attrs for t in study.trials)
    )
    assert told["size_bytes"]["rank_correlation"] > 0.8
    turned = study_with(sampler())  # turned round, they would be wrong as often
    for trial in study.get_trials():
        if PREDICTED in trial.system_attrs:
            mean, spread = trial.system_attrs[PREDICTED]["top1_pct"]
            trial.system_attrs = {PREDICTED: {"top1_pct": [-mean, spread]}}
        turned.add_trial(trial)
    other = foresight(turned, turned.sampler, OBJECTIVES)["predictions"]
    assert other["top1_pct"]["rank_correlation"] == pytest.approx(-told["top1_pct"]["rank_correlation"])
    assert set(other) == {"top1_pct"}


def test_the_best_recipes_not_tried_are_expected_near_what_they_give_and_add_up() -> None:
    made = sampler()
    study = study_with(made)
    done = run(study, 30)
    prospects = foresight(study, made, OBJECTIVES)["prospects"]
    recipes = [Recipe.from_json(p["recipe"]) for p in prospects]
    assert len({r.hash for r in recipes} | {r.hash for r in done}) == 30 + 5
    for recipe, prospect in zip(recipes, prospects, strict=True):
        accuracy, size = outcome(recipe)
        assert prospect["expected"]["top1_pct"][0] == pytest.approx(accuracy, abs=4)
        assert prospect["expected"]["size_bytes"][0] == pytest.approx(size, rel=0.5)
        assert prospect["gain"] > 0
    assert 0 < share([*done, *recipes]) / share(done) - 1 < 0.02
    assert sum(p["gain"] for p in prospects) < 0.02
    again = study_with(sampler())
    for trial in study.get_trials():
        again.add_trial(trial)
    told = foresight(again, again.sampler, OBJECTIVES)["prospects"]
    assert [p["recipe"] for p in told] == [p["recipe"] for p in prospects]
    assert [p["gain"] for p in told] == pytest.approx([p["gain"] for p in prospects])


def test_other_samplers_and_a_study_that_has_just_begun_foresee_nothing() -> None:
    at_random = optuna.create_study(directions=list(DIRECTIONS))
    assert foresight(at_random, at_random.sampler, OBJECTIVES) == {}
    made = sampler()
    study = study_with(made)
    run(study, 3)
    assert foresight(study, made, OBJECTIVES) == {"predictions": {}, "prospects": []}


def test_less_is_expected_of_going_on_the_longer_it_went() -> None:
    expected = []
    for trials in (10, 25, 60):
        made = sampler()
        study = study_with(made)
        run(study, trials)
        expected.append(sum(p["gain"] for p in foresight(study, made, OBJECTIVES)["prospects"]))
    assert expected[0] > 2 * expected[1] > 2 * expected[2] > 0
