"""RepQ-ViT: quantisers that suit the data at calibration are rewritten into ones that suit the hardware, exactly.

Source: Li et al., RepQ-ViT, arXiv 2212.08254, section 3: LayerNorm's outputs, where a scale a channel becomes one a layer, and
softmax, where powers of sqrt 2 become powers of two.
Differs from the paper: attention weights below the smallest code are 0, as in FQ-ViT, instead of the smallest code; ranges are
percentiles, those behind norms extremes; weights are rounded to nearest; the patch embedding stays; a norm without a bias cannot take up the
shifts and its readers have one scale from the start; attentions without a map keep their mixing.

All linear layers have weights and inputs of few bits; queries, keys, values and the attention map as many as the inputs. The weights are
bit-packed; no kernel here takes such activations, so the row is ``simulated``: its speed is the unquantised model's. Costs: two passes over
few images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.quantisation.shared_affine import bias_like, linears
from workers.techniques.quantisation.shared_calibration import (
    EPS,
    ChannelRange,
    TensorRange,
    asymmetric,
    running,
    watch,
)
from workers.techniques.quantisation.shared_norm_folding import Pair, add_biases, fold_, folding_fault, pairs
from workers.techniques.quantisation.shared_quantised_attention import (
    RangeQuantiser,
    UniformQuantiser,
    attention_fault,
    quantisers,
    replace_attention,
)
from workers.techniques.quantisation.weight_only import GroupedLinear
from workers.techniques.record import Applied, ModelInfo, Surroundings, Technique, choice

LEAST = 0.01
"""Smallest scale of a channel, of the mean of all: a constant channel has no range of its own, and a factor must not explode."""


@dataclass(frozen=True)
class Config:
    """Bits of weights and of activations, and from how many images they are calibrated."""

    weight_bits: int = choice(6, (8, 6, 5, 4, 3), search=(8, 6, 4), doc="bits a weight")
    activation_bits: int = choice(6, (8, 6, 5, 4), search=(8, 6, 4), doc="bits of activations and of the attention map")
    percentile: float = choice(
        99.99, (99.0, 99.9, 99.99, 99.999, 100.0), search=(99.99,), doc="% of the values in the range, but behind norms"
    )
    images: int = choice(32, (32, 64, 128, 256), search=(32,), doc="training images to calibrate on")
    skip_head: bool = choice(False, (False, True), search=(False,), doc="leave the classifier heads unquantised")


# --- mathematics ------------------------------------------------------------------------------------------------------


def channel_scales(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns scale and zero point of each channel, (C,) float32 each: ``x ~ (q - zero) * scale``, q from 0 to 2^bits - 1.

    The zero point of a channel whose range leaves out zero lies outside the codes.
    """
    scale = (high - low) / (2**bits - 1)
    scale = scale.clamp_min(max(LEAST * float(scale.mean()), EPS))
    return scale, (-low / scale).round()


@dataclass(frozen=True)
class Reparameterised:
    """One scale and zero point for a layer, and what makes them compute what those of the channels did.

    Attributes:
        scale: mean of the channels'; zero: mean of the channels', held to the codes that there are.
        factor: (C,) scale of the channel over ``scale``; shift: (C,) scale times difference of the zero points.
    """

    scale: float
    zero: int
    factor: Tensor
    shift: Tensor


def reparameterise(scale: Tensor, zero: Tensor, bits: int) -> Reparameterised:
    """Turns scales and zero points of channels, (C,) each, into those of a layer: (x + shift) / factor has the same codes as x."""
    one = float(scale.mean())
    middle = min(max(round(float(zero.mean())), 0), 2**bits - 1)
    return Reparameterised(one, middle, scale / one, scale * (zero - middle))


def sqrt2_codes(p: Tensor, scale: Tensor | float) -> Tensor:
    """Returns round(-2 log2(p / scale)), at least 0: codes in powers of sqrt 2; infinite for 0."""
    return (-2 * (p / scale).log2()).round().clamp_min(0)


def from_log2(codes: Tensor, scale: Tensor | float, bits: int) -> Tensor:
    """Returns scale * 2^(-q / 2) as a shift by ceil(q / 2) and one of two scales, odd codes having sqrt 2 times the other.

    Codes of 2^bits and more, which do not fit, are 0; NaN stays NaN.
    """
    odd = codes % 2
    value = torch.exp2(-((codes + odd) / 2)) * (scale * (1 + odd * (2**0.5 - 1)))
    return torch.where(codes >= 2**bits, 0.0, value)


# --- modules ----------------------------------------------------------------------------------------------------------


class MapQuantiser(RangeQuantiser):
    """Rounds attention weights to powers of sqrt 2 of the largest one seen, ``scale`` () float32."""

    scale: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.empty((), device="meta"))

    def fix(self, low: float, high: float) -> None:
        self.scale = torch.tensor(max(high, EPS), dtype=torch.float32)
        self.calibrating = False

    def forward(self, p: Tensor) -> Tensor:
        """p: (B, H, N, N) float32 -> the same, rounded."""
        return p if self.calibrating else from_log2(sqrt2_codes(p, self.scale), self.scale, self.bits)


class QuantisedSoftmax(nn.Module):
    """Softmax, then :class:`MapQuantiser`."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.map = MapQuantiser(bits)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, N, N) logits -> weights, float32."""
        return self.map(x.float().softmax(-1))  # type: ignore[no-any-return]


class LowBitLinear(GroupedLinear):
    """x W^T + b with packed weights, one scale a row, and inputs rounded by ``inputs``."""

    def __init__(self, linear: Any, weight_bits: int, input_bits: int) -> None:
        super().__init__(
            linear.in_features, linear.out_features, bias=linear.bias is not None,
            kernel="dequantise", bits=weight_bits, group_size=None,
        )  # fmt: skip
        self.bias = bias_like(linear)
        self.inputs = UniformQuantiser(input_bits)
        self.arithmetic = "int8"  # a last bit may move an activation by a step; see workers.artefact.parity

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) any floating type -> (..., O) same type."""
        return super().forward(self.inputs(x))


# --- record -----------------------------------------------------------------------------------------------------------


def _shifted(model: nn.Module) -> list[Pair]:
    """Returns the norms of the blocks whose outputs can be shifted, with their readers."""
    return [pair for pair in pairs(model) if getattr(model.get_submodule(pair.norm), "bias", None) is not None]


def reparameterise_(
    model: nn.Module, bits: int, surroundings: Surroundings, images: int
) -> tuple[dict[str, tuple[float, int]], list[str], list[str]]:
    """Gives every norm of the blocks outputs that one scale suits, and lets its readers take it back; nothing else changes.

    Returns:
        scale and zero point of each reader's input; names of the norms; names of readers that got a bias.
    """
    found = _shifted(model)
    seen: dict[Pair, ChannelRange] = {pair: ChannelRange() for pair in found}
    ran = watch(model, {pair.readers[0]: channels.see for pair, channels in seen.items()}, surroundings, images)
    fixed: dict[str, tuple[float, int]] = {}
    norms, biased = [], []
    for pair in found:
        if pair.readers[0] not in ran:
            continue
        new = reparameterise(*channel_scales(*seen[pair].range(), bits), bits)
        biased += add_biases(model, pair.readers)
        fold_(model, pair, new.factor, new.shift)
        norms.append(pair.norm)
        fixed |= dict.fromkeys(pair.readers, (new.scale, new.zero))
    return fixed, norms, biased


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Reparameterises the norms, calibrates everything else, and replaces the linear layers."""
    found = linears(model, skip_head=config.skip_head)
    bits = config.activation_bits
    fixed, norms, biased = reparameterise_(model, bits, surroundings, config.images)
    attentions = replace_attention(model, lambda: QuantisedSoftmax(bits), bits)
    maps: dict[str, RangeQuantiser] = dict(quantisers(model))
    for quantiser in maps.values():
        quantiser.calibrating = True
    # The largest attention weight is a value of its own, no outlier.
    percentiles = {name: 100.0 if isinstance(q, MapQuantiser) else config.percentile for name, q in maps.items()}
    percentiles |= dict.fromkeys(found, config.percentile)
    ranges = {name: TensorRange(percentile) for name, percentile in percentiles.items()}
    ran = watch(model, {name: seen.see for name, seen in ranges.items()}, surroundings, config.images)
    for name, quantiser in maps.items():
        quantiser.fix(*ranges[name].range())
        quantiser.to(surroundings.device)
    names = [name for name in found if name in ran]
    for name in names:
        layer = LowBitLinear(found[name], config.weight_bits, bits)
        layer.quantise_(found[name].weight)
        if found[name].bias is not None:
            layer.bias = found[name].bias.detach().clone()
        layer.inputs.put(*(fixed[name] if name in fixed else asymmetric(*ranges[name].range(), bits)))
        layer.inputs.to(surroundings.device)
        model.set_submodule(name, layer)
    return Applied(model, _resolved(config, biased, names), [*norms, *attentions, *names])


def _resolved(config: Config, biased: list[str], names: list[str]) -> dict[str, Any]:
    bits = {"weight_bits": config.weight_bits, "activation_bits": config.activation_bits}
    return {**bits, "biased": biased, "linears": names}


def _foresee(model: nn.Module, config: Config, surroundings: Surroundings) -> dict[str, Any]:
    found = linears(model, skip_head=config.skip_head)
    names = running(model, found, surroundings)
    readers = [name for pair in _shifted(model) if pair.readers[0] in names for name in pair.readers]
    return _resolved(config, [name for name in readers if found[name].bias is None], names)


def _check(info: ModelInfo, config: Config) -> str | None:
    """Returns why the model cannot be quantised so, or None."""
    return attention_fault(info) or folding_fault(info)


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Replaces the same parts of a skeleton by parts without values."""
    bits = resolved["activation_bits"]
    add_biases(model, resolved["biased"])
    replace_attention(model, lambda: QuantisedSoftmax(bits), bits)
    for name in resolved["linears"]:
        model.set_submodule(name, LowBitLinear(model.get_submodule(name), resolved["weight_bits"], bits))
    return model


def _simulated(config: Config, device: str) -> bool:
    return True


TECHNIQUE = Technique(
    name="repq_vit",
    family="quantisation",
    version=2,
    Config=Config,
    stage="conversion",
    apply=_apply,
    rebuild=_rebuild,
    foresee=_foresee,
    check=_check,
    simulated=_simulated,
    source="RepQ-ViT, arXiv 2212.08254, section 3",
)
