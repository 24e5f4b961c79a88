"""Weight-only quantisation: linear layers, and a text encoder's word embeddings, hold weights of 2 to 8 bits, bit-packed; activations
stay. A lookup unpacks the rows of the embeddings that it reads.

Source: the round-to-nearest baseline of Frantar et al., GPTQ, arXiv 2210.17323, section 4 (group-wise: "Additional
Tricks"); the 4-bit form in groups is torchao's tinygemm one. Widths that differ by layer are chosen as in Cai et al., ZeroQ,
arXiv 2001.00281, section 3.2: see :mod:`weight_only_sensitivity`.
Differs from the paper: rounding to nearest only, no second-order correction, no calibration.

8 bits a row: int8 (O, I), scale (O,) float32, symmetric. All others: packed as :func:`workers.techniques.quantisation.shared_affine.pack_bits` does, from
minimum to maximum: for each group of a row bfloat16 scale and zero, the last group of a row being shorter where
``group_size`` does not divide I; or for each row float32 scale and zero.

Two kernels, same stored file:
- ``dequantise``: each call unpacks one layer's weights into the activation's type (float32 unless ``precision`` came
  before or after) and runs the ordinary matrix product. Every shape, every device.
- ``packed``: PyTorch's own products, of bfloat16 factors, with float32 sums, no layer's weights ever unpacked: 4 bits in
  groups on CPU and CUDA (int4_kernels), 8 bits a row (``_weight_int8pack_mm``) on the CPU. Shapes that they cannot take are
  padded with zeros in the kernel's own copy.

Costs: rounding of the weights. Saves: file and resident memory, about 3.8x at 8 bits and 6x at 4. It saves no time:
with hundreds of tokens a call is bound by arithmetic. Measured on one AVX-512 core, layer of 384 to 1536, ms
a call at 17 / 50 / 197 / 788 tokens: float32 0.4 / 0.8 / 2.0 / 7.3; 8 bits dequantise 0.6 / 1.6 / 2.0 / 8.2, packed
0.6 / 1.3 / 4.7 / 19; 4 bits dequantise 2.0 / 2.6 / 3.2 / 9.4, packed 0.5 / 1.2 / 4.2 / 18. The time of the two formats that
have kernels is that of the artefact as it ships; formats without one are marked as simulated, their size is real.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.quantisation import weight_only_int4_kernels, weight_only_sensitivity
from workers.techniques.quantisation.shared_affine import (
    bias_like,
    grouped_affine,
    linears,
    pack_bits,
    packed_bytes,
    symmetric_int8,
    unpack_bits,
)
from workers.techniques.quantisation.shared_packed_embeddings import (
    Table,
    pack_embeddings,
    rebuild_embeddings,
    word_embeddings,
)
from workers.techniques.record import Applied, ModelInfo, Surroundings, Technique, choice, number

_INT8_IN_MULTIPLE = 16  # for other in-features _weight_int8pack_mm in bfloat16 returned garbage or crashed (torch 2.15)


WIDTHS = (8, 7, 6, 5, 4, 3, 2)
"""Bits a weight that there are."""


@dataclass(frozen=True)
class Config:
    """Bits, which weights share a scale, kernel, and whether the head is left alone."""

    bits: int | str = choice(8, (*WIDTHS, "mixed"), search=(8, 4), doc="bits a weight, or mixed: chosen for each layer")
    group_size: int = choice(32, (32, 64, 128), search=(32,), doc="neighbouring weights that share a scale, in groups")
    kernel: str = choice("dequantise", ("dequantise", "packed"), search=("dequantise",), doc="how it is multiplied")
    skip_head: bool = choice(False, (False, True), search=(False,), doc="leave the classifier heads unquantised")
    granularity: str = choice(
        "auto",
        ("auto", "per_channel", "group"),
        search=("auto",),
        doc="what shares a scale; auto: a row at 8 bits, else a group",
    )
    mean_bits: float = number(
        4.0, 2.5, 8.0, 0.5, search=(4.0, 4.0, 0.5), doc="bits a weight on average, scales not counted; for mixed"
    )

    embeddings: bool = choice(
        True, (True, False), search=(True,), doc="pack a text encoder's word embeddings as well; 8 bits for mixed"
    )

    def grouped(self, bits: int) -> bool:
        """Whether layers of this width have scales for groups of a row, not for whole rows."""
        return self.granularity == "group" or (self.granularity == "auto" and bits != 8)

    def has_kernel(self, bits: int) -> bool:
        """Whether PyTorch multiplies this format as it is stored."""
        return self.grouped(bits) if bits == 4 else bits == 8 and not self.grouped(bits)


class Int8Linear(Table):
    """x W^T + b: ``weight`` (O, I) int8, ``scale`` (O,) float32, ``bias`` (O,) or None."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool, kernel: str) -> None:
        super().__init__(in_features, out_features)
        self.kernel = kernel
        self.arithmetic = "bfloat16" if kernel == "packed" else None  # of the factors; see workers.artefact.parity
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device="meta"))
        self.register_buffer("scale", torch.empty(out_features, device="meta"))
        self.register_buffer("bias", torch.empty(out_features, device="meta") if bias else None)

    def quantise_(self, weight: Tensor) -> None:
        self.weight, self.scale = symmetric_int8(weight, per_channel=True)

    def dequantised(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        weight, scale = (part if rows is None else part[rows] for part in (self.weight, self.scale))
        return weight.to(dtype).mul_(scale.to(dtype)[:, None])

    def pack_for_kernel(self) -> tuple[Tensor, Tensor]:
        """Returns the weight (O, I padded), which is the stored one where nothing is to pad, and the scale."""
        padding = -self.in_features % _INT8_IN_MULTIPLE
        weight = F.pad(self.weight, (0, padding)) if padding else self.weight
        return weight.contiguous(), self.scale.bfloat16()

    def packed_product(self, rows: Tensor) -> Tensor:
        """rows (M, I) bfloat16 -> (M, O) bfloat16."""
        weight, scale = self.packing
        padded = F.pad(rows, (0, -self.in_features % _INT8_IN_MULTIPLE)).contiguous()
        return torch._weight_int8pack_mm(padded, weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) any floating type -> (..., O) same type."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.kernel == "dequantise":
            return F.linear(x, self.dequantised(x.dtype), bias)
        product = self.packed_product(x.reshape(-1, self.in_features).bfloat16()).to(x.dtype)
        return (product if bias is None else product + bias).reshape(*x.shape[:-1], self.out_features)


class GroupedLinear(Int8Linear):
    """x W^T + b: ``weight`` (O, bytes) uint8, ``scale`` and ``zero`` (O, G), ``bias`` (O,) or None.

    The kernel ``packed`` is for 4 bits in groups.

    Args:
        group_size: None for one scale a row, in float32; scales of groups are bfloat16.
    """

    zero: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, kernel: str, bits: int, group_size: int | None
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, kernel=kernel)
        self.bits = bits
        self.group_size = group_size or in_features
        dtype = torch.float32 if group_size is None else torch.bfloat16
        per_group = torch.empty(out_features, -(-in_features // self.group_size), dtype=dtype, device="meta")
        self.weight = torch.empty(out_features, packed_bytes(in_features, bits), dtype=torch.uint8, device="meta")
        self.scale = per_group
        self.register_buffer("zero", per_group.clone())

    def quantise_(self, weight: Tensor) -> None:
        q, self.scale, self.zero = grouped_affine(weight, self.bits, self.group_size, self.scale.dtype)
        self.weight = pack_bits(q, self.bits)

    def dequantised(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        weight, scale, zero = (part if rows is None else part[rows] for part in (self.weight, self.scale, self.zero))
        scale = scale.float()
        start = (zero.float() - 2 ** (self.bits - 1) * scale).to(dtype)
        q = unpack_bits(weight, self.bits, self.in_features).to(dtype)
        padding = -self.in_features % self.group_size
        groups = F.pad(q, (0, padding)).view(len(weight), -1, self.group_size)
        groups = groups.mul_(scale.to(dtype)[..., None]).add_(start[..., None])
        return groups.reshape(len(weight), -1)[:, : self.in_features]

    def pack_for_kernel(self) -> Any:
        """Returns what the device's kernel takes."""
        return weight_only_int4_kernels.pack(self.weight, self.scale, self.zero, self.in_features, self.group_size)

    def packed_product(self, rows: Tensor) -> Tensor:
        return weight_only_int4_kernels.product(rows, self.packing)


def _check(info: ModelInfo, config: Config) -> str | None:
    """Returns why the packed kernel cannot run on this device, or None."""
    if config.kernel == "packed" and info.device != "cpu" and config.bits != 4:
        return f"kernel packed of {config.bits} bits runs on CPU only, not on {info.device}; use 4 bits or kernel dequantise"
    if config.kernel == "packed" and (lacks := weight_only_int4_kernels.lacking(info.device)):
        return f"{lacks}; use kernel dequantise"
    if config.kernel == "packed" and isinstance(config.bits, int) and not config.has_kernel(config.bits):
        return (
            f"kernel packed takes 8 bits a row and 4 bits in groups, not {config.bits} bits with granularity "
            f"{config.granularity}; use kernel dequantise"
        )
    return None


def _simulated(config: Config, device: str) -> bool:
    """Whether some layer may have a format that no kernel takes, whatever the device."""
    return not isinstance(config.bits, int) or not config.has_kernel(config.bits)


def empty_layer(linear: nn.Linear, config: Config, bits: int) -> Int8Linear:
    """Returns a layer of that width without values."""
    shape = (linear.in_features, linear.out_features)
    bias = linear.bias is not None
    kernel = config.kernel if config.has_kernel(bits) else "dequantise"
    if bits == 8 and not config.grouped(bits):
        layer: Int8Linear = Int8Linear(*shape, bias=bias, kernel=kernel)
    else:
        group_size = config.group_size if config.grouped(bits) else None
        layer = GroupedLinear(*shape, bias=bias, kernel=kernel, bits=bits, group_size=group_size)
    layer.bias = bias_like(linear)
    return layer


def empty_table(config: Config) -> Callable[[nn.Linear], Table]:
    """Returns what makes the tables of word embeddings: in the format of the layers, of 8 bits where these have widths of their own."""
    bits = config.bits if isinstance(config.bits, int) else 8
    return lambda linear: empty_layer(linear, config, bits)


def int8_table(linear: nn.Linear) -> Table:
    """Returns a table of 8 bits a row without values, for techniques whose layers have 8 bits."""
    return empty_layer(linear, Config(), 8)


def rounded(weight: Tensor, config: Config, bits: int) -> Tensor:
    """Returns weight (O, I) as a layer of that width stores it, float32."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer = empty_layer(linear, config, bits)
    layer.quantise_(weight)
    return layer.dequantised(torch.float32)


def _widths(found: Mapping[str, nn.Linear], model: nn.Module, config: Config, surroundings: Surroundings) -> list[int]:
    """Returns the bits of every layer in ``found``."""
    if isinstance(config.bits, int):
        return [config.bits] * len(found)
    table = weight_only_sensitivity.table_for(
        model,
        surroundings,
        lambda weight, bits: rounded(weight, config, bits),
        name=f"weight_only_{config.granularity}_{config.group_size}",
        version=TECHNIQUE.version,
    )
    sizes = [linear.weight.numel() for linear in found.values()]
    return weight_only_sensitivity.allocate(sizes, [table[name] for name in found], config.mean_bits)


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Replaces the linear layers in place."""
    found = linears(model, skip_head=config.skip_head)
    widths = _widths(found, model, config, surroundings)
    made: dict[tuple[int, int], Int8Linear] = {}
    for (name, linear), bits in zip(found.items(), widths, strict=True):
        layer = empty_layer(linear, config, bits)
        first = made.setdefault((id(linear.weight), bits), layer)
        if first is layer:
            layer.quantise_(linear.weight)
        else:  # tied weights stay tied
            shared = {key: value for key, value in first.state_dict().items() if key != "bias"}
            layer.load_state_dict(shared, strict=False, assign=True)
        if linear.bias is not None:
            layer.bias = linear.bias.detach().clone()
        model.set_submodule(name, layer)
    names = list(found)
    tables = pack_embeddings(model, empty_table(config)) if config.embeddings else []
    return Applied(model, _resolved(config, names, widths) | packed(tables), names + tables)


def _resolved(config: Config, names: list[str], widths: list[int]) -> dict[str, Any]:
    kept: dict[str, Any] = {
        "bits": config.bits,
        "group_size": config.group_size,
        "kernel": config.kernel,
        "linears": names,
    }
    if config.granularity != "auto":
        kept["granularity"] = config.granularity
    if config.bits == "mixed":
        kept["widths"] = widths
    return kept


def _foresee(model: nn.Module, config: Config, surroundings: Surroundings) -> dict[str, Any]:
    found = linears(model, skip_head=config.skip_head)
    widths = _widths(found, model, config, surroundings)  # which asks images where they are mixed
    return _resolved(config, list(found), widths) | packed_later(model, config)


def packed(tables: list[str]) -> dict[str, Any]:
    """Returns what a recipe's step keeps of tables of word embeddings: nothing where there are none."""
    return {"embeddings": tables} if tables else {}


def packed_later(model: nn.Module, config: Any) -> dict[str, Any]:
    """Returns what :func:`packed` will keep of a model whose tables are not packed yet."""
    return packed(list(word_embeddings(model))) if config.embeddings else {}


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Replaces the same layers of a skeleton by layers without values."""
    config = Config(
        **{key: resolved[key] for key in ("bits", "group_size", "kernel", "granularity") if key in resolved}
    )
    widths = resolved.get("widths", [config.bits] * len(resolved["linears"]))
    for name, bits in zip(resolved["linears"], widths, strict=True):
        old: Any = model.get_submodule(name)
        model.set_submodule(name, empty_layer(old, config, bits))
    rebuild_embeddings(model, resolved.get("embeddings", ()), empty_table(config))
    return model


TECHNIQUE = Technique(
    name="weight_only",
    family="quantisation",
    version=1,
    Config=Config,
    stage="conversion",
    apply=_apply,
    rebuild=_rebuild,
    foresee=_foresee,
    check=_check,
    simulated=_simulated,
    models=("timm", "vilt", "meter"),
    either_order={"precision": "scales from rounded or from unrounded weights"},
    source="round-to-nearest baseline of Frantar et al. 2023, arXiv 2210.17323, section 4; mixed: ZeroQ, arXiv 2001.00281",
)
