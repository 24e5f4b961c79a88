"""repq_vit: reparameterisations exact before quantisation and code by code, the map in powers of sqrt 2, bad numbers, reloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.workers.techniques.models import VARIANTS, surroundings, vit
from tests.workers.techniques.quantised import (
    error_of,
    merging_with_performer,
    require_exact,
    require_reload,
    with_large_channels,
)
from workers.techniques import composition
from workers.techniques.low_rank import performer
from workers.techniques.quantisation import repq_vit
from workers.techniques.quantisation.repq_vit import (
    Config,
    LowBitLinear,
    MapQuantiser,
    channel_scales,
    from_log2,
    reparameterise,
    reparameterise_,
    sqrt2_codes,
)
from workers.techniques.quantisation.shared_affine import NotQuantisable, packed_bytes
from workers.techniques.quantisation.shared_quantised_attention import QuantisedAttention


def convert(model: nn.Module, **config: Any) -> Any:
    return repq_vit.TECHNIQUE.apply(model, Config(**config), surroundings(model))


# --- mathematics ------------------------------------------------------------------------------------------------------


def test_scales_of_channels_by_hand() -> None:
    scale, zero = channel_scales(torch.tensor([-1.5, 0.0, 3.0]), torch.tensor([6.0, 15.0, 6.0]), 4)
    torch.testing.assert_close(scale, torch.tensor([0.5, 1.0, 0.2]))
    assert zero.tolist() == [3.0, 0.0, -15.0]  # the last range leaves out zero
    new = reparameterise(torch.tensor([0.5, 1.5]), torch.tensor([3.0, 8.0]), 4)
    assert (new.scale, new.zero) == (1.0, 6)  # 5.5 to even
    assert new.factor.tolist() == [0.5, 1.5]
    assert new.shift.tolist() == [0.5 * (3 - 6), 1.5 * (8 - 6)]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_scale_for_the_layer_has_the_codes_of_those_for_the_channels(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 24, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-1, 1.5, 24).double() + torch.linspace(-5, 5, 24).double()
    scale, zero = channel_scales(x.amin(0).float(), x.amax(0).float(), bits)
    new = reparameterise(scale, zero, bits)
    assert 0 <= new.zero < 2**bits
    top = 2**bits - 1
    channelwise = (x / scale.double() + zero.double()).round().clamp(0, top)
    moved = (x + new.shift.double()) / new.factor.double()
    layerwise = (moved / new.scale + new.zero).round().clamp(0, top)
    # Halves may fall to the other side: factors are float32.
    assert (channelwise != layerwise).double().mean() < 1e-3
    assert channelwise.unique().numel() > 0.9 * 2**bits


def test_constant_channels_have_a_scale() -> None:
    low = torch.tensor([0.0, 4.0, -1.0])
    scale, zero = channel_scales(low, torch.tensor([0.0, 4.0, 1.0]), 4)
    assert (scale >= 0.01 * (2 / 15 / 3) * 0.999).all()
    values = (torch.clamp((low / scale + zero).round(), 0, 15) - zero) * scale
    assert ((values - low).abs() <= scale / 2 + 1e-6).all()
    scale, zero = channel_scales(torch.zeros(3), torch.zeros(3), 4)
    assert (scale > 0).all()
    assert not zero.any()


def test_codes_in_powers_of_sqrt_2_by_hand() -> None:
    p = torch.tensor([1.0, 2**-0.5, 0.5, 0.42, 2**-7.5, 2**-8.0, 0.0])
    codes = sqrt2_codes(p, 1.0)
    assert codes.tolist() == [0, 1, 2, 3, 15, 16, float("inf")]  # 0.42 = 2^-1.25 is 2.5: 3 by a hair
    expected = torch.tensor([1.0, 2**-0.5, 0.5, 2**-1.5, 2**-7.5, 0.0, 0.0])
    torch.testing.assert_close(from_log2(codes, 1.0, 4), expected, rtol=1e-6, atol=0)
    assert sqrt2_codes(torch.tensor([0.9]), 0.6).tolist() == [0.0]  # above the largest that was seen


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_powers_of_two_and_two_scales_are_powers_of_sqrt_2(scale: float) -> None:
    codes = torch.arange(64).float()
    torch.testing.assert_close(from_log2(codes, scale, 6), scale * 2 ** (-codes / 2), rtol=1e-6, atol=0)
    shifts = from_log2(codes, 1.0, 6)[0::2].log2()
    assert torch.equal(shifts, shifts.round())  # even codes are shifts by themselves


def test_map_quantiser_takes_the_largest_weight() -> None:
    part = MapQuantiser(4)
    part.fix(0.0, 0.8)
    assert part(torch.tensor([0.8, 0.4, 0.001])).tolist() == pytest.approx([0.8, 0.4, 0.0])


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_reparameterisation_is_exact_before_quantisation(variant: str, qkv_bias: bool) -> None:
    model = vit(variant, qkv_bias=qkv_bias)
    fixed, norms, biased = require_exact(model, lambda model: reparameterise_(model, 4, surroundings(model), 16), 5e-5)
    assert norms == [f"blocks.{i}.{norm}" for i in range(3) for norm in ("norm1", "norm2")]
    assert biased == ([] if qkv_bias else [f"blocks.{i}.attn.qkv" for i in range(3)])
    assert set(fixed) == {f"blocks.{i}.{reader}" for i in range(3) for reader in ("attn.qkv", "mlp.fc1")}


def test_reparameterisation_is_exact_in_blocks_that_merge_and_attend_otherwise() -> None:
    require_exact(merging_with_performer(), lambda model: reparameterise_(model, 6, surroundings(model), 16), 5e-5)


def test_outputs_of_norms_fill_the_codes_of_one_scale() -> None:
    """Channels a hundred times apart are all spread over the codes, where one scale on the plain outputs would lose the small ones."""
    model = vit()
    norm = model.blocks[0].norm1
    norm.weight.data[:4] *= 100
    kept: list[torch.Tensor] = []
    fixed, _, _ = reparameterise_(model, 4, surroundings(model), 16)
    norm.register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.no_grad():
        model(next(iter(surroundings(model).batches()))[0])
    scale, zero = fixed["blocks.0.attn.qkv"]
    codes = (kept[0] / scale + zero).round().clamp(0, 15).flatten(0, 1)
    assert min(len(channel.unique()) for channel in codes.T) >= 8


def test_closer_than_without_reparameterisation(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for use in (True, False):
        if not use:
            monkeypatch.setattr(repq_vit, "pairs", lambda model: [])
        errors.append(error_of(with_large_channels(), lambda model: convert(model, weight_bits=8, activation_bits=8)))
    assert errors[0] < 0.5 * errors[1]


def test_parts_of_a_model_and_their_bytes() -> None:
    model = vit()
    applied = convert(model, weight_bits=3, activation_bits=4)
    layers = [m for m in model.modules() if isinstance(m, LowBitLinear)]
    assert len(layers) == 13
    assert len([m for m in model.modules() if isinstance(m, QuantisedAttention)]) == 3
    for layer in layers:
        assert layer.weight.shape == (layer.out_features, packed_bytes(layer.in_features, 3))
        assert layer.weight.dtype == torch.uint8
    assert "blocks.0.norm1" in applied.changed
    assert not [p for layer in layers for p in layer.parameters()]


def test_low_rank_attention_and_norms_without_a_bias_keep_what_they_are() -> None:
    model: Any = vit()
    model.blocks[1].norm1 = nn.RMSNorm(32)
    performer.TECHNIQUE.apply(model, performer.Config(), surroundings(model))
    applied = convert(model)
    assert "blocks.1.norm1" not in applied.changed
    assert type(model.blocks[0].attn).__name__ == "PerformerAttention"
    assert isinstance(model.blocks[0].attn.qkv, LowBitLinear)


def test_not_a_number_and_a_second_quantisation_are_refused() -> None:
    model = vit()
    model.blocks[1].norm2.weight.data[2] = 3e38  # finite, but not what the norm gives out
    with pytest.raises(NotQuantisable, match=r"the input of blocks\.1\.mlp\.fc1 holds NaN"):
        convert(model)
    model = vit()
    convert(model)
    with pytest.raises(NotQuantisable, match="once only"):
        convert(model)
    assert not composition.verdict("repq_vit", "gptq").allowed
    assert repq_vit.TECHNIQUE.simulated(Config(), "cpu")


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 4), (6, 8), (8, 6)])
def test_artefact_reloads_bit_exactly_and_calibration_repeats_itself(
    weight_bits: int, activation_bits: int, tmp_path: Path
) -> None:
    config = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    require_reload([("repq_vit", config)], tmp_path / "a", embed_dim=40)
