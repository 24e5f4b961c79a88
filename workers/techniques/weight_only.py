"""Weight-only quantisation: linear layers hold int8 (per row) or packed int4 (per group) weights; activations stay.

Source: the round-to-nearest baseline of Frantar et al., GPTQ, arXiv 2210.17323, section 4 (group-wise: "Additional
Tricks"); the 4-bit form is torchao's tinygemm one.
Differs from the paper: rounding to nearest only, no second-order correction, no calibration.

8 bits: int8 (O, I), scale (O,) float32, symmetric. 4 bits: two weights a byte, (O, ceil(I/2)) uint8, and for each group
of a row bfloat16 scale and zero; the last group of a row is shorter where ``group_size`` does not divide I.

Two kernels, same stored file:
- ``dequantise``: each call unpacks one layer's weights into the activation's type (float32 unless ``precision`` came
  before or after) and runs the ordinary matrix product. Every shape, every device.
- ``packed``: PyTorch's ``_weight_int8pack_mm`` and ``_weight_int4pack_mm_for_cpu``: bfloat16 factors, float32 sums, no
  layer's weights ever unpacked. CPU only. Shapes that they cannot take are padded with zeros in the kernel's own copy.

Costs: rounding of the weights. Saves: file and resident memory, about 3.8x at 8 bits and 6x at 4. It saves no time:
with hundreds of tokens a call is bound by arithmetic. Measured on one AVX-512 core, layer of 384 to 1536, ms
a call at 17 / 50 / 197 / 788 tokens: float32 0.4 / 0.8 / 2.0 / 7.3; 8 bits dequantise 0.6 / 1.6 / 2.0 / 8.2, packed
0.6 / 1.3 / 4.7 / 19; 4 bits dequantise 2.0 / 2.6 / 3.2 / 9.4, packed 0.5 / 1.2 / 4.2 / 18. The time is that of the
artefact as it ships, so nothing here is marked as simulated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.affine import KernelLinear, grouped_int4, linears, pack_nibbles, symmetric_int8, unpack_nibbles
from workers.techniques.record import Applied, ModelInfo, Surroundings, Technique, choice

_INT8_IN_MULTIPLE = 16  # for other in-features _weight_int8pack_mm in bfloat16 returned garbage or crashed (torch 2.15)
_INT4_OUT_MULTIPLE = 16  # _convert_weight_to_int4pack_for_cpu refuses other out-features


@dataclass(frozen=True)
class Config:
    """Bits, group size (4 bits only), kernel, and whether the head is left alone."""

    bits: int = choice(8, (8, 4), doc="bits a weight")
    group_size: int = choice(32, (32, 64, 128), search=(32,), doc="neighbouring weights that share a scale; for 4 bits")
    kernel: str = choice("dequantise", ("dequantise", "packed"), search=("dequantise",), doc="how it is multiplied")
    skip_head: bool = choice(False, (False, True), search=(False,), doc="leave the classifier heads unquantised")


class Int8Linear(KernelLinear):
    """x W^T + b: ``weight`` (O, I) int8, ``scale`` (O,) float32, ``bias`` (O,) or None."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool, kernel: str) -> None:
        super().__init__(in_features, out_features)
        self.kernel = kernel
        self.arithmetic = "bfloat16" if kernel == "packed" else None  # of the factors; see workers.parity
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device="meta"))
        self.register_buffer("scale", torch.empty(out_features, device="meta"))
        self.register_buffer("bias", torch.empty(out_features, device="meta") if bias else None)

    def quantise_(self, weight: Tensor) -> None:
        """Takes the values of ``weight`` (O, I)."""
        self.weight, self.scale = symmetric_int8(weight, per_channel=True)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight (O, I) in ``dtype``."""
        return self.weight.to(dtype).mul_(self.scale.to(dtype)[:, None])

    def pack_for_kernel(self) -> tuple[Tensor, Tensor]:
        """Returns the weight (O, I padded), which is the stored one where nothing is to pad, and the scale."""
        padding = -self.in_features % _INT8_IN_MULTIPLE
        return F.pad(self.weight, (0, padding)) if padding else self.weight, self.scale.bfloat16()

    def packed_product(self, rows: Tensor) -> Tensor:
        """rows (M, I) bfloat16 -> (M, O) bfloat16."""
        weight, scale = self.packing
        return torch._weight_int8pack_mm(F.pad(rows, (0, -self.in_features % _INT8_IN_MULTIPLE)), weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) any floating type -> (..., O) same type."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.kernel == "dequantise":
            return F.linear(x, self.dequantised(x.dtype), bias)
        product = self.packed_product(x.reshape(-1, self.in_features).bfloat16()).to(x.dtype)
        return (product if bias is None else product + bias).reshape(*x.shape[:-1], self.out_features)


class Int4Linear(Int8Linear):
    """x W^T + b: ``weight`` (O, ceil(I/2)) uint8, ``scale`` and ``zero`` (O, G) bfloat16, ``bias`` (O,) or None."""

    zero: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool, kernel: str, group_size: int) -> None:
        super().__init__(in_features, out_features, bias=bias, kernel=kernel)
        self.group_size = group_size
        per_group = torch.empty(out_features, -(-in_features // group_size), dtype=torch.bfloat16, device="meta")
        self.weight = torch.empty(out_features, (in_features + 1) // 2, dtype=torch.uint8, device="meta")
        self.scale = per_group
        self.register_buffer("zero", per_group.clone())

    def quantise_(self, weight: Tensor) -> None:
        q, self.scale, self.zero = grouped_int4(weight, self.group_size)
        self.weight = pack_nibbles(q)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        scale = self.scale.float()
        start = (self.zero.float() - 8 * scale).to(dtype)
        q = unpack_nibbles(self.weight, self.in_features).to(dtype)
        padding = -self.in_features % self.group_size
        groups = F.pad(q, (0, padding)).view(self.out_features, -1, self.group_size)
        groups = groups.mul_(scale.to(dtype)[..., None]).add_(start[..., None])
        return groups.reshape(self.out_features, -1)[:, : self.in_features]

    def pack_for_kernel(self) -> Any:
        """Returns the kernel's weight layout, and scale and zero as (G, O, 2); O and I padded."""
        below = -self.out_features % _INT4_OUT_MULTIPLE
        q = F.pad(unpack_nibbles(self.weight, self.in_features), (0, -self.in_features % self.group_size, 0, below))
        pairs = F.pad(torch.stack((self.scale, self.zero), 2), (0, 0, 0, 0, 0, below))
        kernel_weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        return kernel_weight, pairs.transpose(0, 1).contiguous()

    def packed_product(self, rows: Tensor) -> Tensor:
        weight, pairs = self.packing
        padded = F.pad(rows, (0, -self.in_features % self.group_size))
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(padded, weight, self.group_size, pairs)
        return product[:, : self.out_features]


def check(info: ModelInfo, config: Config) -> str | None:
    """Returns why the packed kernel cannot run on this device, or None."""
    if config.kernel == "packed" and info.device != "cpu":
        return f"kernel packed runs on CPU only, not on {info.device}; use kernel dequantise"
    return None


def _empty_layer(linear: nn.Linear, config: Config) -> Int8Linear:
    shape = (linear.in_features, linear.out_features)
    bias = linear.bias is not None
    if config.bits == 8:
        return Int8Linear(*shape, bias=bias, kernel=config.kernel)
    return Int4Linear(*shape, bias=bias, kernel=config.kernel, group_size=config.group_size)


def apply_(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Replaces the linear layers in place."""
    found = linears(model, skip_head=config.skip_head)
    for name, linear in found.items():
        layer = _empty_layer(linear, config)
        layer.quantise_(linear.weight)
        if linear.bias is not None:
            layer.bias = linear.bias.detach().clone()
        model.set_submodule(name, layer)
    names = list(found)
    kept = {"bits": config.bits, "group_size": config.group_size, "kernel": config.kernel}
    return Applied(model, {**kept, "linears": names}, names)


def rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Replaces the same layers of a skeleton by layers without values."""
    config = Config(bits=resolved["bits"], group_size=resolved["group_size"], kernel=resolved["kernel"])
    for name in resolved["linears"]:
        old: Any = model.get_submodule(name)
        model.set_submodule(name, _empty_layer(old, config))
    return model


TECHNIQUE = Technique(
    name="weight_only",
    family="quantisation",
    version=1,
    Config=Config,
    stage="conversion",
    apply=apply_,
    rebuild=rebuild,
    check=check,
    source="round-to-nearest baseline of Frantar et al. 2023, arXiv 2210.17323, section 4",
)
