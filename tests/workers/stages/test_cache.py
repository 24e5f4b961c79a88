"""Stages: run once whoever wants them, shared by recipes with the same start, never cached when they failed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from orchestrator.study.load import load_study
from tests.studies import recipe, tiny_study
from workers import artefact
from workers.artefact import parity
from workers.node.lease import generations
from workers.node.storage import LocalStorage, StorageFault
from workers.run import classify, run_trial
from workers.stages.graph import Infeasible, compile_recipe
from workers.stages.runners import RUNNERS
from workers.stages.workbench import PROBE
from workers.trial import Context, Recipe, TrialResult, TrialSpec

PRUNE = ("magnitude_prune", {"mlp_ratio": 0.5, "head_ratio": 0.0})


@pytest.fixture(scope="module")
def context() -> Context:
    return load_study(tiny_study()).context()


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
        patch.setitem(RUNNERS, "surgery", fail)
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
    baseline, wrong = (tmp_path / "stages" / key for key in keys(context, 0, ("precision", {})))
    logits = load((baseline / PROBE).read_bytes())
    kept = parity.probe(list(logits.values()), torch.device("cpu"), (wrong / artefact.MANIFEST).read_bytes())
    (wrong / PROBE).write_bytes(kept)
    failed = run_trial(spec(storage, context, recipe(("precision", {}))))
    assert failed.status == "error"
    assert failed.failure is not None
    assert failed.failure.startswith(f"ArtefactMismatch: artefact {last.key}: reloaded logits differ by")
    assert failed.metrics == {}


# --- damage -----------------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-len(data) // 3] ^= 1
    file.write_bytes(data)


def another_number(file: Path) -> None:
    """Changes a manifest so that it still loads."""
    manifest = json.loads(file.read_text())
    manifest["extra"]["preprocessing"]["mean"] = [0.25]
    file.write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "tensors truncated": (artefact.TENSORS, truncate),
    "tensors flipped": (artefact.TENSORS, flip),
    "tensors gone": (artefact.TENSORS, Path.unlink),
    "manifest truncated": (artefact.MANIFEST, truncate),
    "manifest changed": (artefact.MANIFEST, another_number),
    "logits flipped": (PROBE, flip),
    "logits truncated": (PROBE, truncate),
    "logits gone": (PROBE, Path.unlink),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, context: Context) -> tuple[Path, TrialResult]:
    """A storage with the stages of one recipe, and the recipe's result."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(LocalStorage(folder), context, PRUNE, ("precision", {}))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("which", [0, -1], ids=["the parent of all", "its own"])
def test_a_damaged_stage_is_made_again(
    tmp_path: Path, context: Context, finished: tuple[Path, TrialResult], damage: str, which: int
) -> None:
    folder, first = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    storage, key = LocalStorage(tmp_path), first.stages[which].key
    file, do = DAMAGE[damage]
    do(tmp_path / "stages" / key / file)
    if which == 0:
        other = run(storage, context, ("dynamic_int8", {}))  # a child that is to be made of it
        assert other.conditions["made_again"] == [key]
    again = run(storage, context, PRUNE, ("precision", {}))
    assert again.metrics == first.metrics
    assert executions(storage)[key] == 3, "made, removed, made: each under the lease"
    assert "made_again" not in run(storage, context, PRUNE, ("precision", {})).conditions


def test_stages_of_older_versions_keep_no_digests_and_load(
    tmp_path: Path, context: Context, finished: tuple[Path, TrialResult]
) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    for probe in tmp_path.glob(f"stages/*/{PROBE}"):
        data = probe.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        old = {"conditions": header["__metadata__"]["conditions"]}
        probe.write_bytes(save(load(data), metadata=old))
    again = run(LocalStorage(tmp_path), context, PRUNE, ("precision", {}))
    assert "made_again" not in again.conditions
    assert again.metrics == finished[1].metrics


def test_damage_that_comes_back_is_a_fault_of_the_storage(
    tmp_path: Path, context: Context, finished: tuple[Path, TrialResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    key, write = finished[1].stages[-1].key, LocalStorage.put_atomic

    def lossy(storage: LocalStorage, name: str, data: bytes) -> None:
        write(storage, name, data[:-1] if name.startswith(f"stages/{key}/model.") else data)

    truncate(tmp_path / "stages" / key / artefact.TENSORS)
    monkeypatch.setattr(LocalStorage, "put_atomic", lossy)
    failed = run_trial(spec(LocalStorage(tmp_path), context, recipe(PRUNE, ("precision", {}))))
    assert failed.status == "storage_fault"
    assert failed.failure is not None
    assert failed.failure.startswith(f"DamagedStage: stage {key}: artefact ")
    assert "is truncated" in failed.failure.splitlines()[0]


def test_damaged_logits_of_the_teacher_are_made_again(tmp_path: Path, context: Context) -> None:
    storage = LocalStorage(tmp_path)
    distil = ("distill", {})
    first = run(storage, context, PRUNE, distil)
    logits = next(tmp_path.glob("stages/*/teacher_logits.safetensors"))
    kept = logits.read_bytes()
    truncate(logits)
    shutil.rmtree(tmp_path / "stages" / next(s.key for s in first.stages if s.kind == "recovery"))
    assert run(storage, context, PRUNE, distil).metrics == first.metrics
    assert logits.read_bytes() == kept


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors"), "storage_fault"),
        (PermissionError(errno.EACCES, "Permission denied"), "storage_fault"),
        (StorageFault("403"), "storage_fault"),
        (ConnectionResetError("the server is gone"), "storage_fault"),
        (ValueError("not what was asked"), "error"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "error"),
        (artefact.ArtefactError("made with another version"), "error"),
        (Infeasible("too narrow"), "infeasible"),
    ],
)
def test_what_the_storage_is_blamed_for(error: Exception, status: str) -> None:
    assert classify(error) == status
    wrapped = RuntimeError("what was tried")
    wrapped.__cause__ = error
    assert classify(wrapped) == (status if status == "storage_fault" else "error")


# --- keys -------------------------------------------------------------------------------------------------------------


def keys(context: Context, seed: int = 0, *steps: tuple[str, dict[str, Any]]) -> list[str]:
    return [s.key for s in compile_recipe(recipe(*(steps or (PRUNE, ("precision", {})))), seed, context)]


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
    with pytest.raises(Infeasible, match="must come before precision"):
        compile_recipe(recipe(("precision", {}), PRUNE), 0, context)
