"""FQ-ViT: 8-bit weights and activations, LayerNorm inputs with a power-of-two factor a channel, softmax in powers of two.

Source: Lin et al., FQ-ViT, arXiv 2111.13824, its Power-of-Two Factor (PTF) and Log-Int-Softmax (LIS); i-exp: Kim et al., I-BERT,
arXiv 2101.01321, its integer-only softmax.
Differs from the paper: the patch embedding, the outputs of GELU's and residual additions, and the arithmetic inside the norms stay
in the model's type (every linear layer quantises its input all the same); ranges are extremes; attentions without a map, of the
low-rank techniques, keep their own mixing and only their linear layers and norms are quantised; a channel's factor is the smallest that
clips nothing of what calibration saw, where the paper weighs clipping against rounding by the squared error.

Attention: queries, keys and values of 8 bits; the logits, the log sizes of merged tokens already added, of 8 bits; then
softmax in integers, its result 4-bit codes q that stand for 2^-q, so that the product with the values is a shift. No hardware here
has that product as a kernel, so the row is ``simulated``: its size is real, its speed is the unquantised model's.
Costs: an explicit attention map of N by N while accuracy is evaluated. Saves: 3.8x of the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.quantisation.shared_affine import linears
from workers.techniques.quantisation.shared_calibration import ChannelRange, TensorRange, asymmetric, running, watch
from workers.techniques.quantisation.shared_integer_linear import IntegerLinear
from workers.techniques.quantisation.shared_quantised_attention import (
    RangeQuantiser,
    UniformQuantiser,
    attention_fault,
    quantisers,
    replace_attention,
)
from workers.techniques.record import Applied, ModelInfo, Rule, Surroundings, Technique, choice

EXP = (0.35815147, 0.96963238, 1.0)
"""exp(p) ~ a p^2 + b p + c for p in (-ln 2, 0]: the polynomial of I-BERT, multiplied out."""

EXP_SHIFT = 30
"""n of I-BERT's i-exp: exp is held in steps of 2^-30, and logits more than 30 ln 2 below the largest count as that."""

POWERS = 4
"""Factors of a channel are 1, 2, 4 and 8."""


@dataclass(frozen=True)
class Config:
    """What of FQ-ViT is done (its ablations), and from how many images it is calibrated."""

    attention_bits: int = choice(4, (4, 8), search=(4,), doc="bits of the attention map, in powers of two")
    softmax: str = choice(
        "log_int", ("log_int", "log2"), search=("log_int",), doc="softmax in integers, or floating and then rounded"
    )
    power_of_two_factor: bool = choice(
        True,
        (True, False),
        search=(True,),
        doc="a factor 1, 2, 4 or 8 for each channel of LayerNorm inputs; else one scale",
    )
    images: int = choice(1000, (64, 128, 256, 512, 1000), search=(1000,), doc="training images to calibrate on")
    skip_head: bool = choice(False, (False, True), search=(False,), doc="leave the classifier heads unquantised")


# --- mathematics ------------------------------------------------------------------------------------------------------


def log2_codes(p: Tensor) -> Tensor:
    """Returns round(-log2 p) of p in (0, 1]; infinite for 0."""
    return (-p.log2()).round()


def powers_of_two(codes: Tensor, bits: int) -> Tensor:
    """Returns 2^-q, and 0 for codes q of 2^bits and more: what a map of that many bits can say. NaN stays NaN."""
    return torch.where(codes >= 2**bits, 0.0, torch.exp2(-codes))


def int_exp(x: Tensor, scale: Tensor | float) -> Tensor:
    """Returns integers in proportion to exp(x * scale), calculated in integers.

    exp(x s) = 2^-q exp(r s) with q = floor(x s / -ln 2); the rest r s in (-ln 2, 0] goes through the polynomial :data:`EXP`.

    Args:
        x: (...) whole numbers, 0 and below, as float32: products are exact up to 24 bits times a power of two.
    """
    a, b, c = EXP
    scale = torch.as_tensor(scale, dtype=torch.float64)
    ln2 = torch.floor(-math.log(2) / scale).float()
    linear, constant = torch.floor(b / (a * scale)).float(), torch.floor(c / (a * scale * scale)).float()
    x = x.clamp_min(EXP_SHIFT * ln2)
    q = torch.floor(x / ln2)
    rest = x - ln2 * q
    return torch.ldexp(((rest + linear) * rest + constant).clamp_min(0).floor(), EXP_SHIFT - q)


def log_int_softmax(x: Tensor, scale: Tensor | float) -> Tensor:
    """Returns codes q (..., N) float32 with 2^-q close to softmax(x * scale), calculated in integers.

    The integer ratio sum / exp is rounded, and its logarithm is the position of its leading bit, plus one where the next bit is
    set too: rounding at 1.5 times a power of two.

    Args:
        x: (..., N) whole numbers, float32; a row with a NaN in it has NaN codes.
    """
    exp = int_exp(x - x.amax(-1, keepdim=True), scale)
    ratio = (exp.sum(-1, keepdim=True, dtype=torch.float64).float() / exp).round()
    leading = ratio.log2().floor()
    leading = leading - (torch.exp2(leading) > ratio).float()  # log2 rounds up just below a power of two
    codes = leading + (ratio >= 1.5 * torch.exp2(leading)).float()
    return torch.where(exp == 0, torch.inf, codes)


def choose_factors(low: Tensor, high: Tensor) -> tuple[float, int, Tensor]:
    """Chooses each channel's factor: the smallest that holds all that the channel was seen to hold.

    The multiples of a factor's step are among those of half the step, so no larger factor is closer to any value, and a smaller one
    clips. Squared errors over a sample of tokens would choose that too, where the sample is too small for the rare tokens.

    Args:
        low, high: (C,) range of each channel over all tokens.

    Returns:
        scale of factor 1, which is an eighth of the 8-bit scale of the whole range; zero point, shared; powers (C,) uint8 from 0
        to 3.
    """
    whole, zero = asymmetric(float(low.min()), float(high.max()))
    scale = whole / 2 ** (POWERS - 1)
    # The largest factor holds the whole range by definition, whatever the last bit of a division says.
    power = torch.full(low.shape, POWERS - 1, dtype=torch.uint8, device=low.device)
    for smaller in reversed(range(POWERS - 1)):
        step = scale * 2**smaller
        holds = ((low / step + zero).round() >= 0) & ((high / step + zero).round() <= 255)
        power = torch.where(holds, smaller, power)
    return scale, zero, power


# --- modules ----------------------------------------------------------------------------------------------------------


class FactorNorm(nn.Module):
    """A norm whose input has a scale a channel: ``scale`` () times 2^``power`` (C,), and one zero point."""

    scale: Tensor
    zero: Tensor
    power: Tensor

    def __init__(self, norm: nn.Module, channels: int) -> None:
        super().__init__()
        self.norm = norm
        self.calibrating = False
        self.register_buffer("scale", torch.empty((), device="meta"))
        self.register_buffer("zero", torch.empty((), dtype=torch.uint8, device="meta"))
        self.register_buffer("power", torch.empty(channels, dtype=torch.uint8, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C) -> its norm, (..., C)."""
        if self.calibrating:
            return self.norm(x)  # type: ignore[no-any-return]
        step = torch.ldexp(self.scale, self.power.float())
        codes = (x.float() / step + self.zero).round_().clamp_(0, 255)
        return self.norm(((codes - self.zero) * step).to(x.dtype))  # type: ignore[no-any-return]

    def fix(self, seen: ChannelRange, use_factors: bool) -> None:
        """Chooses scale, zero point and factors."""
        scale, zero, power = choose_factors(*seen.range())
        if not use_factors:
            power.fill_(POWERS - 1)
        self.scale = torch.tensor(scale, dtype=torch.float32, device=power.device)
        self.zero = torch.tensor(zero, dtype=torch.uint8, device=power.device)
        self.power, self.calibrating = power, False


class LogIntSoftmax(nn.Module):
    """Softmax of logits in integers, or floating, and its result in powers of two."""

    def __init__(self, bits: int, integers: bool) -> None:
        super().__init__()
        self.bits, self.integers = bits, integers
        self.logits = UniformQuantiser(8)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, N, N) logits -> (B, H, N, N) float32 weights, 0 or powers of two."""
        if self.logits.calibrating:
            return self.logits(x).float().softmax(-1)  # type: ignore[no-any-return]
        if self.integers:
            return powers_of_two(log_int_softmax(self.logits.codes(x), self.logits.scale), self.bits)
        return powers_of_two(log2_codes(self.logits(x).float().softmax(-1)), self.bits)


# --- record -----------------------------------------------------------------------------------------------------------


def _norms(model: nn.Module) -> list[str]:
    """Returns the names of the norms of the residual stream: two a block, and those after the blocks."""
    vit: Any = model
    names = [f"blocks.{i}.{norm}" for i in range(len(vit.blocks)) for norm in ("norm1", "norm2")]
    after = [name for name in ("norm", "fc_norm") if not isinstance(getattr(vit, name, nn.Identity()), nn.Identity)]
    return names + after


def _structure(model: nn.Module, norms: list[str], channels: int, config: Mapping[str, Any]) -> list[str]:
    """Puts norms and attentions into the model; returns the names of the attentions."""
    for name in norms:
        model.set_submodule(name, FactorNorm(model.get_submodule(name), channels))
    bits, integers = config["attention_bits"], config["softmax"] == "log_int"
    return replace_attention(model, lambda: LogIntSoftmax(bits, integers), 8)


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Puts in the quantisers, calibrates them all in one pass over the images, and replaces the linear layers."""
    vit: Any = model
    found = linears(model, skip_head=config.skip_head)
    norms = _norms(model)
    kept = _kept(config)
    attentions = _structure(model, norms, vit.embed_dim, kept)
    maps: dict[str, RangeQuantiser] = dict(quantisers(model))
    ranges = {name: TensorRange() for name in [*found, *maps]}
    channels = {name: ChannelRange() for name in norms}
    factor_norms: dict[str, Any] = {name: model.get_submodule(name) for name in norms}
    for part in (*maps.values(), *factor_norms.values()):
        part.calibrating = True
    watchers = {name: seen.see for name, seen in ranges.items()} | {name: seen.see for name, seen in channels.items()}
    ran = watch(model, watchers, surroundings, config.images)
    for name, quantiser in maps.items():
        quantiser.fix(*ranges[name].range())
        quantiser.to(surroundings.device)
    for name, norm in factor_norms.items():
        norm.fix(channels[name], config.power_of_two_factor)
    names = [name for name in found if name in ran]
    for name in names:
        model.set_submodule(name, IntegerLinear.of(found[name], *asymmetric(*ranges[name].range())))
    resolved = {**kept, "norms": norms, "channels": vit.embed_dim, "linears": names}
    return Applied(model, resolved, [*attentions, *norms, *names])


def _kept(config: Config) -> dict[str, Any]:
    return {"attention_bits": config.attention_bits, "softmax": config.softmax}


def _foresee(model: nn.Module, config: Config, surroundings: Surroundings) -> dict[str, Any]:
    vit: Any = model
    names = running(model, linears(model, skip_head=config.skip_head), surroundings)
    return {**_kept(config), "norms": _norms(model), "channels": vit.embed_dim, "linears": names}


def _check(info: ModelInfo, config: Config) -> str | None:
    """Returns why the model cannot be quantised so, or None."""
    return attention_fault(info)


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Replaces the same parts of a skeleton by parts without values."""
    _structure(model, resolved["norms"], resolved["channels"], resolved)
    for name in resolved["linears"]:
        model.set_submodule(name, IntegerLinear.like(model.get_submodule(name), "static"))
    return model


def _simulated(config: Config, device: str) -> bool:
    return True


TECHNIQUE = Technique(
    name="fq_vit",
    family="quantisation",
    version=2,
    Config=Config,
    stage="conversion",
    apply=_apply,
    rebuild=_rebuild,
    foresee=_foresee,
    check=_check,
    simulated=_simulated,
    rules=(
        Rule(
            ("tome", "pitome"),
            "allowed",
            "log size is added before the logits are quantised, calibrated after the merging",
        ),
    ),
    source="FQ-ViT, arXiv 2111.13824, Power-of-Two Factor and Log-Int-Softmax",
)
