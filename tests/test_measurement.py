"""Measurement of models whose cost relation is known, and counts against published numbers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from workers import artefact, measurement, models
from workers.measurement import NotTellable, count_macs, count_params, measure, paired_ratio
from workers.protocol import Measurement
from workers.tasks import TaskInfo

INFO = TaskInfo(10, 1, 8, tuple("0123456789"))

SETTINGS = {
    "protocol": "quick",
    "batch": 4,
    "latency_repeats": 9,
    "throughput_batches": 5,
    "warmup": 1,
    "threads": 1,
    "bootstrap": 500,
}


class Sleeper(nn.Module):
    """Takes a known time, which does not depend on how busy the machine is, as far as sleeping goes."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.zeros(3))
        self.calls: list[tuple[float, int, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        self.calls.append((time.monotonic(), len(images), torch.get_num_threads()))
        time.sleep(self.seconds)
        return images.new_zeros(len(images), 10)


def run(model: nn.Module, baseline: nn.Module, **more: Any) -> dict[str, Measurement]:
    found = measure(model, baseline, SETTINGS, task_info=INFO, device="cpu", artefact_key="key", **more)
    return {m.kind: m for m in found}


def test_a_model_that_sleeps_twice_as_long_has_twice_the_latency_and_half_the_throughput() -> None:
    found = run(Sleeper(0.04), Sleeper(0.02))
    latency, throughput = found["latency"], found["throughput"]
    assert latency.ratio == pytest.approx(2, rel=0.25)
    assert throughput.ratio == pytest.approx(0.5, rel=0.25)
    assert latency.value > 39
    assert latency.value == np.median(latency.samples)
    assert throughput.value <= 4 / 0.04
    for one, repeats in ((latency, 9), (throughput, 5)):
        assert one.ratio is not None
        assert one.ratio_low is not None
        assert one.ratio_high is not None
        assert one.ratio_low <= one.ratio <= one.ratio_high
        assert len(one.samples) == len(one.baseline_samples) == one.conditions["repeats"] == repeats
        assert (one.artefact, one.device, one.resolution, one.protocol) == ("key", "cpu", 8, "quick")
    assert (latency.batch, latency.unit, throughput.batch, throughput.unit) == (1, "ms", 4, "images/s")


def test_the_models_run_in_turn_with_the_threads_asked_for() -> None:
    model, baseline, before = Sleeper(0.001), Sleeper(0.001), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(model, baseline, quantities={"throughput"})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    both = sorted([(*c, "model") for c in model.calls] + [(*c, "baseline") for c in baseline.calls])
    assert [c[3] for c in both] == ["model", "baseline"] * 6
    assert {c[1] for c in both} == {4}
    assert {c[2] for c in both} == {1}


def test_conditions_say_what_was_measured() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).bfloat16()
    wrapped = nn.Sequential(_ToBfloat16(), model)
    conditions = run(wrapped, Sleeper(0), quantities={"latency"})["latency"].conditions
    assert conditions["dtype"] == "bfloat16"
    assert conditions["baseline_dtype"] == "float32"
    assert conditions["torch"] == torch.__version__
    assert conditions["device_name"]
    assert conditions["fused_attention"] is None
    vit = timm.create_model("test_vit", pretrained=False)
    assert measurement._fused(vit) is True
    vit.blocks[0].attn.fused_attn = False
    assert measurement._fused(vit) is False


class _ToBfloat16(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.bfloat16()


def test_the_interval_of_equal_models_holds_one() -> None:
    generator = np.random.default_rng(3)
    drift = np.linspace(1, 1.5, 40)  # both drift together, which pairing takes out
    own, baseline = (drift * generator.lognormal(0, 0.05, 40) for _ in range(2))
    ratio, low, high = paired_ratio(own, baseline, 1000)
    assert low <= 1 <= high
    assert 0.9 < low <= ratio <= high < 1.1
    assert paired_ratio(own, baseline, 1000) == (ratio, low, high)


def test_the_paired_ratio_of_known_values() -> None:
    assert paired_ratio(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]), 10) == (2, 2, 2)
    ratio, low, high = paired_ratio(np.array([1.0, 2.0, 30.0]), np.ones(3), 2000)
    assert ratio == 2
    assert (low, high) == (1, 30)


def test_unknown_quantities_are_refused() -> None:
    with pytest.raises(ValueError, match="got energy"):
        run(Sleeper(0), Sleeper(0), quantities={"energy"})


def test_peak_memory_of_a_small_model_on_a_cpu_cannot_be_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    with pytest.raises(NotTellable, match="20000000 bytes or more, this one has 1000"):
        run(Sleeper(0), Sleeper(0), quantities={"peak_memory"}, artefact_path=tmp_path)
    with pytest.raises(NotTellable, match="artefact_path is missing"):
        run(Sleeper(0), Sleeper(0), quantities={"peak_memory"})


@pytest.mark.parametrize(("name", "giga_macs"), [("vit_base_patch16_224", 17.564), ("deit_tiny_patch16_224", 1.254)])
def test_macs_of_published_models(name: str, giga_macs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    assert round(count_macs(model, (1, 3, 224, 224)) / 1e9, 3) == giga_macs


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_counted_on_every_path(device: str, fused: bool) -> None:
    with torch.device(device):
        model = timm.create_model("test_vit", pretrained=False, img_size=160, num_classes=10)
    dim, depth, heads = model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads
    for block in model.blocks:
        block.attn.fused_attn = fused
    tokens = 101
    hidden = model.blocks[0].mlp.fc1.out_features
    linear = tokens * dim * (4 * dim + 2 * hidden)
    attention = 2 * heads * tokens**2 * (dim // heads)
    expected = 100 * 16 * 16 * 3 * dim + depth * (linear + attention) + 10 * dim
    assert model.blocks[0].attn.fused_attn is fused
    assert count_macs(model, (1, 3, 160, 160)) == expected


def test_macs_with_an_additive_mask_are_those_without() -> None:
    class Masked(nn.Module):
        def __init__(self, mask: Tensor | None) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=self.mask)

    shape = (1, 2, 16, 8)
    expected = 2 * 2 * 16 * 16 * 8
    assert count_macs(Masked(None), shape) == expected
    assert count_macs(Masked(torch.zeros(1, 1, 16, 16)), shape) == expected
    assert count_macs(Masked(torch.zeros(1, 1, 1, 16)), shape) == expected


def test_shared_weights_count_once_and_buffers_do_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    assert count_params(model) == 16 + 8


def test_peak_memory_of_a_real_artefact_holds_its_weights(tmp_path: Path) -> None:
    info = TaskInfo(10, 3, 224, tuple("0123456789"))
    section = {"family": "timm", "name": "vit_tiny_patch16_224", "pretrained": False, "create": {}}
    model = models.build(section, info)
    artefact.save(model, tmp_path, model_description=models.describe(section, info), steps=[])
    (found,) = measure(
        model,
        model,
        SETTINGS,
        task_info=info,
        device="cpu",
        artefact_key="key",
        quantities={"peak_memory"},
        artefact_path=tmp_path,
    )
    weights = 4 * count_params(model)
    assert weights <= found.value < 50 * weights
    assert (found.unit, found.batch, found.ratio) == ("bytes", 4, None)
    assert found.conditions["method"] == "resident growth in a fresh process"
