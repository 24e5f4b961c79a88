"""A results folder that was written before the files moved into folders: read, shown, loaded, and gone on with as then.

``before_the_wings`` was written by ``vitpareto run`` at the commit before, three recipes of every kind of stage, and is not made
again when formats change: that it still opens is the point.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.ledger.studies import open_ledger
from orchestrator.study.schema import StudyConfig
from tests.cli_calls import call
from workers import artefact
from workers.run import run_trial
from workers.stages.graph import compile_recipe
from workers.techniques import versions
from workers.trial import TrialSpec, trial_id

WRITTEN = Path(__file__).parent / "before_the_wings"
NAME = "before_the_wings"
SIZES = {
    "484b0f504819": 23195,
    "98ad4d3d6a44": 10392,
}
"""Bytes of the two members of its frontier that need no speed."""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: nothing that a test does may change what was written then."""
    return Path(shutil.copytree(WRITTEN, tmp_path_factory.mktemp("old") / "storage"))


@pytest.fixture(scope="module")
def rows(storage: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (
        open_ledger(NAME, str(storage)).attempts(["trial_id", "spec", "artefact", "top1_pct", "size_bytes"]).to_pylist()
    )
    return found


def printed(storage: Path, *arguments: str) -> Any:
    result = call(*arguments, storage=storage)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_commands_that_read_say_what_they_said(storage: Path) -> None:
    (status,) = printed(storage, "status", NAME, "--format", "json")
    assert (status["study"], status["done"], status["problems"]) == (NAME, 3, [])
    members = printed(storage, "pareto", NAME, "--objectives", "top1_pct,size_bytes", "--format", "json")
    assert [(row["trial_id"], row["size_bytes"]) for row in members] == [("98ad4d3d6a44", SIZES["98ad4d3d6a44"])]
    shown = printed(storage, "show", NAME, "98ad", "--json")
    assert shown["label"].startswith("magnitude_prune")
    counted = printed(storage, "query", NAME, "SELECT count(*) AS n FROM measurements", "--format", "json")
    assert counted[0]["n"] > 0


def test_trials_are_still_named_as_they_were(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 4
    for row in rows:
        spec = TrialSpec.from_dict(json.loads(row["spec"]))
        own = {name: version for name, version in versions().items() if name in spec.recipe.techniques}
        assert trial_id(spec.recipe, spec.seed, spec.context, own) == row["trial_id"]
        keys = [stage.key for stage in compile_recipe(spec.recipe, spec.seed, spec.context)]
        assert f"stages/{keys[-1]}" == row["artefact"]


def test_the_study_asks_the_question_that_it_asked(storage: Path) -> None:
    stored = open_ledger(NAME, str(storage)).study_record()
    assert stored is not None
    assert StudyConfig.from_dict(stored["config"]).context().digest == stored["context"]


@pytest.mark.parametrize("stage", sorted(path.name for path in (WRITTEN / "stages").iterdir()))
def test_every_artefact_loads(storage: Path, stage: str) -> None:
    model = artefact.load(storage / "stages" / stage)
    with torch.inference_mode():
        logits = model(torch.zeros(2, 1, 8, 8))
    assert logits.shape == (2, 10)
    assert bool(logits.isfinite().all())


def test_a_trial_run_again_finds_its_stages_and_computes_what_was_saved(
    storage: Path, rows: list[dict[str, Any]]
) -> None:
    for row in rows:
        spec = TrialSpec.from_dict(json.loads(row["spec"]))
        result = run_trial(replace(spec, storage=str(storage), objectives=("top1_pct", "size_bytes")))
        assert (result.status, result.failure) == ("ok", None)
        assert all(stage.cached for stage in result.stages)
        assert result.metrics["top1_pct"] == pytest.approx(row["top1_pct"], abs=2)  # another CPU may round otherwise
        assert result.metrics["size_bytes"] == row["size_bytes"]
