"""fq_vit: factors, log2 codes and log-int-softmax against their definitions, sizes of merged tokens, what is calibrated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.workers.techniques.models import images, surroundings, vit
from tests.workers.techniques.quantised import Step, error_of, require_reload, with_large_channels
from workers.techniques import composition
from workers.techniques.low_rank import nystrom
from workers.techniques.quantisation import fq_vit, smoothquant, static_int8
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


def rounded(rows: torch.Tensor, scale: float, zero: int, power: torch.Tensor) -> torch.Tensor:
    step = scale * 2.0 ** power.float()
    return ((rows / step + zero).round().clamp(0, 255) - zero) * step


def test_each_channel_gets_the_factor_of_its_range() -> None:
    torch.manual_seed(0)
    rows = (torch.rand(4000, 5) * 2 - 1) * torch.tensor([8.0, 3.9, 1.9, 0.9, 0.1])
    low, high = rows.amin(0), rows.amax(0)
    scale, zero, power = choose_factors(low, high)
    assert scale == pytest.approx(float(high.max() - low.min()) / 255 / 8)
    assert zero == round(-float(low.min()) / (8 * scale))
    assert power.tolist() == [3, 2, 1, 0, 0]


@pytest.mark.parametrize("rare", [0, 1, 5])
def test_no_factor_clips_and_none_that_does_not_is_finer(rare: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(520, 64) * torch.rand(64) * 3 + torch.randn(64)
    rows[torch.arange(rare) * 97 + 3] *= 50
    scale, zero, power = choose_factors(rows.amin(0), rows.amax(0))
    error = (rounded(rows, scale, zero, power) - rows).abs()
    assert (error <= 0.5001 * scale * 2.0 ** power.float()).all()
    for smaller in range(3):
        clips = (rounded(rows, scale, zero, torch.full((64,), smaller)) - rows).abs().amax(
            0
        ) > 0.5001 * scale * 2**smaller
        assert torch.equal(clips, power > smaller)


def test_constant_channels_have_a_factor_and_a_value() -> None:
    row = torch.tensor([0.0, 1.0, -2.0])
    found = choose_factors(row, row)
    assert torch.allclose(rounded(row, *found), row, atol=3 / 255 / 2)
    assert choose_factors(torch.zeros(2), torch.zeros(2))[2].tolist() == [0, 0]


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
    part, seen = FactorNorm(norm, 4), ChannelRange()
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
    norm, seen = nn.LayerNorm(32), ChannelRange()
    seen.see(rows)
    errors = []
    for use in (True, False):
        part = FactorNorm(norm, 32)
        part.fix(seen, use_factors=use)
        errors.append(float((part(rows) - norm(rows)).detach().norm()))
    assert errors[0] < 0.3 * errors[1]


@pytest.mark.parametrize("rare", [0, 1, 3])
def test_factors_are_no_coarser_on_any_token_than_one_scale(rare: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 13, 32)  # 520 tokens, as many as a small batch has
    for image in range(rare):
        x[image * 7, 5 * image % 13] *= 40
    norm, seen = nn.LayerNorm(32), ChannelRange()
    seen.see(x)
    part, errors = FactorNorm(norm, 32), []
    for use in (True, False):
        part.fix(seen, use_factors=use)
        errors.append((part(x) - norm(x)).detach().square().mean(-1).sqrt())
    assert errors[0].mean() <= errors[1].mean()
    assert errors[0].max() < 1.5 * errors[1].max()


def test_large_channels_behind_the_norms_are_for_smoothquant_to_repair() -> None:
    """Factors are for what comes into a norm; what it gives out has one scale a layer, as in static_int8."""

    def smooth(model: Any) -> Any:
        return smoothquant.TECHNIQUE.apply(model, smoothquant.Config(images=64), surroundings(model))

    def static(model: Any) -> Any:
        return static_int8.TECHNIQUE.apply(model, static_int8.Config(images=64), surroundings(model))

    off = [error_of(with_large_channels(), way) for way in (smooth, static, lambda m: convert(m, attention_bits=8))]
    assert off[0] < 0.2 * off[1]
    assert off[2] > 0.5 * off[1]


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
