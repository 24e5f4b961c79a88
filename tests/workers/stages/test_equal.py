"""Recipes that cut a model to the same structure are one recipe: trained once, measured once; others stay what they were."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.study.load import load_study
from tests.studies import recipe, tiny_study
from workers import artefact
from workers.node.storage import LocalStorage
from workers.run import run_remeasure, run_report, run_trial
from workers.stages.graph import compile_recipe
from workers.techniques import versions
from workers.trial import Context, Recipe, TrialResult, TrialSpec, trial_id

CUT = {"ratio": 0.3, "dimensions": "mlp", "batches": 2}
"""Of MLP dimensions alone, which all cost the same, so that the cost of a dimension has no say in which ones go."""


@pytest.fixture(scope="module")
def context() -> Context:
    return load_study(tiny_study()).context()


def run(storage: LocalStorage, context: Context, *steps: tuple[str, dict[str, Any]], study: str = "s") -> TrialResult:
    result = run_trial(spec(storage, context, *steps, study=study))
    assert result.status == "ok", result.failure
    return result


def spec(storage: LocalStorage, context: Context, *steps: tuple[str, dict[str, Any]], study: str = "s") -> TrialSpec:
    made = recipe(*steps)
    return TrialSpec(study, trial_id(made, 0, context, versions()), made, 0, context, storage.url)


def ran(result: TrialResult) -> list[str]:
    return [stage.kind for stage in result.stages if not stage.cached]


def test_an_equal_cut_is_neither_trained_nor_measured_again(tmp_path: Path, context: Context) -> None:
    storage = LocalStorage(tmp_path)
    first = run(storage, context, ("taylor_prune", {**CUT, "cost_weight": 0.0}))
    assert ran(first) == ["baseline", "surgery", "recovery"]
    second = run(storage, context, ("taylor_prune", {**CUT, "cost_weight": 1.0}))
    assert ran(second) == ["surgery"]
    assert second.trial_id != first.trial_id
    assert (second.artefact, second.metrics) == (first.artefact, first.metrics)
    assert second.measurements == first.measurements
    assert second.conditions["same_as"] == first.trial_id
    assert Recipe.from_json(second.conditions["stages_of"]).steps[0].config["cost_weight"] == 0
    assert "same_as" not in first.conditions
    assert "train" in first.seconds


def test_what_comes_behind_an_equal_cut_is_shared_too(tmp_path: Path, context: Context) -> None:
    storage = LocalStorage(tmp_path)
    run(storage, context, ("taylor_prune", {**CUT, "cost_weight": 0.0}))
    packed = run(storage, context, ("taylor_prune", {**CUT, "cost_weight": 1.0}), ("precision", {}))
    assert ran(packed) == ["surgery", "conversion"]
    assert "same_as" not in packed.conditions  # the first one of its kind: measured
    again = run(storage, context, ("taylor_prune", {**CUT, "cost_weight": 0.0}), ("precision", {}))
    assert ran(again) == []
    assert again.conditions["same_as"] == packed.trial_id
    assert "stages_of" not in again.conditions  # these are its own
    assert again.metrics == packed.metrics


def test_another_study_and_the_same_trial_again_are_measured(tmp_path: Path, context: Context) -> None:
    storage = LocalStorage(tmp_path)
    step = ("taylor_prune", {**CUT, "cost_weight": 0.0})
    for study in ("s", "s", "other"):
        assert "same_as" not in run(storage, context, step, study=study).conditions


def test_other_cuts_and_trainings_that_differ_stay_apart(tmp_path: Path, context: Context) -> None:
    """Distillation into the whole model leaves it as it is: only what is learned afterwards differs."""
    storage = LocalStorage(tmp_path)
    run(storage, context, ("taylor_prune", {**CUT}))
    assert ran(run(storage, context, ("taylor_prune", {**CUT, "ratio": 0.15}))) == ["surgery", "recovery"]
    for alpha in (0.3, 0.7):
        found = run(storage, context, ("distill", {"alpha": alpha}))
        assert ran(found) == ["surgery", "recovery"]
        assert "stages_of" not in found.conditions


def test_report_and_later_measurements_are_of_what_the_trial_shipped(tmp_path: Path, context: Context) -> None:
    storage = LocalStorage(tmp_path)
    first = run(storage, context, ("taylor_prune", {**CUT, "cost_weight": 0.0}))
    second = spec(storage, context, ("taylor_prune", {**CUT, "cost_weight": 1.0}))
    run_trial(second)
    stages = storage.folders("stages")
    (accuracy,) = run_report(second)
    assert f"stages/{accuracy.artefact}" == first.artefact
    assert run_remeasure(second) == ()  # no speed was asked for
    assert storage.folders("stages") == stages


def test_a_result_from_before_keeps_its_own_stages(tmp_path: Path, context: Context) -> None:
    """Both were trained when nobody compared cuts; whichever is asked for again finds what it had."""
    storage = LocalStorage(tmp_path)
    steps = [("taylor_prune", {**CUT, "cost_weight": weight}) for weight in (0.0, 1.0)]
    rows = []
    for step in steps:
        rows.append(run(storage, context, step))
        for notes in tmp_path.glob("stages/*/equal"):
            shutil.rmtree(notes)
    assert rows[0].artefact != rows[1].artefact
    for step, row in zip(steps, rows, strict=True):
        again = run(storage, context, step)
        assert (ran(again), again.artefact, again.metrics) == ([], row.artefact, row.metrics)
        assert again.artefact == f"stages/{compile_recipe(recipe(step), 0, context)[-1].key}"


def test_a_first_cut_that_was_lost_is_made_again(tmp_path: Path, context: Context) -> None:
    storage = LocalStorage(tmp_path)
    first = run(storage, context, ("taylor_prune", {**CUT, "cost_weight": 0.0}))
    for stage in first.stages[1:]:
        (tmp_path / "stages" / stage.key / artefact.MANIFEST).unlink()
    second = run(storage, context, ("taylor_prune", {**CUT, "cost_weight": 1.0}))
    assert [(stage.kind, stage.cached) for stage in second.stages] == [
        ("baseline", True),
        ("surgery", False),
        ("surgery", False),
        ("recovery", False),
    ]
    assert second.metrics == first.metrics


@pytest.mark.parametrize("damage", ["", "[1]", '{"a": 1}'])
def test_damaged_notes_cost_time_only(tmp_path: Path, context: Context, damage: str) -> None:
    storage = LocalStorage(tmp_path)
    first = run(storage, context, ("taylor_prune", {**CUT, "cost_weight": 0.0}))
    for kind in ("equal", "answers"):
        for note in tmp_path.glob(f"stages/*/{kind}/*"):
            note.write_text(damage)
    second = run(storage, context, ("taylor_prune", {**CUT, "cost_weight": 1.0}))
    assert ran(second) == ["surgery", "recovery"]
    assert second.metrics == first.metrics
    third = run(storage, context, ("taylor_prune", {**CUT, "cost_weight": 0.5}))
    assert (ran(third), third.artefact) == (["surgery"], second.artefact)
