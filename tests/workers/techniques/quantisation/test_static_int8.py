"""static_int8: ranges and codes by hand, the integer product against exact arithmetic, calibration, bad numbers, compiled and CUDA."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.workers.techniques.models import images, info, surroundings, vit
from tests.workers.techniques.quantised import require_reload
from workers.techniques import composition, registry
from workers.techniques.quantisation import shared_integer_linear, static_int8
from workers.techniques.quantisation.shared_affine import NotQuantisable
from workers.techniques.quantisation.shared_calibration import (
    EPS,
    VALUES_A_BATCH,
    ChannelRange,
    TensorRange,
    asymmetric,
    calibration_batches,
    even_step,
)
from workers.techniques.quantisation.shared_integer_linear import IntegerLinear
from workers.techniques.quantisation.static_int8 import Config
from workers.techniques.tokens import tome

WAYS = ("kernel", "compiled form", "floats")


def exact(layer: IntegerLinear, x: torch.Tensor) -> torch.Tensor:
    """The definition, in float64: x rounded to its codes, times the weights' codes, times both scales."""
    scale, zero = layer.input_scale.double(), layer.input_zero.double()
    codes = (torch.floor(x.double() / scale + zero + 0.5)).clamp(0, 255)
    sums = (codes - zero) @ layer.weight.double().T
    return sums * scale * layer.weight_scale.double() + (0 if layer.bias is None else layer.bias.double())


def choose(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "floats":
        monkeypatch.setattr(shared_integer_linear, "CPU_KERNEL", False)
    elif way == "compiled form":  # what a compiled graph takes, run eagerly
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


# --- ranges and codes -------------------------------------------------------------------------------------------------


def test_scale_and_zero_point_by_hand() -> None:
    assert asymmetric(-1.0, 1.55) == pytest.approx((0.01, 100))
    assert asymmetric(0.0, 25.5) == pytest.approx((0.1, 0))
    assert asymmetric(-25.5, -3.0) == pytest.approx((0.1, 255))  # zero stays representable
    assert asymmetric(-1.5, 6.0, bits=4) == pytest.approx((0.5, 3))


@pytest.mark.parametrize("constant", [0.0, 3.7, -0.02])
def test_a_constant_is_exact(constant: float) -> None:
    scale, zero = asymmetric(constant, constant)
    code = min(max(round(constant / scale + zero), 0), 255)
    assert (code - zero) * scale == pytest.approx(constant, abs=1e-12)
    assert scale >= EPS


def test_minmax_and_percentile_of_known_values() -> None:
    values = torch.arange(10_001).float()[torch.randperm(10_001, generator=torch.Generator().manual_seed(0))][:, None]
    whole, cut = TensorRange(), TensorRange(99.0)
    for part in values.split(4000):
        whole.see(part)
        cut.see(part)
    assert whole.range() == (0.0, 10_000.0)
    assert cut.range() == (50.0, 9950.0)  # half a percent off either end


def test_samples_see_every_channel() -> None:
    channels = torch.arange(64).repeat(4096)
    assert channels[:: even_step(len(channels), 4096, avoid=64)].unique().numel() == 64
    seen = ChannelRange()
    seen.see(torch.stack([torch.full((8, 5), -1.0), torch.full((8, 5), 2.0)]))
    assert [t.tolist() for t in seen.range()] == [[-1.0] * 5, [2.0] * 5]


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 99.999])
def test_no_more_is_cut_than_was_asked_for(percentile: float) -> None:
    """Of a sample of 65,536 values the largest is the 99.998th percentile: 99.999 is no percentile of it."""
    values = torch.randn(30 * VALUES_A_BATCH // 7, 7, generator=torch.Generator().manual_seed(0)) ** 3
    seen = TensorRange(percentile)
    seen.see(values)
    low, high = seen.range()
    cut = float(((values < low) | (values > high)).double().mean())
    asked = 1 - percentile / 100
    assert cut <= 1.25 * asked
    assert cut >= 0.75 * asked or percentile == 99.999


def test_values_of_a_smaller_last_batch_count_no_more_than_others() -> None:
    seen = TensorRange(99.0)
    seen.see(torch.zeros(4 * VALUES_A_BATCH, 3).uniform_(-1, 1, generator=torch.Generator().manual_seed(0)))
    seen.see(torch.full((VALUES_A_BATCH // 100, 3), 50.0))  # 0.25 % of all values: above what is cut at the upper end
    assert seen.range()[1] < 1
    seen.see(torch.full((VALUES_A_BATCH // 25, 3), 50.0))
    assert seen.range()[1] == 50


# --- the layer --------------------------------------------------------------------------------------------------------


def test_codes_by_hand() -> None:
    linear = nn.Linear(3, 1, bias=False)
    linear.weight.data = torch.tensor([[127.5, -127.5, 63.75]])
    layer = IntegerLinear.of(linear, 0.5, 10)
    assert layer.weight.tolist() == [[127, -128, 64]]  # halves to even, then held to 8 bits
    # codes 12, 9, 255 (clipped) less 10: 2 * 127 + 1 * 128 + 245 * 64 = 16062, times 0.5 * 1
    assert layer(torch.tensor([[1.0, -0.5, 1e6]])).item() == pytest.approx(16062 * 0.5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns", "out"), [(1, 37, 65), (7, 64, 48), (20, 8, 1)])
def test_product_is_the_exact_integer_one(
    way: str, bias: bool, rows: int, columns: int, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(columns, out, bias=bias), torch.randn(2, rows, columns)
    choose(way, monkeypatch)
    layer = IntegerLinear.of(linear, *asymmetric(float(x.min()) / 2, float(x.max())))
    with torch.inference_mode():
        found = layer(x)
        assert found.shape == (2, rows, out)
        torch.testing.assert_close(found.double(), exact(layer, x), atol=2e-6, rtol=1e-6)
        assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("way", WAYS)
def test_a_scale_a_token_makes_results_independent_of_the_batch(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 24), torch.randn(5, 40) * torch.logspace(-3, 3, 5)[:, None]
    x[2] = 0
    choose(way, monkeypatch)
    layer = IntegerLinear.of(linear)
    scale = (x.double().abs().amax(1, keepdim=True) / 127).clamp_min(EPS)
    expected = (x / scale).round() * scale @ (layer.weight.double() * layer.weight_scale.double()[:, None]).T
    with torch.inference_mode():
        found = layer(x)
        torch.testing.assert_close(found.double(), expected + linear.bias.double(), atol=1e-5, rtol=3e-4)
        assert torch.equal(layer(x[3:4]), found[3:4])


def test_rows_of_zeros_and_new_values_reach_the_kernel() -> None:
    zeros = nn.Linear(8, 4)
    zeros.weight.data.zero_()
    one, other = IntegerLinear.of(zeros, 0.1, 3), IntegerLinear.of(nn.Linear(8, 4), 0.2, 7)
    x = torch.randn(2, 8)
    assert torch.equal(one(x), zeros.bias.expand(2, -1))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x))
    assert torch.equal(copy.deepcopy(one)(x), other(x))


@pytest.mark.parametrize("static", [True, False])
def test_an_exported_layer_computes_the_same(static: bool) -> None:
    torch.manual_seed(0)
    layer, x = IntegerLinear.of(nn.Linear(64, 48), 0.02 if static else None, 120), torch.randn(3, 9, 64)
    program = torch.export.export(layer, (x,)).module()
    with torch.inference_mode():
        torch.testing.assert_close(program(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_layer_computes_the_same() -> None:
    torch.manual_seed(0)
    layer, x = IntegerLinear.of(nn.Linear(64, 48), 0.02, 120), torch.randn(3, 9, 64)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(layer)(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("static", [True, False])
def test_cuda_integer_product_is_that_of_the_cpu(rows: int, static: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(37, 65), torch.randn(rows, 37)
    layer = IntegerLinear.of(linear, *(asymmetric(float(x.min()), float(x.max())) if static else (None, 0)))
    expected = layer(x)
    torch.testing.assert_close(layer.to("cuda")(x.cuda()).cpu(), expected, atol=1e-5, rtol=1e-5)


# --- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_takes_exactly_the_images_that_are_asked_for() -> None:
    around = surroundings(vit())
    assert [len(b) for b in calibration_batches(around, 11)] == [8, 3]
    assert [len(b) for b in calibration_batches(around, 64)] == [8, 8]


@pytest.mark.parametrize("observer", ["minmax", "percentile"])
def test_ranges_are_those_of_the_layers_inputs(observer: str) -> None:
    model = vit()
    seen: list[torch.Tensor] = []
    model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    around = surroundings(model)
    applied = static_int8.TECHNIQUE.apply(copy.deepcopy(model), Config(observer=observer, percentile=99.0), around)
    with torch.no_grad():
        for batch, _ in around.batches():
            model(batch)
    values = torch.cat(seen).flatten().sort().values
    cut = 0 if observer == "minmax" else round(len(values) * 0.005)
    scale, zero = asymmetric(float(values[cut]), float(values[len(values) - 1 - cut]))
    layer: Any = applied.model.get_submodule("blocks.1.mlp.fc2")
    assert float(layer.input_scale) == pytest.approx(scale)
    assert int(layer.input_zero) == zero


def test_calibration_runs_with_the_token_reduction_and_repeats_itself() -> None:
    def ranges(r: int) -> dict[str, torch.Tensor]:
        model = vit()
        around = surroundings(model)
        if r:
            tome.TECHNIQUE.apply(model, tome.Config(r=r), around)
        static_int8.TECHNIQUE.apply(model, Config(), around)
        return {name: t for name, t in model.state_dict().items() if name.endswith("input_scale")}

    once, again, whole = ranges(4), ranges(4), ranges(0)
    assert all(torch.equal(again[name], scale) for name, scale in once.items())
    assert any(not torch.equal(whole[name], scale) for name, scale in once.items())


def test_what_never_runs_is_left_alone_and_the_model_stays_in_its_mode() -> None:
    model = vit().train()
    model.unused = nn.Linear(4, 4)
    applied = static_int8.TECHNIQUE.apply(model, Config(skip_head=True), surroundings(model))
    assert isinstance(model.unused, nn.Linear)
    assert isinstance(model.head, nn.Linear)
    assert len(applied.changed) == 3 * 4
    assert model.training


def test_not_a_number_names_the_layer() -> None:
    model = vit()
    model.blocks[1].mlp.fc1.weight.data[3, 2] = float("nan")
    with pytest.raises(NotQuantisable, match=r"the weight of blocks\.1\.mlp\.fc1 must be finite"):
        static_int8.TECHNIQUE.apply(model, Config(), surroundings(model))
    model = vit()
    around = surroundings(model)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch, labels in around.batches():
            batch[0, 0, 0, 0] = float("inf")
            yield batch, labels

    with pytest.raises(NotQuantisable, match=r"the input of blocks\.0\.attn\.qkv holds NaN"):
        static_int8.TECHNIQUE.apply(model, Config(), replace(around, batches=batches))
    with pytest.raises(NotQuantisable, match="no training image"):
        static_int8.TECHNIQUE.apply(vit(), Config(), replace(around, batches=lambda: iter(())))


# --- the record -------------------------------------------------------------------------------------------------------


def test_artefact_reloads_bit_exactly_and_is_small(tmp_path: Path) -> None:
    model = require_reload([("static_int8", {})], tmp_path / "a")
    whole = require_reload([], tmp_path / "whole")
    sizes = [sum(t.nbytes for t in m.state_dict().values()) for m in (whole, model)]
    assert sizes[0] / sizes[1] > 3


def test_close_to_the_model_and_never_twice() -> None:
    model = vit()
    with torch.inference_mode():
        expected = model(images())
        static_int8.TECHNIQUE.apply(model, Config(), surroundings(model))
        assert (model(images()) - expected).norm() < 0.1 * expected.norm()
    with pytest.raises(NotQuantisable, match="quantise a model once only"):
        static_int8.TECHNIQUE.apply(model, Config(), surroundings(model))
    assert not composition.verdict("static_int8", "weight_only").allowed
    assert not composition.verdict("static_int8", "static_int8").allowed


@pytest.mark.parametrize(
    ("name", "values"), [("static_int8", {}), ("smoothquant", {}), ("qat", {}), ("lsq", {"weight_bits": 8})]
)
@pytest.mark.parametrize(
    ("device", "vnni", "cuda", "simulated"),
    [
        ("cpu", False, False, True), ("cpu", True, False, False), ("cpu", False, True, True), ("cpu", True, True, False),
        ("cuda", False, True, False), ("cuda", True, True, False),
    ],
)  # fmt: skip
def test_simulated_where_the_trial_s_own_device_has_no_kernel(
    name: str,
    values: dict[str, Any],
    device: str,
    vnni: bool,
    cuda: bool,
    simulated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    technique = registry()[name]
    config = technique.Config(**values)
    assert technique.check(info(device=device), config) is None
    monkeypatch.setattr(shared_integer_linear, "CPU_KERNEL", vnni)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert technique.simulated(config, device) is simulated
