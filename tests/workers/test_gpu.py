"""The workers package on CUDA: needs neither ray nor the orchestrator. Run with ``pytest -m gpu tests/workers/test_gpu.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workers.measuring.protocols import PROTOCOLS
from workers.metrics import ACCURACIES, METRICS, OBJECTIVES
from workers.run import run_trial
from workers.techniques import registry, versions
from workers.techniques.record import defaults
from workers.trial import Context, Recipe, Step, TrialSpec, trial_id

pytestmark = [
    pytest.mark.gpu,
]

SETTINGS = {
    "epochs": 1,
    "batch_size": 64,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "warmup_fraction": 0.1,
    "optimizer": "adamw",
    "schedule": "one_cycle",
    "label_smoothing": 0.0,
    "grad_clip": 1.0,
    "amp": "bf16",
}
RECIPES: list[list[tuple[str, dict[str, Any]]]] = [
    [],
    [("precision", {"dtype": "bf16"})],
    [("precision", {"dtype": "fp16"})],
    [("weight_only", {"bits": 4})],
    [("weight_only", {"bits": 4, "kernel": "packed"})],
    [("weight_only", {"bits": 8})],
    [("static_int8", {})],
    [("fp8", {})],
    [("tome", {"r": 2}), ("precision", {"dtype": "bf16"})],
    [("nystrom", {"landmarks": 8})],
    [("magnitude_prune", {"mlp_ratio": 0.5}), ("weight_only", {"bits": 4})],
    [("distill", {"depth": 0.5})],
    [("weight_only", {"bits": "mixed", "mean_bits": 4.0})],
    *([(name, {})] for name in ("smoothquant", "gptq", "fq_vit", "repq_vit", "qat", "lsq", "diffq")),
    *([(name, {})] for name in ("taylor_prune", "importance_prune", "pitome", "evit", "dynamicvit", "diffrate")),
    *([(name, {})] for name in ("resolution", "performer")),
    [("scatterbrain", {"window": 4})],
    [("linformer", {"k": 8})],
    [("svd", {"keep": 0.5})],
    [("semi_structured_prune", {})],
    [("semi_structured_prune", {}), ("precision", {"dtype": "bf16"})],
]


def spec(root: Path, steps: list[tuple[str, dict[str, Any]]]) -> TrialSpec:
    from workers import tasks

    data = {
        "kind": "digits",
        "path": None,
        "image_size": None,
        "search_fraction": 0.2,
        "split_seed": 0,
        "train_limit": 300,
        "search_limit": 100,
        "report_limit": 100,
        "mean": None,
        "std": None,
    }
    create = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 2, "mlp_ratio": 2.0, "reg_tokens": 0}
    context = Context(
        model={
            "family": "timm",
            "name": None,
            "pretrained": False,
            "checkpoint": None,
            "create": create,
            "train": True,
        },
        data={**data, "digest": tasks.data_digest(data)},
        training={"baseline": {**SETTINGS, "seed": 0}, "recovery": SETTINGS},
        measurement={
            **PROTOCOLS["quick"],
            "protocol": "quick",
            "noise_runs": 2,
            "threads": 1,
            "bootstrap": 100,
            "compile": False,
        },
        device="cuda",
    )
    recipe = Recipe(tuple(Step(name, {**defaults(registry()[name].Config), **config}) for name, config in steps))
    return TrialSpec(
        study="gpu",
        trial_id=trial_id(recipe, 0, context, versions()),
        recipe=recipe,
        seed=0,
        context=context,
        storage=str(root),
        objectives=tuple(n for n in OBJECTIVES if n not in ACCURACIES or "image_classification" in METRICS[n].tasks),
        gpus=1.0,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize("steps", RECIPES, ids=lambda steps: "+".join(name for name, _ in steps) or "baseline")
def test_a_recipe_runs_and_is_measured_on_cuda(root: Path, steps: list[tuple[str, dict[str, Any]]]) -> None:
    result = run_trial(spec(root, steps))
    assert result.status == "ok", result.failure
    assert result.metrics["peak_memory_bytes"] > 0
    timed = [m for m in result.measurements if m.kind in ("latency", "aa_latency")]
    assert timed or result.conditions["simulated"]
    for measurement in timed:
        assert measurement.device == "cuda"
        assert measurement.conditions["driver"]


def test_cpu_only_kernels_are_infeasible_on_cuda(root: Path) -> None:
    result = run_trial(spec(root, [("dynamic_int8", {})]))
    assert result.status == "infeasible"
