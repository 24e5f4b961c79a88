"""Linear layers that are trained as if they were quantised, and what is stored of them afterwards.

Source: Bengio et al., arXiv 1308.3432 (straight-through estimator); Jacob et al., arXiv 1712.05877, section 3 (simulated
quantisation in training).
In training and in evaluation a layer computes with rounded weights, and with rounded activations where it has bits for them;
the rounding's gradient is 1. Once the training is over the rounded weights are packed, which changes no bit of what is computed;
or, where all layers have 8 bits for both, they go to the integer kernel of :mod:`integer_linear`, which sums up integers.
Shapes: O out-features, I in-features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.affine import PackedLinear, linears, pack_bits, packed_bytes, plain_linear, require_finite, unpack_bits
from workers.techniques.integer_linear import IntegerLinear, no_kernel
from workers.techniques.record import Surroundings

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
class Layer:
    """A layer to train: its name and bits; ``input_bits`` 0 leaves the activations alone."""

    name: str
    bits: int
    input_bits: int


# --- in training ------------------------------------------------------------------------------------------------------


class FakeQuantised(nn.Linear, ABC):
    """A linear layer whose weight (O, I) is a parameter and is rounded at every call."""

    quantised = True  # see workers.affine.linears

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
        made.weight = _inside(self.weight / self.weight_scale(), *self.limits).round().to(torch.int8)
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


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What came into a layer: mean magnitude, and ends of the range; all 0 where nothing did."""

    mean: float = 0.0
    low: float = 0.0
    high: float = 0.0


def chosen_layers(model: nn.Module, bits: int, input_bits: int, last_layer: str) -> list[Layer]:
    """Returns the linear layers with their bits; classifier heads as ``last_layer`` says: int8, float or same."""
    heads = linears(model, skip_head=False).keys() - linears(model, skip_head=True).keys()
    found = []
    for name in linears(model, skip_head=last_layer == "float"):
        if name in heads and last_layer == "int8":
            found.append(Layer(name, 8, 8 if input_bits else 0))
        else:
            found.append(Layer(name, bits, input_bits))
    return found


@torch.no_grad()
def observe(model: nn.Module, names: Sequence[str], surroundings: Surroundings) -> dict[str, Seen]:
    """Returns what comes into each layer on the first batch of training images.

    Raises:
        NotQuantisable: NaN or infinity comes in; the message names the layer.
    """
    seen = dict.fromkeys(names, Seen())

    def note(name: str, x: Tensor) -> None:
        x = x.float()
        require_finite(x, f"what comes into {name}")
        seen[name] = Seen(float(x.abs().mean()), float(x.min()), float(x.max()))

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name in names
    ]
    training = model.training
    try:
        images, _ = next(iter(surroundings.batches()))
        model.eval()(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return seen


def put(model: nn.Module, layers: Sequence[Layer], kind: type[FakeQuantised]) -> None:
    """Replaces linear layers in place by ones in training, whose scales have no values yet."""
    for layer in layers:
        linear: Any = model.get_submodule(layer.name)
        model.set_submodule(layer.name, kind(linear, layer.bits, layer.input_bits))


def convert(
    model: nn.Module, layers: Sequence[Layer], kind: type[FakeQuantised], surroundings: Surroundings
) -> dict[str, Any]:
    """Replaces linear layers in place by ones in training; returns what :func:`rebuild` needs."""
    names = [layer.name for layer in layers]
    seen = observe(model, names, surroundings)
    put(model, layers, kind)
    for name in names:
        layer: Any = model.get_submodule(name)
        layer.start(seen[name])
    return {
        "linears": names,
        "bits": [layer.bits for layer in layers],
        "input_bits": [layer.input_bits for layer in layers],
        "stored": None,
    }


def rebuild(model: nn.Module, resolved: Mapping[str, Any], kind: type[FakeQuantised], *, scale_ndim: int) -> nn.Module:
    """Replaces the same layers of a skeleton by layers without values, in training or stored."""
    layers = [
        Layer(*values) for values in zip(resolved["linears"], resolved["bits"], resolved["input_bits"], strict=True)
    ]
    if resolved["stored"] is None:
        put(model, layers, kind)
        return model
    for layer in layers:
        old: Any = model.get_submodule(layer.name)
        shape = (old.in_features, old.out_features)
        bias = old.bias is not None
        made: nn.Module
        if resolved["stored"] == "integers":
            made = StoredIntegers(*shape, bias=bias)
        else:
            made = Stored(*shape, bias, layer.bits, layer.input_bits, scale_ndim)
        model.set_submodule(layer.name, made)
    return model


def store(model: nn.Module) -> dict[str, Any]:
    """Packs the layers in training, in place; returns what changes in what was resolved."""
    found = {name: part for name, part in model.named_modules() if isinstance(part, FakeQuantised)}
    integers = all(part.bits == part.input_bits == 8 for part in found.values())
    for name, part in found.items():
        model.set_submodule(name, part.stored_for_kernel() if integers else part.stored())
    return {"stored": "integers" if integers else "packed"}


def simulated(config: Any) -> bool:
    """Whether nothing multiplies these layers as they are stored: kernels take 8 bits for weights and activations."""
    return (config.weight_bits, config.activation_bits) != (8, 8) or no_kernel()
