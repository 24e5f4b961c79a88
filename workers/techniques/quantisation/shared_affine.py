"""Affine quantisation of linear layers: which layers, choosing scales, rounding, packing any number of bits a weight.

The arithmetic is that of torchao's primitives (``SYMMETRIC`` per row for 8 bits, the tinygemm form in groups), written
out because the worker also runs where torchao is not installed; a test holds the two equal. Shapes: O out-features,
I in-features, G groups a row.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = torch.finfo(torch.float32).eps  # smallest scale, as torchao and torch.ao: a row of zeros has no scale


class NotQuantisable(ValueError):
    """A layer that cannot be quantised; the message names it."""


# --- what can be quantised --------------------------------------------------------------------------------------------


def linears(model: nn.Module, *, skip_head: bool) -> dict[str, nn.Linear]:
    """Returns every linear layer by name; ``skip_head`` leaves out the classifier heads (``head``, ``head_dist``).

    Every quantiser starts here, so here is what all of them refuse.

    Raises:
        NotQuantisable: the model has quantised layers already, or a parameter holds NaN or infinity.
    """
    found = {}
    for name, part in model.named_modules():
        if getattr(part, "quantised", False):
            raise NotQuantisable(
                f"{name or 'the model'} is a {type(part).__name__} already; quantise a model once only"
            )
        if isinstance(part, nn.Linear) and not (skip_head and name.split(".")[0] in ("head", "head_dist")):
            found[name] = part
    require_finite_parameters(model)
    return found


def require_finite_parameters(model: nn.Module) -> None:
    """Raises NotQuantisable where a parameter of any module holds NaN or infinity, and names it.

    Integers have no NaN: one that a bias, a norm or an embedding brings in can leave a quantised layer as an ordinary number,
    and a broken model would pass for a working one. Buffers may hold infinity, as masks do.
    """
    broken = [(name, parameter) for name, parameter in model.named_parameters() if not _finite(parameter)]
    if not broken:
        return
    name, parameter = broken[0]
    owner, _, leaf = name.rpartition(".")
    others = f"; parameters that do: {len(broken)}" if len(broken) > 1 else ""
    raise NotQuantisable(
        f"{_fault(parameter, f'the {leaf} of {owner}' if owner else leaf)}{others}. Train the model again, with a lower "
        "learning rate where it diverged, or start from another checkpoint"
    )


def require_finite(values: Tensor, what: str) -> None:
    """Raises NotQuantisable where ``values`` hold NaN or infinity: they have no scale."""
    if not _finite(values):
        raise NotQuantisable(_fault(values, what))


def _finite(values: Tensor) -> bool:
    """Whether neither NaN nor infinity is in it; what has no values is finite. Extremes take a tenth of isfinite's time."""
    if values.is_meta or not values.is_floating_point() or not values.numel():
        return True
    low, high = torch.aminmax(values.detach())
    return bool(low.isfinite() & high.isfinite())


def _fault(values: Tensor, what: str) -> str:
    wrong = values.detach()[~values.detach().isfinite()]
    return (
        f"{what} must be finite to be quantised; it holds NaN or infinity ({len(wrong)} of {values.numel()} values, "
        f"the first {float(wrong[0]):g})"
    )


# --- rounding ---------------------------------------------------------------------------------------------------------


def symmetric_int8(weight: Tensor, *, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Quantises to 8 bits around zero: ``weight ~ q * scale``, at most half a step off.

    Args:
        weight: (O, I) any floating type.
        per_channel: one scale a row, else one for all.

    Returns:
        q (O, I) int8 in [-128, 127], contiguous; scale (O,) or () float32 = max |weight| / 127.5.
    """
    values = weight.detach().float()
    peak = values.abs().amax(1) if per_channel else values.abs().amax()
    scale = (peak / 127.5).clamp_min(_EPS)
    step = scale[:, None] if per_channel else scale
    return (values * (1.0 / step)).round().clamp(-128, 127).to(torch.int8).contiguous(), scale


def grouped_affine(
    weight: Tensor, bits: int, group_size: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises from each group's minimum to its maximum: ``weight ~ (q - 2^(bits-1)) * scale + zero``.

    A group is ``group_size`` neighbours of a row; the last of a row is shorter where that does not divide I. Rounding is
    against scale and zero as they are stored. A constant group has the smallest scale, and its value as stored.

    Args:
        weight: (O, I) any floating type.
        bits: 1 to 8.
        dtype: of scale and zero; bfloat16 is what the 4-bit kernels take.

    Returns:
        q (O, I) uint8 in [0, 2^bits); scale (O, G) and zero (O, G), zero being the value of q = 2^(bits-1).
    """
    values = weight.detach().float()
    rows, columns = values.shape
    middle, top = 2 ** (bits - 1), 2**bits - 1
    padding = -columns % group_size
    # The last value again: its minimum and maximum are those of the shorter group.
    padded = torch.cat([values, values[:, -1:].expand(-1, padding)], 1) if padding else values
    groups = padded.reshape(rows, -1, group_size)
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / top).clamp_min(_EPS).to(dtype)
    zero = (low + scale.float() * middle).to(dtype)
    start = zero.float() - scale.float() * middle
    q = ((groups - start[..., None]) / scale.float()[..., None]).round().clamp(0, top).to(torch.uint8)
    return q.reshape(rows, -1)[:, :columns].contiguous(), scale, zero


def grouped_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns :func:`grouped_affine` of 4 bits."""
    return grouped_affine(weight, 4, group_size)


# --- packing ----------------------------------------------------------------------------------------------------------


def _planes(bits: int) -> list[int]:
    """Returns the powers of two that sum up to ``bits``, largest first: each divides a byte."""
    if not 1 <= bits <= 15:
        raise ValueError(f"bits must be from 1 to 15, got {bits}")
    return [width for width in (8, 4, 2, 1) if bits & width]


def packed_bytes(columns: int, bits: int) -> int:
    """Returns the bytes of a row of ``columns`` weights: ``bits`` an eighth each, rounded up once a plane."""
    return sum(-(-columns * width // 8) for width in _planes(bits))


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """Packs q (O, I), an integer type below 2^bits, into (O, packed_bytes(I, bits)) uint8, contiguous; bits from 1 to 15.

    The bits are stored in planes of 8, 4, 2 and 1, the lowest bits in the widest plane. In a plane a byte holds weights that
    lie 1/2, 1/4 or 1/8 of a row apart, so that unpacking is contiguous copies (four times as fast as interleaving).
    """
    planes, shift = [], 0
    for width in _planes(bits):
        part = ((q >> shift) & (2**width - 1)).to(torch.uint8)
        count = 8 // width
        stride = -(-q.shape[1] // count)
        parts = F.pad(part, (0, count * stride - q.shape[1])).reshape(len(q), count, stride)
        plane = parts[:, 0]
        for i in range(1, count):
            plane = plane | (parts[:, i] << (i * width))
        planes.append(plane)
        shift += width
    return (planes[0] if len(planes) == 1 else torch.cat(planes, 1)).contiguous()


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Returns q (O, columns) from what :func:`pack_bits` made: uint8 where that is one plane (1, 2, 4, 8 bits), else int32."""
    found: Tensor | None = None
    start, shift, planes = 0, 0, _planes(bits)
    for width in planes:
        count = 8 // width
        stride = -(-columns // count)
        plane = packed[:, start : start + stride]
        part = torch.cat([_field(plane, i, width) for i in range(count)], 1)[:, :columns]
        if len(planes) > 1:
            part = part.int() << shift  # the ONNX exporter mistakes the type of a shifted uint8
        found = part if found is None else found | part
        start, shift = start + stride, shift + width
    assert found is not None
    return found


def _field(plane: Tensor, i: int, width: int) -> Tensor:
    low = i * width
    if low + width < 8:  # the highest has nothing above it
        plane = plane & ((2**width - 1) << low)
    return plane >> low if low else plane


def pack_nibbles(q: Tensor) -> Tensor:
    """Packs q (O, I) uint8 below 16 into (O, ceil(I/2)) uint8: the first half of a row lies in the low nibbles."""
    return pack_bits(q, 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Returns q (O, columns) uint8 from what :func:`pack_nibbles` made."""
    return unpack_bits(packed, 4, columns)


# --- layers -----------------------------------------------------------------------------------------------------------


class Quantised(nn.Module, ABC):
    """A layer that stores quantised weights as buffers. Scales keep their type whatever the model is converted to."""

    quantised = True  # see linears

    def plain(self) -> nn.Module | None:
        """Returns the layer with the same weights in float32 and no quantiser, which is what it counts as.

        None where the model from before the conversion tells that.
        """
        return None


class QuantisedLinear(Quantised):
    """A linear layer that does."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedLinear(QuantisedLinear):
    """One that no kernel multiplies: each call unpacks its weights and does the ordinary product."""

    bias: Tensor | None

    @abstractmethod
    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight (O, I) in ``dtype``."""

    def activations(self, x: Tensor) -> Tensor:
        """Returns x (..., I) as this layer's quantiser of activations leaves it; as it is without one."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) any floating type -> (..., O) same type."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(self.activations(x), self.dequantised(x.dtype), bias)

    def plain(self) -> nn.Linear:
        """Returns what it counts as and is timed as."""
        return plain_linear(self.dequantised(torch.float32), self.bias)


def bias_like(linear: Any) -> Tensor | None:
    """Returns a bias of the layer's size and type without values, which a layer that takes its place will have; None without one."""
    return None if linear.bias is None else torch.empty_like(linear.bias, device="meta", requires_grad=False)


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Returns a layer of weight (O, I) and bias (O,)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def unquantised(model: nn.Module) -> nn.Module:
    """Returns a copy with the :meth:`Quantised.plain` layers in it; the model itself where it has none.

    That is the unquantised twin of a model that was quantised in its training, where none was stored.
    """
    plain = {name: part.plain() for name, part in model.named_modules() if isinstance(part, Quantised)}
    found = {name: layer for name, layer in plain.items() if layer is not None}
    if not found:
        return model
    twin = copy.deepcopy(model)
    for name, layer in found.items():
        twin.set_submodule(name, layer)
    return twin.eval()


class KernelLinear(QuantisedLinear):
    """One that hands a kernel its own packing of the buffers.

    The packing is derived, so it is a plain attribute: made at first use, never stored, dropped when the buffers move.
    Kernels read memory as it lies: what they get is contiguous, however the buffers came to lie.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self._packing: Any = None

    @abstractmethod
    def pack_for_kernel(self) -> Any:
        """Returns what the kernel takes in place of the buffers, from contiguous copies of those that are not."""

    @property
    def packing(self) -> Any:
        """The kernel's packing of the buffers."""
        if self._packing is None:
            self._packing = self.pack_for_kernel()
        return self._packing

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._packing = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packing = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packing": None}
