"""fp8: linear layers hold weights of 8-bit floating point, activations are rounded to it as they come, the product is one of both.

Source: the format E4M3 (four bits of exponent, three of mantissa, no infinity, at most 448): Micikevicius et al., FP8 Formats for
Deep Learning, arXiv 2209.05433; that it holds what int8 holds, and outliers better: Kuzmin et al., FP8 Quantization: The Power of
the Exponent, arXiv 2208.09225.
Differs from the papers: one scale a row of the weight and one a token, where they have one a tensor; activations that are not
inputs of a linear layer, and the patch embedding, stay as they are; E5M2, the format for gradients, is not used.

Steps are relative, 1/16 of a value at most, so a large channel costs small ones nothing: no calibration, no smoothing, and an
image's result does not depend on the others in its batch. Weights are as large as int8's, about 3.8x smaller than float32.
CUDA of compute capability 8.9 or later multiplies the two as they are (``torch._scaled_mm``, scales applied in it, sums in
float32, results in bfloat16). Elsewhere the row is ``simulated``: torch 2.15 has the operator on the CPU too, but converts both
sides to float32 in it and took 4 to 15 times as long as float32 (a layer of 384 to 1536, 17 and 197 tokens, one AVX-512 core).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.quantisation.shared_affine import KernelLinear, bias_like, linears
from workers.techniques.quantisation.shared_calibration import EPS
from workers.techniques.quantisation.shared_packed_embeddings import pack_embeddings, rebuild_embeddings
from workers.techniques.quantisation.weight_only import int8_table, packed, packed_later
from workers.techniques.record import Applied, Surroundings, Technique, choice

LARGEST = 448.0
"""Of E4M3: 1.75 * 2^8."""

SMALLEST_EXPONENT = -6
"""Below 2^-6 the steps of E4M3 grow no finer: they stay at 2^-9."""

MULTIPLE = 16
"""Of O and I that ``torch._scaled_mm`` takes on CUDA."""


@dataclass(frozen=True)
class Config:
    """Whether the head and a text encoder's words are left alone."""

    skip_head: bool = choice(False, (False, True), search=(False,), doc="leave the classifier heads unquantised")
    embeddings: bool = choice(
        True, (True, False), search=(True,), doc="pack a text encoder's word embeddings as well, int8, one scale a row"
    )


def has_kernel() -> bool:
    """Whether the CUDA device here multiplies E4M3: Ada, Hopper and later. AMD's have a format of their own by that name."""
    if not torch.cuda.is_available() or torch.version.hip is not None or not hasattr(torch, "_scaled_mm"):
        return False
    return torch.cuda.get_device_capability() >= (8, 9)


# --- numbers ----------------------------------------------------------------------------------------------------------


def encoded(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds to E4M3, the largest of each row to 448: ``values ~ codes * scale``, at most 1/16 of a value off.

    Args:
        values: (..., I) float32.

    Returns:
        codes (..., I) float8_e4m3fn; scale (..., 1) float32. NaN where a row holds NaN or infinity.
    """
    # The same numbers as of abs().amax(), which is a pass over memory more.
    peak = torch.maximum(values.amax(-1, keepdim=True), values.amin(-1, keepdim=True).neg())
    scale = (peak / LARGEST).clamp_min(EPS)
    # What rounding put above 448 would become NaN in older versions of PyTorch.
    return (values / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def _value(byte: int) -> float:
    sign, exponent, mantissa = 1 - 2 * (byte >> 7), byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (SMALLEST_EXPONENT - 3)
    return sign * (8 + mantissa) * 2.0 ** (SMALLEST_EXPONENT - 3 + exponent - 1)


VALUES = tuple(map(_value, range(256)))
"""What each byte stands for."""


def decoded(stored: Tensor) -> Tensor:
    """Returns the values (O, I) float32 of bytes (O, I) uint8: five times as fast on the CPU as converting the type."""
    values = torch.tensor(VALUES, device=stored.device)
    return values.index_select(0, stored.reshape(-1).int()).view(stored.shape)


def rounded(values: Tensor) -> Tensor:
    """Rounds float32 within +-448 to the nearest of E4M3, ties to even, in plain arithmetic: exporters know no 8-bit types."""
    exponent = values.abs().clamp_min(2.0**SMALLEST_EXPONENT).log2().floor()
    step = torch.pow(2.0, exponent - 3)
    return (values / step).round() * step


# --- the layer --------------------------------------------------------------------------------------------------------


class Float8Linear(KernelLinear):
    """x W^T + b: ``weight`` (O, I) uint8, the bytes of E4M3; ``scale`` (O,) float32; ``bias`` (O,) or None.

    Bytes, because conversions of a model to another type change tensors of every floating type, 8 bits among them.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    arithmetic = "int8"  # a last bit may move an activation by a step; see workers.artefact.parity

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.uint8, device="meta"))
        self.register_buffer("scale", torch.empty(out_features, device="meta"))
        self.register_buffer("bias", torch.empty(out_features, device="meta") if bias else None)

    @classmethod
    def like(cls, linear: Any) -> Float8Linear:
        """Returns a layer of the same shape, without values."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.bias = bias_like(linear)
        return layer

    @classmethod
    def of(cls, linear: nn.Linear) -> Float8Linear:
        """Quantises a layer."""
        layer = cls.like(linear)
        codes, scale = encoded(linear.weight.detach().float())
        layer.weight, layer.scale = codes.contiguous().view(torch.uint8), scale[:, 0].contiguous()
        if linear.bias is not None:
            layer.bias = linear.bias.detach().clone()
        return layer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def pack_for_kernel(self) -> tuple[Tensor, ...]:
        """Returns the weight as (I, O) float8, a view where nothing is to pad, and its scale (1, O); nothing without a kernel."""
        if not (self.weight.is_cuda and has_kernel()):
            return ()
        below, behind = -self.out_features % MULTIPLE, -self.in_features % MULTIPLE
        weight = F.pad(self.weight, (0, behind, 0, below)) if below or behind else self.weight
        weight = (
            weight.contiguous()
        )  # row after row, so that its transpose is the column after column that the kernel takes
        return weight.view(torch.float8_e4m3fn).t(), F.pad(self.scale, (0, below), value=1.0)[None]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) any floating type -> (..., O) same type."""
        if self.packing and not torch.compiler.is_exporting():
            product = self.kernel_product(x.reshape(-1, self.in_features).float()).to(x.dtype)
            product = product.reshape(*x.shape[:-1], self.out_features)
            return product if self.bias is None else product + self.bias.to(x.dtype)
        return self.simulated(x)

    def kernel_product(self, rows: Tensor) -> Tensor:
        """rows (M, I) float32 -> (M, O) bfloat16, by the CUDA kernel."""
        weight, scale = self.packing
        codes, steps = encoded(F.pad(rows, (0, -self.in_features % MULTIPLE)).contiguous())
        product = torch._scaled_mm(codes, weight, scale_a=steps, scale_b=scale, out_dtype=torch.bfloat16)
        return product[:, : self.out_features]

    def simulated(self, x: Tensor) -> Tensor:
        """Computes the same from the buffers, sums and result in float32."""
        rows = x.float()
        if torch.compiler.is_exporting():
            scale = (rows.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(EPS)
            codes = rounded((rows / scale).clamp(-LARGEST, LARGEST))
        else:
            eight, scale = encoded(rows)
            codes = eight.float()
        product = F.linear(codes, decoded(self.weight)) * self.scale * scale
        return (product if self.bias is None else product + self.bias.float()).to(x.dtype)


# --- the technique ----------------------------------------------------------------------------------------------------


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Replaces the linear layers in place."""
    found = linears(model, skip_head=config.skip_head)
    for name, linear in found.items():
        model.set_submodule(name, Float8Linear.of(linear))
    names = list(found)
    tables = pack_embeddings(model, int8_table) if config.embeddings else []
    return Applied(model, {"linears": names, **packed(tables)}, names + tables)


def _foresee(model: nn.Module, config: Config, surroundings: Surroundings) -> dict[str, Any]:
    return {"linears": list(linears(model, skip_head=config.skip_head)), **packed_later(model, config)}


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Replaces the same layers of a skeleton by layers without values."""
    for name in resolved["linears"]:
        model.set_submodule(name, Float8Linear.like(model.get_submodule(name)))
    rebuild_embeddings(model, resolved.get("embeddings", ()), int8_table)
    return model


TECHNIQUE = Technique(
    name="fp8",
    family="quantisation",
    version=1,
    Config=Config,
    stage="conversion",
    apply=_apply,
    rebuild=_rebuild,
    foresee=_foresee,
    simulated=lambda config, device: device != "cuda" or not has_kernel(),
    models=("timm", "vilt", "meter"),
    source="Micikevicius et al. 2022, arXiv 2209.05433; Kuzmin et al. 2022, arXiv 2208.09225",
)
