"""Structured pruning of tiny ViLT and METER models, and what goes together on them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.workers.techniques.test_vlm_techniques import (
    CONVERSIONS,
    NARROW,
    PRUNE,
    PUMER,
    STUDENT,
    TRAINED,
    Step,
    build,
    check,
    every_family,
    label,
    logits,
    surroundings,
)
from workers import models
from workers.techniques import registry
from workers.techniques.pruning import shared_joint_slicing

# --- pruning ----------------------------------------------------------------------------------------------------------


@every_family
def test_pruned_layers_keep_the_strongest_and_the_scale(family: str) -> None:
    model = build(family)
    whole = copy.deepcopy(model)
    technique = registry()["magnitude_prune"]
    config = technique.Config(head_ratio=0.5, mlp_ratio=0.5, head_dim_ratio=0.5, round_to=4)
    resolved = technique.apply(model, config, surroundings(model)).resolved
    attentions = {"vilt": 3, "meter": 8}[family]
    assert resolved["heads"] == [2] * attentions
    assert resolved["head_dims"] == [8] * attentions
    for layer, before in zip(model.layers, whole.layers, strict=True):
        for (_, block), (_, old) in zip(
            shared_joint_slicing.attentions(layer), shared_joint_slicing.attentions(before), strict=True
        ):
            kept = shared_joint_slicing.head_magnitudes(old).argsort(descending=True)[:2].sort().values
            assert block.attention.scale == old.attention.scale == 16**-0.5
            assert block.attention.query.weight.shape == (16, 64)
            assert block.output.dense.weight.shape == (64, 16)
            rows = old.attention.value.weight.view(4, 16, 64)[kept]
            assert all((row == rows).all(-1).any() for row in block.attention.value.weight)


@every_family
def test_heads_and_dimensions_that_do_nothing_can_be_removed(family: str) -> None:
    """Zeroed heads, head dimensions of queries and keys, and hidden dimensions: without them the logits stay."""
    model = build(family)
    with torch.no_grad():
        for layer in model.layers:
            for _, block in shared_joint_slicing.attentions(layer):
                block.output.dense.weight[:, 16:32] = 0  # the second of four heads
                for part in ("query", "key", "value"):
                    getattr(block.attention, part).weight[16:32] = 0
                    getattr(block.attention, part).weight.view(4, 16, 64)[:, 3:7] = 0
                    getattr(block.attention, part).bias.view(4, 16)[:, 3:7] = 0
                block.output.dense.weight.view(64, 4, 16)[:, :, 3:7] = 0
            for _, block in shared_joint_slicing.mlps(layer):
                block.output.dense.weight[:, ::2] = 0
                block.intermediate.dense.weight[::2] = 0
    expected = logits(model)
    technique = registry()["magnitude_prune"]
    config = technique.Config(head_ratio=0.25, mlp_ratio=0.5, head_dim_ratio=0.25, round_to=4)
    pruned = technique.apply(model, config, surroundings(model)).model
    torch.testing.assert_close(logits(pruned), expected, atol=2e-5, rtol=2e-5)


@every_family
def test_what_does_not_go_gives_a_reason(family: str) -> None:
    info = models.model_info(build(family))
    prune, distil = registry()["magnitude_prune"], registry()["distill"]
    assert "embed_ratio=0.25: the channels of" in (prune.check(info, prune.Config(embed_ratio=0.25)) or "")
    assert "remove nothing" in (prune.check(info, prune.Config(head_ratio=0.0, mlp_ratio=0.0)) or "")
    token = distil.check(info, distil.Config(token=True))
    other = distil.check(info, distil.Config(architecture="vit_tiny_patch16_224", init="random"))
    assert token is not None
    assert token.startswith("token=true is for vision transformers")
    assert other is not None
    assert other.startswith("architecture=vit_tiny")
    for name in ("fq_vit", "repq_vit", "taylor_prune", "importance_prune"):
        assert registry()[name].models == ("timm",)


# --- together ---------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize(
    "step",
    [("gptq", {"bits": 4, "images": 64}), ("smoothquant", {"images": 64}), ("dynamic_int8", {}), *TRAINED],
    ids=label,
)
def test_pruned_models_are_quantised(family: str, step: Step, tmp_path: Path) -> None:
    check(family, [PRUNE, step], tmp_path, smaller=0.5)


@every_family
def test_a_pruned_student_in_half_precision_with_packed_weights(family: str, tmp_path: Path) -> None:
    student: Step = ("distill", {"depth": 0.75})
    check(family, [student, PRUNE, ("precision", {}), ("weight_only", {"bits": 4})], tmp_path, smaller=0.3)


@every_family
@pytest.mark.parametrize("step", dict([*CONVERSIONS, *TRAINED]).items(), ids=label)
def test_models_that_reduce_tokens_are_quantised(family: str, step: Step, tmp_path: Path) -> None:
    check(family, [PUMER, step], tmp_path, smaller=0.55)


@every_family
def test_students_and_pruned_models_reduce_tokens_and_are_quantised(family: str, tmp_path: Path) -> None:
    check(family, [NARROW, PUMER, ("qat", {})], tmp_path / "pumer", smaller=0.4)
    check(
        family,
        [NARROW, ("dynamicvit", {"layers": "spread_2"}), ("smoothquant", {"images": 64})],
        tmp_path / "dynamicvit",
    )
    check(family, [STUDENT, ("tome", {"r": 2}), ("static_int8", {"images": 64})], tmp_path / "tome", smaller=0.4)
