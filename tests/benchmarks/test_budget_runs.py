from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import budget_runs
from benchmarks.bench_budget import SIDES, line, make, read, summary
from orchestrator.study.load import load_study
from tests.places import DATA
from tests.studies import ONE_EPOCH, TINY_MODEL, recipe, tiny_study

TINY: Mapping[str, Any] = {
    "model": TINY_MODEL,
    "data": {"kind": "digits", "train_limit": 300, "search_limit": 100, "report_limit": 100},
    "training": ONE_EPOCH,
    "techniques": tiny_study()["techniques"],
}


def order(side: str, folder: Path, **changes: Any) -> dict[str, Any]:
    order = {"data": "digits", "path": None, "side": side, "seed": 1, "folder": str(folder), "most_s": 1e6}
    return {**order, "changes": {**TINY, **changes}}


def test_both_sides_are_asked_what_the_quick_study_searches_without_its_hints() -> None:
    quick, ours = load_study("quick"), load_study(budget_runs.study("digits"))
    assert (ours.techniques, ours.training, ours.model) == (quick.techniques, quick.training, quick.model)
    assert (ours.recipes, ours.constraints, ours.objectives) == ([], [], budget_runs.OBJECTIVES)
    assert (ours.resources.cpus, ours.resources.max_concurrent) == (1, 1)


def test_the_study_of_cifar10_can_be_asked() -> None:
    path = DATA / "cifar10_subset.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    config = load_study(budget_runs.study("cifar10", str(path)))
    assert config.techniques == load_study("quick").techniques
    assert config.training.recovery.epochs == 8


def test_a_recipe_alone_shares_the_baseline_and_nothing_else(tmp_path: Path) -> None:
    config = load_study(tiny_study(**{**TINY, "objectives": list(budget_runs.OBJECTIVES)}))
    spec, base = budget_runs.baseline(config, tmp_path / "baseline")
    assert base.seconds["train"] > 0
    again = budget_runs.baseline(config, tmp_path / "baseline")[1]
    assert "train" not in again.seconds  # it lies there
    pruned = recipe(("magnitude_prune", {"mlp_ratio": 0.5, "round_to": 1}), ("dynamic_int8", {}))
    for _ in range(2):
        result = budget_runs.alone(spec, pruned, tmp_path / "baseline")
        assert result.status == "ok", result.failure
        cached = {run.kind: run.cached for run in result.stages}
        assert cached == {"baseline": True, "surgery": False, "recovery": False, "conversion": False}
        spent = budget_runs.spent_of(result.status, result.seconds, result.metrics, result.duration_s, pruned.label())
        assert 0 < spent.costs["train_s"] < spent.costs["trial_s"]
        assert 0 < spent.costs["train_cpu_s"] < spent.costs["cpu_s"]
        assert spent.metrics is not None
        assert spent.metrics["size_bytes"] < base.metrics["size_bytes"]
    assert [path.name for path in tmp_path.iterdir()] == ["baseline"]


def test_a_failure_costs_and_finds_nothing() -> None:
    spent = budget_runs.spent_of("infeasible", {"train": 2.0}, {"top1_pct": 50.0}, 3.0, "tome(r=90)")
    assert (spent.metrics, spent.costs["train_s"], spent.costs["trial_s"]) == (None, 2.0, 3.0)


def test_the_reference_is_ten_points_below_the_baseline() -> None:
    found = budget_runs.reference({"top1_pct": 98.0, "size_bytes": 1000.0, "macs": 200.0})
    assert found == pytest.approx({"top1_pct": 88.0, "size_bytes": 1100.0, "macs": 220.0})


@pytest.mark.ray
@pytest.mark.slow
def test_both_sides_search_and_compare(tmp_path: Path) -> None:
    stock = make(order("stock", tmp_path, trials=4))
    ours = make(order("tpe", tmp_path, trials=4, **SIDES["tpe"]))
    assert (stock.baseline, stock.reference) == (ours.baseline, ours.reference)
    assert [trial.status for trial in stock.trials] == ["ok"] * 4
    assert len({trial.recipe for trial in ours.trials}) == 4
    file = tmp_path / "budget.jsonl"
    file.write_text("".join(json.dumps(run.to_dict()) + "\n" for run in (stock, ours)))
    assert read(file) == [stock, ours]
    rows = summary(read(file))
    assert [row["side"] for row in rows] == ["stock", "tpe"]
    assert rows[0]["train_s"]["stock"] == round(stock.spent(), 1) == line(stock)["train_s"]
    assert rows[0]["level"] == round(stock.volume, 5)
    assert stock.volume > stock.curve()[1][0]


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_ends_once_it_has_trained_long_enough(tmp_path: Path) -> None:
    run = make({**order("tpe", tmp_path, trials=500, **SIDES["tpe"]), "most_s": 0.01})
    assert run.spent("train_cpu_s") >= 0.01
    assert len(run.trials) < 100
