"""Trials whose recovery pauses at a rung: real trainings of tiny models, images alone and with texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.study.load import load_study
from tests.studies import recipe, tiny_study
from workers import artefact
from workers.node.lease import holder
from workers.node.storage import LocalStorage
from workers.run import run_trial
from workers.stages.graph import compile_recipe
from workers.trial import Context, Recipe, TrialResult, TrialSpec

EPOCHS = 8
PRUNE = ("magnitude_prune", {"mlp_ratio": 0.5, "head_ratio": 0.0})
COUNTS = ("size_bytes", "params", "macs")


@pytest.fixture(scope="module")
def context() -> Context:
    training = {"baseline": {"epochs": 1}, "recovery": {"epochs": EPOCHS, "ema_decay": 0.9, "checkpoint_s": None}}
    return load_study(tiny_study(training=training)).context()


def spec(tmp_path: Path, context: Context, made: Recipe, until: float | None = None) -> TrialSpec:
    storage = LocalStorage(tmp_path).url
    objectives = ("size_bytes",)
    return TrialSpec("s", made.hash[:12], made, 0, context, storage, objectives=objectives, until=until)


def run(*arguments: Any) -> TrialResult:
    result = run_trial(spec(*arguments))
    assert result.failure is None, result.failure
    return result


def trained(result: TrialResult) -> list[float]:
    return [stage.epochs for stage in result.stages if stage.kind == "recovery"]


@pytest.mark.parametrize("conversion", [(), ("dynamic_int8",), ("weight_only",), ("precision",)])
def test_what_is_told_at_a_rung_is_what_the_end_has_but_for_the_accuracy(
    tmp_path: Path, context: Context, conversion: tuple[str, ...]
) -> None:
    made = recipe(PRUNE, *((name, {}) for name in conversion))
    at_rung, later, end = (run(tmp_path, context, made, until) for until in (0.125, 0.375, None))
    assert [(r.status, r.rung, trained(r)) for r in (at_rung, later, end)] == [
        ("stopped", 0.125, [1.0]),
        ("stopped", 0.375, [2.0]),
        ("ok", None, [5.0]),
    ]
    assert at_rung.artefact is None
    assert not at_rung.measurements
    for name in COUNTS:
        assert at_rung.metrics[name] == later.metrics[name] == end.metrics[name], name
    for name in ("top1_pct", "top1_pct_low", "top1_pct_high"):
        assert at_rung.metrics[name] > 0
    assert at_rung.metrics["top1_pct_low"] < at_rung.metrics["top1_pct"] < at_rung.metrics["top1_pct_high"]
    assert at_rung.seconds["train"] > 0
    assert TrialResult.from_dict(at_rung.to_dict()) == at_rung


def test_pauses_leave_no_trace_in_what_ships(tmp_path: Path, context: Context) -> None:
    made = recipe(PRUNE, ("weight_only", {"bits": 4}))
    for until in (0.125, 0.375, None):
        run(tmp_path / "paused", context, made, until)
    whole = run(tmp_path / "whole", context, made)
    last = compile_recipe(made, 0, context)[-1].key
    paused, uninterrupted = (artefact.files(tmp_path / name / "stages" / last) for name in ("paused", "whole"))
    assert paused == uninterrupted
    assert whole.artefact == f"stages/{last}"
    assert not list((tmp_path / "paused" / "stages").glob("*/training/*")), "states go with the end"


def test_the_accuracy_at_a_rung_is_that_of_a_training_that_ends_there(tmp_path: Path, context: Context) -> None:
    """With a rate that does not depend on the length of the training, an eighth of eight epochs is one of one."""
    flat = {"warmup_fraction": 0.0, "lr": 1e-12}
    results = []
    for name, epochs, until in (("paused", EPOCHS, 0.125), ("short", 1, None)):
        recovery = {**context.training["recovery"], "epochs": epochs, **flat}
        other = replace(context, training={**context.training, "recovery": recovery})
        results.append(run(tmp_path / name, other, recipe(PRUNE), until))
    paused, short = results
    assert paused.status == "stopped"
    assert {k: paused.metrics[k] for k in short.metrics if k in paused.metrics} == paused.metrics


def test_recipes_that_share_a_recovery_share_what_was_trained_of_it(tmp_path: Path, context: Context) -> None:
    plain, packed = recipe(PRUNE), recipe(PRUNE, ("weight_only", {"bits": 4}))
    first = run(tmp_path, context, plain, 0.125)
    second = run(tmp_path, context, packed, 0.125)
    assert (trained(first), trained(second)) == ([1.0], [0.0])
    assert second.metrics["size_bytes"] < first.metrics["size_bytes"]
    assert (run(tmp_path, context, plain, 0.375).rung, run(tmp_path, context, packed, 0.125).rung) == (0.375, 0.375)
    assert trained(run(tmp_path, context, packed)) == [5.0]
    done = run(tmp_path, context, plain, 0.125)
    assert (done.status, trained(done)) == ("ok", [0.0]), "its recovery is done: it runs to its end"


def test_a_stage_is_free_while_its_training_is_paused(tmp_path: Path, context: Context) -> None:
    made = recipe(PRUNE)
    run(tmp_path, context, made, 0.125)
    key = next(stage.key for stage in compile_recipe(made, 0, context) if stage.kind == "recovery")
    storage = LocalStorage(tmp_path)
    assert holder(storage, f"stages/{key}/leases") is None
    record = storage.read(f"stages/{key}/leases/{storage.files(f'stages/{key}/leases')[-1]}")
    assert b'"released"' in record
    assert storage.files(f"stages/{key}/training")


def test_a_recipe_without_a_recovery_runs_to_its_end(tmp_path: Path, context: Context) -> None:
    done = run(tmp_path, context, recipe(("dynamic_int8", {})), 0.125)
    assert (done.status, done.rung) == ("ok", None)


def test_what_a_training_decides_is_not_told_before_its_end(tmp_path: Path, context: Context) -> None:
    made = recipe(("importance_prune", {"mlp_ratio": 0.5, "head_ratio": 0.0}))
    at_rung = run(tmp_path, context, made, 0.125)
    assert at_rung.status == "stopped"
    assert not at_rung.metrics.keys() & set(COUNTS)
    assert run(tmp_path, context, made).status == "ok"


@pytest.mark.parametrize(
    ("family", "kind", "layers"),
    [("vilt", "digit_vqa", "1,2"), pytest.param("meter", "digit_retrieval", "2,4", marks=pytest.mark.slow)],
)
def test_images_with_texts_pause_alike(tmp_path: Path, family: str, kind: str, layers: str) -> None:
    study = {
        "name": "s",
        "model": {"family": family, "name": f"{family}_tiny"},
        "data": {"kind": kind, "train_limit": 32, "search_limit": 16, "report_limit": 16},
        "training": {"baseline": {"epochs": 1}, "recovery": {"epochs": 4, "batch_size": 16}},
        "objectives": ["size_bytes", "macs"],
        "techniques": {"pumer": {}, "weight_only": {}},
    }
    context = load_study(study).context()
    made = recipe(("pumer", {"layers": layers, "prune": 0.2}), ("weight_only", {}))
    at_rung = run(tmp_path / "paused", context, made, 0.25)
    assert (at_rung.status, at_rung.rung, trained(at_rung)) == ("stopped", 0.25, [1.0])
    assert [name for name in at_rung.metrics if name.endswith("_low")]
    end, whole = run(tmp_path / "paused", context, made), run(tmp_path / "whole", context, made)
    assert (trained(end), trained(whole)) == ([3.0], [4.0])
    assert end.metrics == whole.metrics
    for name in COUNTS:
        assert at_rung.metrics[name] == end.metrics[name]
