"""fq_vit: factors, log2 codes and log-int-softmax against their definitions, sizes of merged tokens, what is calibrated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.workers.techniques.models import images, surroundings, vit
from tests.workers.techniques.quantised import Step, require_reload
from workers.techniques import composition
from workers.techniques.low_rank import nystrom
from workers.techniques.quantisation import fq_vit
from workers.techniques.quantisation.fq_vit import (
    Config,
    FactorNorm,
    LogIntSoftmax,
    choose_factors,
    int_exp,
    log2_codes,
    log_int_softmax,
    powers_of_two,
)
from workers.techniques.quantisation.shared_affine import NotQuantisable
from workers.techniques.quantisation.shared_calibration import ChannelRange
from workers.techniques.quantisation.shared_integer_linear import IntegerLinear
from workers.techniques.quantisation.shared_quantised_attention import QuantisedAttention, UniformQuantiser, quantisers
from workers.techniques.tokens.shared_blocks import attend


def convert(model: nn.Module, **config: Any) -> Any:
    return fq_vit.TECHNIQUE.apply(model, Config(images=64, **config), surroundings(model))


# --- mathematics ------------------------------------------------------------------------------------------------------


def test_each_channel_gets_the_factor_of_its_range() -> None:
    torch.manual_seed(0)
    rows = (torch.rand(4000, 5) * 2 - 1) * torch.tensor([8.0, 4.0, 2.0, 1.0, 0.1])
    low, high = float(rows.min()), float(rows.max())
    scale, zero, power = choose_factors(rows, low, high)
    assert scale == pytest.approx((high - low) / 255 / 8)
    assert zero == round(-low / (8 * scale))
    assert power.tolist() == [3, 2, 1, 0, 0]


def test_the_factor_is_the_one_with_the_least_squared_error() -> None:
    torch.manual_seed(0)
    rows = torch.randn(300, 16) * torch.rand(16) * 3 + torch.randn(16)
    scale, zero, power = choose_factors(rows, float(rows.min()), float(rows.max()))
    for channel, values in enumerate(rows.T.double().tolist()):
        errors = []
        for factor in (1, 2, 4, 8):
            step = scale * factor
            rounded = [(min(max(round(v / step + zero), 0), 255) - zero) * step for v in values]
            errors.append(sum((r - v) ** 2 for r, v in zip(rounded, values, strict=True)))
        assert errors[power[channel]] == pytest.approx(min(errors), rel=1e-4)


def test_constant_channels_have_a_factor_and_a_value() -> None:
    rows = torch.tensor([[0.0, 1.0, -2.0]]).repeat(10, 1)
    scale, zero, power = choose_factors(rows, -2.0, 1.0)
    step = scale * 2.0 ** power.float()
    assert torch.allclose(((rows / step + zero).round().clamp(0, 255) - zero) * step, rows, atol=3 / 255 / 2)
    assert choose_factors(torch.zeros(3, 2), 0.0, 0.0)[1:][1].tolist() == [0, 0]


def test_log2_codes_by_hand() -> None:
    p = torch.tensor([1.0, 0.5, 0.36, 0.35, 2**-15, 2**-15.6, 0.0])
    assert log2_codes(p).tolist() == [0, 1, 1, 2, 15, 16, math.inf]
    assert powers_of_two(log2_codes(p), 4).tolist() == [1, 0.5, 0.5, 0.25, 2**-15, 0, 0]
    assert powers_of_two(torch.tensor([255.0, 256.0]), 8).tolist() == [0.0, 0.0]  # 2^-255 is none in float32
    assert powers_of_two(torch.tensor([100.0, 256.0]), 8).tolist() == [2**-100, 0.0]


@pytest.mark.parametrize("scale", [0.01, 0.05, 0.2])
def test_int_exp_is_whole_and_close_to_exp(scale: float) -> None:
    x = -torch.arange(0, int(18 / scale)).float()
    exp = int_exp(x, scale)
    assert torch.equal(exp, exp.round())
    ratio = (exp / exp[0]).double()
    expected = (x.double() * scale).exp()
    # The polynomial is off by 0.003, ln 2 and its terms are whole multiples of the scale.
    assert ((ratio - expected).abs() <= 0.005 + 2.5 * scale * expected * (1 + x.abs() * scale)).all()


def slow_log_int_softmax(row: list[int], scale: float) -> list[float]:
    """The definition in Python's integers."""
    a, b, c = 0.35815147, 0.96963238, 1.0
    ln2, linear, constant = math.floor(-math.log(2) / scale), math.floor(b / a / scale), math.floor(c / a / scale**2)
    exps = []
    for value in row:
        x = max(value - max(row), 30 * ln2)
        q, rest = divmod(x, ln2)  # both negative: q is positive
        exps.append(((rest + linear) * rest + constant) << (30 - q))
    codes: list[float] = []
    for exp in exps:
        ratio = round(sum(exps) / exp)
        leading = ratio.bit_length() - 1
        codes.append(leading + (leading > 0 and (ratio >> (leading - 1)) & 1))
    return codes


@pytest.mark.parametrize("scale", [0.02, 0.1, 0.31])
def test_log_int_softmax_is_its_definition(scale: float) -> None:
    x = torch.randint(0, 256, (40, 23), generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([slow_log_int_softmax(row, scale) for row in x.tolist()])
    assert torch.equal(log_int_softmax(x.float(), scale), expected.float())


def test_log_int_softmax_is_near_softmax() -> None:
    x = torch.randint(0, 256, (200, 17), generator=torch.Generator().manual_seed(0)).float()
    codes, p = log_int_softmax(x, 0.03), (x * 0.03).softmax(-1)
    off = (codes + p.log2()).abs()
    # Half a code, rounding at 1.5 where the middle is 1.41, and ln 2 as 24 steps of 0.03, 4 % too much in each octave.
    assert (off < 0.65 + 0.045 * (1 - p.log2())).all()
    assert off.mean() < 0.4
    assert torch.equal(log_int_softmax(x + 7, 0.03), codes)
    assert log_int_softmax(torch.zeros(1, 4), 0.1).tolist() == [[2.0] * 4]
    assert log_int_softmax(torch.tensor([[200.0, 0.0]]), 0.3).tolist()[0][0] == 0


# --- parts ------------------------------------------------------------------------------------------------------------


def test_factor_norm_rounds_before_the_norm() -> None:
    torch.manual_seed(0)
    norm, rows = nn.LayerNorm(4), torch.randn(64, 4) * torch.tensor([8.0, 0.5, 0.25, 0.0])
    part, seen = FactorNorm(norm, 4), ChannelRange(keep_rows=True)
    seen.see(rows)
    part.fix(seen, use_factors=True)
    step = part.scale * torch.tensor([8.0, 1.0, 1.0, 1.0])
    assert part.power.tolist() == [3, 0, 0, 0]
    expected = norm(((rows / step + part.zero).round().clamp(0, 255) - part.zero) * step)
    torch.testing.assert_close(part(rows), expected)
    part.fix(seen, use_factors=False)
    assert part.power.tolist() == [3] * 4


def attention(quantise: bool, bits: int = 16) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Attention in quantisers as fine as they can be, or passing on; tokens, and log sizes."""
    block: Any = vit("qk_norm").blocks[0]
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(2))
    bias = torch.rand(2, 1, 1, 17, generator=torch.Generator().manual_seed(3)) * 2
    part = QuantisedAttention(block.attn, LogIntSoftmax(bits, integers=True), 8)
    for _, quantiser in quantisers(part):
        quantiser.calibrating = not quantise
        quantiser.fix(-6.0, 6.0) if quantise else None
    return part, x, bias


def test_attention_without_rounding_is_timm_s_with_the_sizes() -> None:
    part, x, bias = attention(False)
    with torch.inference_mode():
        expected, seen = attend(vit("qk_norm").blocks[0].attn, x, bias)
        found, q, _ = part.attend_quantised(x, bias)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(q, seen.q)
        assert torch.equal(attend(part, x, bias)[0], found)
        assert torch.equal(part(x, attn_mask=bias), found)
    with pytest.raises(ValueError, match="additive"):
        part(x, is_causal=True)


def test_log_sizes_are_added_before_the_logits_are_rounded() -> None:
    part, x, bias = attention(True)
    seen: list[torch.Tensor] = []
    part.softmax.logits.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    part.softmax.integers = False  # goes through the quantiser's forward
    with torch.inference_mode():
        part(x)
        part(x, attn_mask=bias)
        torch.testing.assert_close(seen[1], seen[0] + bias)


def test_weights_are_powers_of_two() -> None:
    softmax = LogIntSoftmax(4, integers=True)
    softmax.logits.fix(-4.0, 4.0)
    weights = softmax(torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)))
    codes = -weights[weights > 0].log2()
    assert torch.equal(codes, codes.round())
    assert codes.max() <= 15


def test_uniform_quantiser_by_hand() -> None:
    part = UniformQuantiser(4)
    part.fix(-1.5, 6.0)
    assert part(torch.tensor([-2.0, -1.0, 0.3, 5.9, 7.0])).tolist() == [-1.5, -1.0, 0.5, 6.0, 6.0]


# --- the model --------------------------------------------------------------------------------------------------------


def test_parts_of_a_model_and_closeness() -> None:
    model, x = vit(), images()
    with torch.inference_mode():
        expected = model(x)
        applied = convert(model, attention_bits=8)
        found = model(x)
    assert len([m for m in model.modules() if isinstance(m, IntegerLinear)]) == 3 * 4 + 1
    assert len([m for m in model.modules() if isinstance(m, FactorNorm)]) == 3 * 2 + 1
    assert {f"blocks.{i}.attn" for i in range(3)} <= set(applied.changed)
    assert (found - expected).norm() < 0.3 * expected.norm()
    with pytest.raises(NotQuantisable, match="once only"):
        convert(model)


def test_factors_are_finer_than_one_scale() -> None:
    torch.manual_seed(0)
    rows = torch.randn(256, 32)
    rows[:, 3] *= 30  # a channel as ViTs have them
    norm, seen = nn.LayerNorm(32), ChannelRange(keep_rows=True)
    seen.see(rows)
    errors = []
    for use in (True, False):
        part = FactorNorm(norm, 32)
        part.fix(seen, use_factors=use)
        errors.append(float((part(rows) - norm(rows)).detach().norm()))
    assert errors[0] < 0.3 * errors[1]


def test_not_a_number_names_the_layer() -> None:
    model = vit()
    model.blocks[1].norm2.weight.data[2] = 3e38  # finite, but not what the norm gives out
    with pytest.raises(NotQuantisable, match=r"the input of blocks\.1\.mlp\.fc1 holds NaN"):
        convert(model)


def test_low_rank_attention_keeps_its_mixing() -> None:
    model = vit()
    nystrom.TECHNIQUE.apply(model, nystrom.Config(landmarks=8), surroundings(model))
    applied = convert(model)
    assert type(model.blocks[0].attn).__name__ == "NystromAttention"
    assert isinstance(model.blocks[0].attn.qkv, IntegerLinear)
    assert "blocks.0.attn" not in applied.changed


@pytest.mark.parametrize("merging", [False, True])
def test_artefact_reloads_bit_exactly_and_calibration_repeats_itself(merging: bool, tmp_path: Path) -> None:
    merger: list[Step] = [("tome", {"r": 3})] if merging else []
    require_reload([*merger, ("fq_vit", {"images": 64})], tmp_path / "a")


def test_the_row_is_simulated_and_there_is_one_quantiser() -> None:
    assert fq_vit.TECHNIQUE.simulated(Config(), "cpu")
    assert not composition.verdict("fq_vit", "dynamic_int8").allowed
    assert composition.verdict("fq_vit", "tome").allowed
