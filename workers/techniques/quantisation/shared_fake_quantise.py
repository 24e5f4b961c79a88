"""Linear layers that are trained as if they were quantised, and what is stored of them afterwards.

Source: Bengio et al., arXiv 1308.3432 (straight-through estimator); Jacob et al., arXiv 1712.05877, section 3 (simulated
quantisation in training).
In training and in evaluation a layer computes with rounded weights, and with rounded activations where it has bits for them;
the rounding's gradient is 1. Once the training is over the rounded weights are packed, which changes no bit of what is computed;
or, where all layers have 8 bits for both, they go to the integer kernel of :mod:`shared_integer_linear`, which sums up integers.
Shapes: O out-features, I in-features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.quantisation.shared_affine import (
    PackedLinear,
    pack_bits,
    packed_bytes,
    plain_linear,
    require_finite,
    unpack_bits,
)
from workers.techniques.quantisation.shared_integer_linear import IntegerLinear

EPS = torch.finfo(torch.float32).eps
"""Smallest scale."""


def on_grid(x: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Returns x as multiples of ``scale`` from ``low`` to ``high`` times it, differentiable straight through.

    The gradient of x is 1 inside and 0 outside; that of scale is round(x/scale) - x/scale inside, and low or high outside.

    Args:
        x: any shape, float32; scale: broadcasts with x, positive.
        low, high: integers.
    """
    levels: Tensor = _Round.apply(_inside(x / scale, low, high))
    return levels * scale


def _inside(x: Tensor, low: Any, high: Any) -> Tensor:
    return torch.clamp(x, low, high)


class _Round(torch.autograd.Function):
    """Rounds; the gradient is 1. Integers to the last bit, as they are stored, which x + (round(x) - x) is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@dataclass(frozen=True)
class Seen:
    """What came into a layer: mean magnitude, and ends of the range; all 0 where nothing did. ``calls`` is how often it came."""

    mean: float = 0.0
    low: float = 0.0
    high: float = 0.0
    calls: int = 0

    def and_then(self, x: Tensor) -> Seen:
        """Returns what came when x came as well: a layer is called for each image of a pair."""
        mean = (self.mean * self.calls + float(x.abs().mean())) / (self.calls + 1)
        low, high = float(x.min()), float(x.max())
        if not self.calls:
            return Seen(mean, low, high, 1)
        return Seen(mean, min(low, self.low), max(high, self.high), self.calls + 1)


# --- in training ------------------------------------------------------------------------------------------------------


class FakeQuantised(nn.Linear, ABC):
    """A linear layer whose weight (O, I) is a parameter and is rounded at every call."""

    quantised = True  # see workers.techniques.quantisation.shared_affine.linears

    def __init__(self, linear: nn.Linear, bits: int, input_bits: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.bits, self.input_bits = bits, input_bits
        self.train(linear.training)

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest level of a weight."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @abstractmethod
    def weight_scale(self) -> Tensor:
        """Returns the scale of the weights: () or (O, 1) float32."""

    @abstractmethod
    def input_grid(self, x: Tensor | None) -> tuple[Tensor, Tensor | int]:
        """Returns the scale of activations, (), and their lowest level.

        Args:
            x: what comes in, in a training step; None afterwards.
        """

    @abstractmethod
    def start(self, seen: Seen) -> None:
        """Sets the scales from the weight and from what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) -> (..., O), differentiable."""
        if self.input_bits:
            scale, low = self.input_grid(x)
            x = on_grid(x.float(), scale, low, low + 2**self.input_bits - 1).to(x.dtype)
        return F.linear(x, on_grid(self.weight, self.weight_scale(), *self.limits), self.bias)

    @torch.no_grad()
    def stored(self) -> Stored:
        """Returns the packed layer that computes the same in evaluation."""
        require_finite(self.weight, "the trained weight")
        scale, (low, high) = self.weight_scale(), self.limits
        made = Stored(
            self.in_features, self.out_features, self.bias is not None, self.bits, self.input_bits, scale.ndim
        )
        levels = _inside(self.weight / scale, low, high).round() - low
        made.weight = pack_bits(levels.to(torch.uint8), self.bits)
        made.scale = scale.detach().clone()
        if self.bias is not None:
            made.bias = self.bias.detach().clone()
        if self.input_bits:
            step, lowest = self.input_grid(None)
            made.input_scale = step.detach().clone()
            made.input_low = torch.as_tensor(lowest, device=step.device).to(torch.int32)
        return made.eval()

    @torch.no_grad()
    def stored_for_kernel(self) -> StoredIntegers:
        """Returns the layer of 8-bit integers that computes the same but for the order of sums."""
        require_finite(self.weight, "the trained weight")
        (scale, lowest), bias = self.input_grid(None), self.bias is not None
        made = StoredIntegers(self.in_features, self.out_features, bias=bias)
        made.weight = _inside(self.weight / self.weight_scale(), *self.limits).round().to(torch.int8).contiguous()
        made.weight_scale = self.weight_scale().detach().expand(self.out_features, 1)[:, 0].clone()
        made.bias = self.bias.detach().clone() if bias else None
        made.input_scale = scale.detach().clone()
        made.input_zero = torch.as_tensor(lowest, device=scale.device).neg().to(torch.uint8)
        return made.eval()


# --- afterwards -------------------------------------------------------------------------------------------------------


class Stored(PackedLinear):
    """x W^T + b: ``weight`` (O, bytes) uint8, ``scale`` () or (O, 1) float32, ``bias`` (O,) or None.

    ``input_scale`` () float32 and ``input_low`` () int32, the lowest level, are there where activations are rounded.
    """

    weight: Tensor
    scale: Tensor
    input_scale: Tensor
    input_low: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool, bits: int, input_bits: int, scale_ndim: int
    ) -> None:
        super().__init__(in_features, out_features)
        self.bits, self.input_bits = bits, input_bits
        rows = packed_bytes(in_features, bits)
        self.register_buffer("weight", torch.empty(out_features, rows, dtype=torch.uint8, device="meta"))
        self.register_buffer("scale", torch.empty((out_features, 1) if scale_ndim else (), device="meta"))
        self.register_buffer("bias", torch.empty(out_features, device="meta") if bias else None)
        if input_bits:
            self.register_buffer("input_scale", torch.empty((), device="meta"))
            self.register_buffer("input_low", torch.empty((), dtype=torch.int32, device="meta"))

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        levels: Tensor = unpack_bits(self.weight, self.bits, self.in_features).float() - 2 ** (self.bits - 1)
        return (levels * self.scale).to(dtype)

    def activations(self, x: Tensor) -> Tensor:
        if not self.input_bits:
            return x
        low = self.input_low
        levels = _inside(x.float() / self.input_scale, low, low + 2**self.input_bits - 1).round()
        return (levels * self.input_scale).to(x.dtype)


class StoredIntegers(IntegerLinear):
    """What static int8 is, after a training."""

    def plain(self) -> nn.Linear:
        return plain_linear(self.weight.float() * self.weight_scale[:, None], self.bias)
