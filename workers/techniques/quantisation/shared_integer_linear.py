"""A linear layer whose product is one of integers: int8 weights, and activations of 8 bits with a scale known beforehand or a
scale a token.

``static``: ``x ~ (q - input_zero) * input_scale``, q uint8, both stored. ``token``: symmetric int8, scale = max |x| / 127 of
each token, so an image's result does not depend on the others in its batch. Weights: int8, symmetric, one scale a row.

Three ways to the same integers, chosen by where the layer runs:
- CPU, eager: oneDNN's ``qlinear_pointwise`` (VNNI), which also applies the scales. Of unsigned activations only: for signed
  ones torch 2.15 has a reference loop, thousands of times slower; hence codes of tokens lie around 128.
- CUDA, and every compiled graph: ``torch._int_mm``; the compiler fuses the quantising before it and the scaling after it.
  (Compiled on the CPU, oneDNN's operator wants its weights as constants of the graph.)
- elsewhere (a CPU without VNNI, exported programs): the integers as floats, with no speed to claim.
Shapes: O out-features, I in-features, M tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.quantisation.shared_affine import KernelLinear, bias_like, symmetric_int8
from workers.techniques.quantisation.shared_calibration import EPS

INPUTS = ("static", "token")

CUDA_ROWS = 32
"""Rows that ``torch._int_mm`` is given at least on CUDA, where it refuses 16 and fewer."""

CUDA_MULTIPLE = 8
"""Of O and I that ``torch._int_mm`` takes on CUDA."""


CPU_KERNEL = bool(torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported())  # type: ignore[no-untyped-call]
"""Whether this CPU multiplies 8-bit integers exactly and fast; without VNNI oneDNN may saturate sums of two products."""


def no_kernel(config: object, device: str) -> bool:
    """Whether a device of that kind, ``cpu`` or ``cuda``, has no integer kernel here, so that no speed may be claimed."""
    return not (CPU_KERNEL if device == "cpu" else torch.cuda.is_available())


@dataclass(frozen=True)
class Packing:
    """What the kernels take in place of the buffers.

    Attributes:
        scale, zero: of the activations; 1 and 128 where each token has its own scale.
        onednn: oneDNN's layout of the weight, None off the CPU.
        columns: (I, O) int8, a view of the weight where it is contiguous, or a copy padded where CUDA needs it.
        factor: (O,) float32, what a sum of integers is worth; offset: (O,) float32, of bias and zero point.
    """

    scale: float
    zero: int
    onednn: Tensor | None
    columns: Tensor
    factor: Tensor
    offset: Tensor


class IntegerLinear(KernelLinear):
    """x W^T + b: ``weight`` (O, I) int8, ``weight_scale`` (O,) float32, ``bias`` (O,) or None.

    With static activations also ``input_scale`` () float32 and ``input_zero`` () uint8.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor
    input_zero: Tensor
    arithmetic = "int8"  # see workers.artefact.parity

    def __init__(self, in_features: int, out_features: int, *, bias: bool, inputs: str = "static") -> None:
        super().__init__(in_features, out_features)
        self.static = inputs == "static"
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device="meta"))
        self.register_buffer("weight_scale", torch.empty(out_features, device="meta"))
        self.register_buffer("bias", torch.empty(out_features, device="meta") if bias else None)
        if self.static:
            self.register_buffer("input_scale", torch.empty((), device="meta"))
            self.register_buffer("input_zero", torch.empty((), dtype=torch.uint8, device="meta"))

    @classmethod
    def of(cls, linear: nn.Linear, scale: float | None = None, zero: int = 0) -> IntegerLinear:
        """Quantises a layer; ``scale`` and ``zero`` are those of its input, None for a scale a token."""
        layer = cls.like(linear, "token" if scale is None else "static")
        layer.weight, layer.weight_scale = symmetric_int8(linear.weight, per_channel=True)
        if linear.bias is not None:
            layer.bias = linear.bias.detach().clone()
        if scale is not None:
            device = linear.weight.device
            layer.input_scale = torch.tensor(scale, dtype=torch.float32, device=device)
            layer.input_zero = torch.tensor(zero, dtype=torch.uint8, device=device)
        return layer

    @classmethod
    def like(cls, linear: Any, inputs: str) -> IntegerLinear:
        """Returns a layer of the same shape, without values."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, inputs=inputs)
        layer.bias = bias_like(linear)
        return layer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def pack_for_kernel(self) -> Packing:
        """Returns what the kernels take."""
        scale, zero = (float(self.input_scale), int(self.input_zero)) if self.static else (1.0, 128)
        cpu, cuda = self.weight.device.type == "cpu" and CPU_KERNEL, self.weight.is_cuda
        below, behind = -self.out_features % CUDA_MULTIPLE, -self.in_features % CUDA_MULTIPLE
        stored = self.weight.contiguous()
        weight = F.pad(stored, (0, behind, 0, below)) if cuda and (below or behind) else stored
        factor = self.weight_scale * scale
        offset = (128 - zero) * self.weight.sum(1, dtype=torch.int32) * factor
        onednn = torch.ops.onednn.qlinear_prepack(stored, None) if cpu else None
        bias = 0 if self.bias is None else self.bias.float()
        return Packing(scale, zero, onednn, weight.t(), factor, offset + bias)

    def codes(self, rows: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
        """Quantises rows (M, I) float32: values from 0 to below 256, whose whole parts are the codes; each token's scale or None.

        Truncating after a half was added rounds; converting to integers truncates, which saves a pass over memory.
        """
        if self.static:
            half = torch.full((), packing.zero + 0.5, device=rows.device)
            return torch.add(half, rows, alpha=1 / packing.scale).clamp_(0, 255.5), None
        # On the CPU a fifth of the time of aminmax, a tenth of that of the norm.
        peak = torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_())
        scale = peak.div_(127).clamp_min_(EPS)
        return (rows / scale).add_(packing.zero + 0.5), scale

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) any floating type -> (..., O) same type."""
        if torch.compiler.is_exporting():
            return self.portable(x)
        packing = self.packing
        rows = x.reshape(-1, self.in_features).float()
        compiling = torch.compiler.is_compiling()
        if packing.onednn is not None and not compiling:
            product: Tensor = self._onednn(rows, packing)
        else:
            codes, scale = self.codes(rows, packing)
            sums = self._sums(codes, packing)
            sums = sums * packing.factor
            product = (sums if scale is None else sums * scale) + packing.offset
        return product.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def portable(self, x: Tensor) -> Tensor:
        """Computes the same from the buffers and with plain operators, integers as floats: for exported programs."""
        rows = x.float()
        if self.static:
            zero = self.input_zero.float()
            codes = (rows / self.input_scale + zero).add(0.5).floor().clamp(0, 255) - zero
            step: Tensor = self.input_scale
        else:
            step = (rows.abs().amax(-1, keepdim=True) / 127).clamp_min(EPS)
            codes = (rows / step + 0.5).floor()
        product = F.linear(codes, self.weight.float()) * self.weight_scale * step
        return (product if self.bias is None else product + self.bias.float()).to(x.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _onednn(self, rows: Tensor, packing: Packing) -> Tensor:
        codes, scale = self.codes(rows, packing)
        bias = None if scale is not None or self.bias is None else self.bias.float()
        zeros = torch.zeros(self.out_features, dtype=torch.int32)  # of the weights
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes.to(torch.uint8), packing.scale, packing.zero, packing.onednn,
            self.weight_scale, zeros, bias, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        if scale is None:
            return product
        product.mul_(scale)
        return product if self.bias is None else product.add_(self.bias.float())

    def _sums(self, codes: Tensor, packing: Packing) -> Tensor:
        """Returns the sums (M, O) of integer products of :meth:`codes` (M, I), less 128, as float32."""
        signed = codes.floor() - 128
        if not (signed.is_cuda or (signed.device.type == "cpu" and CPU_KERNEL)):
            return signed @ packing.columns.float()
        count = len(signed)
        if signed.is_cuda:
            signed = F.pad(signed, (0, -self.in_features % CUDA_MULTIPLE, 0, max(0, CUDA_ROWS - count)))
        sums = torch._int_mm(signed.to(torch.int8).contiguous(), packing.columns)
        return sums[:count, : self.out_features].float()
