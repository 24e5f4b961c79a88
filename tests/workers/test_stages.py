"""Stages: run once whoever wants them, shared by recipes with the same start, never cached when they failed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.study.load import load_study
from tests.studies import tiny_study
from workers import stages
from workers.node.lease import generations
from workers.node.storage import LocalStorage
from workers.run import run_trial
from workers.techniques import registry
from workers.trial import Context, Recipe, Step, TrialResult, TrialSpec

PRUNE = ("magnitude_prune", {"mlp_ratio": 0.5, "head_ratio": 0.0})


@pytest.fixture(scope="module")
def context() -> Context:
    return load_study(tiny_study()).context()


def recipe(*steps: tuple[str, dict[str, Any]]) -> Recipe:
    """Steps with the parameters that are not named at their defaults."""
    known = registry()
    return Recipe(tuple(Step(name, asdict(known[name].Config(**config))) for name, config in steps))


def spec(storage: LocalStorage, context: Context, made: Recipe, seed: int = 0) -> TrialSpec:
    return TrialSpec("s", made.hash[:12], made, seed, context, storage.url)


def run(storage: LocalStorage, context: Context, *steps: tuple[str, dict[str, Any]]) -> TrialResult:
    result = run_trial(spec(storage, context, recipe(*steps)))
    assert result.status == "ok", result.failure
    return result


def executions(storage: LocalStorage) -> dict[str, int]:
    return {key: generations(storage, f"stages/{key}/leases") for key in storage.folders("stages")}


def test_a_common_start_is_run_once(tmp_path: Path, context: Context) -> None:
    storage = LocalStorage(tmp_path)
    first = run(storage, context, PRUNE, ("precision", {}))
    assert [(s.kind, s.cached) for s in first.stages] == [
        ("baseline", False),
        ("surgery", False),
        ("recovery", False),
        ("conversion", False),
    ]
    second = run(storage, context, PRUNE, ("dynamic_int8", {}))
    assert [(s.kind, s.cached) for s in second.stages] == [
        ("baseline", True),
        ("surgery", True),
        ("recovery", True),
        ("conversion", False),
    ]
    again = run(storage, context, PRUNE, ("precision", {}))
    assert all(s.cached for s in again.stages)
    assert again.metrics == first.metrics
    assert set(executions(storage).values()) == {1}


def test_two_processes_that_want_one_stage_run_it_once(tmp_path: Path, context: Context) -> None:
    storage = LocalStorage(tmp_path / "storage")
    file = tmp_path / "spec.json"
    slow = replace(context, training={**context.training, "baseline": {**context.training["baseline"], "epochs": 20}})
    file.write_text(json.dumps(spec(storage, slow, recipe(PRUNE)).to_dict()))
    command = [sys.executable, "-m", "workers", str(file)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [json.loads(racer.communicate()[0]) for racer in racers]
    assert [r["status"] for r in results] == ["ok", "ok"]
    assert executions(storage) == {s["key"]: 1 for s in results[0]["stages"]}
    for pair in zip(*(r["stages"] for r in results), strict=True):
        assert sorted(s["cached"] for s in pair) == [False, True]
    assert results[0]["metrics"] == results[1]["metrics"]


def test_a_failure_is_not_cached(tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    run(storage, context)

    def fail(*_: object) -> None:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setitem(stages._RUNNERS, "surgery", fail)
        failed = run_trial(spec(storage, context, recipe(PRUNE)))
    assert failed.status == "error"
    assert failed.failure is not None
    assert failed.failure.startswith("RuntimeError: the disk is full")
    assert failed.artefact is None
    passed = run(storage, context, PRUNE)
    surgery = next(s for s in passed.stages if s.kind == "surgery")
    assert not surgery.cached
    assert executions(storage)[surgery.key] == 2


# --- parity -----------------------------------------------------------------------------------------------------------

PARITY = ("parity_exact", "parity_max_abs", "parity_tolerance")


def test_every_row_says_that_its_artefact_computes_what_was_packed(tmp_path: Path, context: Context) -> None:
    storage = LocalStorage(tmp_path)
    steps = (PRUNE, ("tome", {"r": 1}), ("dynamic_int8", {}))
    for _ in ("just packed", "from the cache"):
        conditions = run(storage, context, *steps).conditions
        assert [conditions[name] for name in PARITY] == [True, 0.0, 0.0]
        assert "parity_because" not in conditions
    other = run_trial(replace(spec(storage, context, recipe(*steps)), cpus=2))
    assert other.status == "ok", other.failure
    assert other.conditions["parity_because"] == ["threads"]
    assert not other.conditions["parity_exact"]
    assert other.conditions["parity_max_abs"] <= other.conditions["parity_tolerance"]


def test_an_artefact_that_computes_something_else_gives_no_row(tmp_path: Path, context: Context) -> None:
    storage = LocalStorage(tmp_path)
    last = run(storage, context, ("precision", {})).stages[-1]
    baseline = tmp_path / "stages" / keys(context, 0, ("precision", {}))[0]
    (tmp_path / "stages" / last.key / stages.PROBE).write_bytes((baseline / stages.PROBE).read_bytes())
    failed = run_trial(spec(storage, context, recipe(("precision", {}))))
    assert failed.status == "error"
    assert failed.failure is not None
    assert failed.failure.startswith(f"ArtefactMismatch: artefact {last.key}: reloaded logits differ by")
    assert failed.metrics == {}


# --- keys -------------------------------------------------------------------------------------------------------------


def keys(context: Context, seed: int = 0, *steps: tuple[str, dict[str, Any]]) -> list[str]:
    return [s.key for s in stages.compile_recipe(recipe(*(steps or (PRUNE, ("precision", {})))), seed, context)]


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("data", {"split_seed": 1}),
        ("data", {"train_limit": 200}),
        ("data", {"digest": "other"}),
        ("model", {"checkpoint_digest": "other"}),
        ("training", {"baseline": {"epochs": 2}}),
    ],
)
def test_what_changes_the_baseline_changes_every_key(context: Context, section: str, change: dict[str, Any]) -> None:
    other = replace(context, **{section: {**getattr(context, section), **change}})
    assert not set(keys(context)) & set(keys(other))


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("data", {"path": "/elsewhere/digits"}),
        ("model", {"checkpoint": "/elsewhere/model.safetensors"}),
        ("measurement", {"window_s": 8.0}),
    ],
)
def test_what_only_moves_or_measures_changes_no_key(context: Context, section: str, change: dict[str, Any]) -> None:
    other = replace(context, **{section: {**getattr(context, section), **change}})
    assert keys(context) == keys(other)


def test_keys_follow_what_a_stage_does(context: Context) -> None:
    original = keys(context)
    recovery = {**context.training, "recovery": {**context.training["recovery"], "epochs": 9}}
    assert _same(original, keys(replace(context, training=recovery))) == [True, True, False, False]
    assert _same(original, keys(context, 1)) == [True, False, False, False]
    stronger = ("magnitude_prune", {"mlp_ratio": 0.6, "head_ratio": 0.0})
    assert _same(original, keys(context, 0, stronger, ("precision", {}))) == [True, False, False, False]
    assert _same(original, keys(context, 0, PRUNE, ("dynamic_int8", {}))) == [True, True, True, False]


def _same(one: list[str], other: list[str]) -> list[bool]:
    return [a == b for a, b in zip(one, other, strict=True)]


def test_structure_comes_before_conversion(context: Context) -> None:
    with pytest.raises(stages.Infeasible, match="must come before precision"):
        stages.compile_recipe(recipe(("precision", {}), PRUNE), 0, context)
