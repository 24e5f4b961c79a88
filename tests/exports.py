"""Trials to export: one of each kind of recipe, one that failed, one whose data lies elsewhere."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.export.folder import Exported, export_trial
from orchestrator.ledger import Ledger, attempt_row
from orchestrator.ledger.show import find_trial
from orchestrator.study.load import load_study
from tests.places import ROOT
from tests.studies import tiny_study
from workers import artefact
from workers.artefact.export_formats import ExportFormat
from workers.node.storage import LocalStorage
from workers.run import run_report, run_trial
from workers.techniques import registry, versions
from workers.trial import Recipe, Step, TrialResult, TrialSpec, trial_id

REPOSITORY = ROOT

NAME = "exports"

RECIPES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "baseline": (),
    "int8": (("magnitude_prune", {"mlp_ratio": 0.5, "head_ratio": 0.0}), ("tome", {"r": 1}), ("dynamic_int8", {})),
    "int4": (("tome", {"r": 1}), ("weight_only", {"bits": 4})),
    "packed": (("weight_only", {"bits": 4, "kernel": "packed"}),),
    "qat": (("qat", {}),),
    "lsq": (("lsq", {"weight_bits": 8}),),
    "static": (("static_int8", {}),),
    "bf16": (("precision", {"dtype": "bf16"}),),
    "fp16": (("precision", {"dtype": "fp16"}),),
    "factors": (("svd", {"keep": 0.5, "round_to": 1}),),
    "sparse": (("semi_structured_prune", {}),),
}


@dataclass
class Study:
    """A study on disk with one trial for each of RECIPES, one that failed, and one whose data lies elsewhere."""

    storage: LocalStorage
    ledger: Ledger
    trials: dict[str, str]

    def row(self, recipe: str) -> dict[str, Any]:
        return find_trial(self.ledger, self.trials[recipe])

    def model(self, recipe: str) -> torch.nn.Module:
        return artefact.load(f"{self.storage.url}/{self.row(recipe)['artefact']}")

    def export(self, recipe: str, out: Path, format_: ExportFormat | str, **more: Any) -> Exported:
        return export_trial(NAME, self.trials[recipe], out, format=format_, storage=self.storage.url, **more)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The same for every module of a run."""
    return _run(tmp_path_factory.getbasetemp() / "exports")


@cache
def _run(folder: Path) -> Study:
    config = load_study(tiny_study(NAME))
    context, known = config.context(), registry()
    storage = LocalStorage(folder / "storage")
    ledger = Ledger(storage, NAME)
    ledger.write_study({"config": config.model_dump(mode="json"), "context": context.digest})
    trials = {}
    for name, steps in RECIPES.items():
        recipe = Recipe(tuple(Step(n, asdict(known[n].Config(**c))) for n, c in steps))
        trials[name] = trial_id(recipe, 0, context, versions())
        spec = TrialSpec(NAME, trials[name], recipe, 0, context, storage.url)
        result = run_trial(spec)
        assert result.status == "ok", result.failure
        ledger.write_attempt(attempt_row(spec, result, None))
        if name in ("baseline", "int4"):
            ledger.write_report(spec.trial_id, recipe.hash, *map(asdict, run_report(spec)))
    elsewhere = replace(context, data={**context.data, "kind": "imagefolder", "path": "/nowhere/photographs"})
    moved = replace(spec, trial_id=trial_id(recipe, 0, elsewhere, versions()), context=elsewhere)
    trials["moved"] = moved.trial_id
    ledger.write_attempt(attempt_row(moved, replace(result, trial_id=moved.trial_id, attempt_id="m"), None))
    trials["failed"] = trial_id(Recipe(), 1, context, versions())
    spec = TrialSpec(NAME, trials["failed"], Recipe(), 1, context, storage.url)
    ended = TrialResult(spec.trial_id, "a", "infeasible", "it cannot be", {}, time.time(), 0.1)
    ledger.write_attempt(attempt_row(spec, ended, None))
    return Study(storage, ledger, trials)


@pytest.fixture(scope="module")
def fp16(study: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[ExportFormat, Exported]:
    """One trial in every format; the tests leave the folders as they are."""
    return _every_format(tmp_path_factory.getbasetemp() / "exports")


@cache
def _every_format(folder: Path) -> dict[ExportFormat, Exported]:
    return {format_: _run(folder).export("fp16", folder / "fp16" / format_, format_) for format_ in ExportFormat}


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def logits(model: Any, batch: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(batch)


def close(found: torch.Tensor, expected: torch.Tensor, share: float) -> bool:
    return bool((found - expected).abs().max() <= share * expected.abs().max())
