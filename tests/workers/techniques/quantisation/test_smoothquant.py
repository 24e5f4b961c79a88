"""smoothquant: factors by hand, exact before quantisation, what it is for, both kinds of activation scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import AttentionRope
from torch import nn

from tests.workers.techniques.models import VARIANTS, images, surroundings, vit
from tests.workers.techniques.quantised import (
    error_of,
    merging_with_performer,
    require_exact,
    require_reload,
    with_large_channels,
)
from tests.workers.techniques.reduced import built, described, pictures
from workers.models import model_info
from workers.techniques import composition
from workers.techniques.quantisation import smoothquant, static_int8
from workers.techniques.quantisation.shared_affine import NotQuantisable
from workers.techniques.quantisation.shared_integer_linear import IntegerLinear
from workers.techniques.quantisation.shared_norm_folding import Pair, add_biases, fold_, pairs
from workers.techniques.quantisation.smoothquant import Config, migration, smooth_


def convert(model: nn.Module, **config: Any) -> Any:
    return smoothquant.TECHNIQUE.apply(model, Config(images=64, **config), surroundings(model))


def test_factors_by_hand() -> None:
    x, w = torch.tensor([16.0, 1.0, 4.0]), torch.tensor([0.25, 0.25, 4.0])
    assert migration(x, w, 0.5).tolist() == [8.0, 2.0, 1.0]  # sqrt(16) / sqrt(0.25) ...
    assert migration(x, w, 1.0).tolist() == x.tolist()
    assert migration(x, w, 0.0).tolist() == (1 / w).tolist()


def test_after_smoothing_with_a_half_both_ranges_are_equal() -> None:
    torch.manual_seed(0)
    x, w = torch.rand(20) * 10 + 0.1, torch.rand(20) + 0.01
    s = migration(x, w, 0.5)
    torch.testing.assert_close(x / s, w * s)


def test_channels_that_are_always_zero_stay() -> None:
    s = migration(torch.tensor([0.0, 3.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]), 0.5)
    assert s.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_smoothing_is_exact_before_quantisation(variant: str) -> None:
    model = vit(variant, qkv_bias=variant != "class")
    before = model.blocks[0].norm1.weight.clone()
    changed = require_exact(model, lambda model: smooth_(model, 0.7, surroundings(model), 16))
    assert changed == [f"blocks.{i}.{norm}" for i in range(3) for norm in ("norm1", "norm2")]
    assert not torch.equal(model.blocks[0].norm1.weight, before)


def test_smoothing_is_exact_in_blocks_that_merge_and_attend_otherwise() -> None:
    require_exact(merging_with_performer(), lambda model: smooth_(model, 0.5, surroundings(model), 16))


@pytest.mark.parametrize(
    "name",
    ["vit_giant_patch14_dinov2", "eva02_small_patch14_224", "vit_base_patch16_rope_224", "beit_base_patch16_224"],
)
def test_smoothing_is_exact_in_other_models_of_timm(name: str) -> None:
    description = described(name)
    model, around = built(description), surroundings(vit())
    around.batches = lambda: ((images, labels) for _, images, labels in pictures(description).batches(8))
    _, shown, _ = next(pictures(description).batches(4))
    with torch.no_grad():
        before = model(shown)
        changed = smooth_(model, 0.7, around, 16)
        torch.testing.assert_close(model(shown), before, rtol=1e-3, atol=1e-3)
    assert changed == [f"blocks.{i}.{norm}" for i in range(2) for norm in ("norm1", "norm2")]


@pytest.mark.parametrize("name", ["vit_base_patch16_rpn_224", "eva02_enormous_patch14_clip_224"])
def test_norms_after_attention_and_mlp_are_left_alone(name: str) -> None:
    """No linear layer reads them: taking a factor back in one would change the model."""
    model = built(described(name))
    assert pairs(model) == []
    assert "before attention and MLP; here" in str(smoothquant.TECHNIQUE.check(model_info(model), Config()))


def test_queries_keys_and_values_apart_read_the_same_norm() -> None:
    model = built(described("vit_base_patch16_dinov3"))
    model.blocks[0].attn = AttentionRope(64, 4, qkv_fused=False)
    assert pairs(model)[0].readers == tuple(f"blocks.0.attn.{part}_proj" for part in "qkv")


def test_a_gate_reads_the_same_norm() -> None:
    model = vit()
    attn, gate = model.blocks[0].attn, nn.Linear(32, 32)
    attn.gate = gate
    gate.weight.data *= 5
    assert pairs(model)[0] == Pair("blocks.0.norm1", ("blocks.0.attn.qkv", "blocks.0.attn.gate"))
    require_exact(model, lambda model: smooth_(model, 0.5, surroundings(model), 16))


def test_folding_with_a_shift_is_exact_and_needs_biases() -> None:
    model, x = vit(qkv_bias=False), images()
    pair = pairs(model)[0]
    factor, shift = torch.rand(32) + 0.5, torch.randn(32)
    with pytest.raises(NotQuantisable, match="qkv must have a bias"):
        fold_(vit(qkv_bias=False), pair, factor, shift)
    with torch.inference_mode():
        expected = model(x)
        assert add_biases(model, pair.readers) == ["blocks.0.attn.qkv"]
        assert add_biases(model, pair.readers) == []
        fold_(model, pair, factor, shift)
        torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=2e-5)
    model.blocks[0].norm1 = nn.RMSNorm(32)
    with pytest.raises(NotQuantisable, match=r"blocks\.0\.norm1 must have a bias"):
        fold_(model, pair, factor, shift)


@pytest.mark.parametrize("activations", ["token", "static"])
def test_it_keeps_what_plain_quantisation_loses(activations: str) -> None:
    plain = static_int8.Config(images=64)
    smoothed = error_of(with_large_channels(), lambda model: convert(model, activations=activations))
    lost = error_of(with_large_channels(), lambda model: static_int8.TECHNIQUE.apply(model, plain, surroundings(model)))
    assert smoothed < 0.1
    assert smoothed < 0.5 * lost


def test_not_a_number_and_a_second_quantisation_are_refused() -> None:
    model = vit()
    model.blocks[2].norm1.weight.data[4] = 3e38  # finite, but not what the norm gives out
    with pytest.raises(NotQuantisable, match=r"the input of blocks\.2\.attn\.qkv holds NaN"):
        convert(model)
    model = vit()
    convert(model)
    with pytest.raises(NotQuantisable, match="once only"):
        convert(model)
    assert not composition.verdict("smoothquant", "static_int8").allowed


@pytest.mark.parametrize("activations", ["token", "static"])
def test_artefact_reloads_bit_exactly_and_calibration_repeats_itself(activations: str, tmp_path: Path) -> None:
    model = require_reload([("smoothquant", {"images": 64, "activations": activations})], tmp_path / "a")
    assert all(m.static == (activations == "static") for m in model.modules() if isinstance(m, IntegerLinear))
