"""Affine quantisation of linear layers: which layers, choosing scales, rounding, packing two weights a byte.

The arithmetic is that of torchao's primitives (``SYMMETRIC`` per row for 8 bits, the tinygemm form for 4 bits), written
out because the worker also runs where torchao is not installed; a test holds the two equal. Shapes: O out-features,
I in-features, G groups a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = torch.finfo(torch.float32).eps  # smallest scale, as torchao and torch.ao: a row of zeros has no scale


def linears(model: nn.Module, *, skip_head: bool) -> dict[str, nn.Linear]:
    """Returns every linear layer by name; ``skip_head`` leaves out the classifier heads (``head``, ``head_dist``)."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and not (skip_head and name.split(".")[0] in ("head", "head_dist"))
    }


def symmetric_int8(weight: Tensor, *, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Quantises to 8 bits around zero: ``weight ~ q * scale``, at most half a step off.

    Args:
        weight: (O, I) any floating type.
        per_channel: one scale a row, else one for all.

    Returns:
        q (O, I) int8 in [-128, 127]; scale (O,) or () float32 = max |weight| / 127.5.
    """
    values = weight.detach().float()
    peak = values.abs().amax(1) if per_channel else values.abs().amax()
    scale = (peak / 127.5).clamp_min(_EPS)
    step = scale[:, None] if per_channel else scale
    return (values * (1.0 / step)).round().clamp(-128, 127).to(torch.int8), scale


def grouped_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises to 4 bits from each group's minimum to its maximum: ``weight ~ (q - 8) * scale + zero``.

    A group is ``group_size`` neighbours of a row; the last of a row is shorter where that does not divide I. Scale and
    zero are bfloat16, as the kernels take them; rounding is against these rounded values.

    Args:
        weight: (O, I) any floating type.

    Returns:
        q (O, I) uint8 in [0, 15]; scale (O, G) and zero (O, G) bfloat16, zero being the value of q = 8.
    """
    values = weight.detach().float()
    rows, columns = values.shape
    padding = -columns % group_size
    padded = F.pad(values[None], (0, padding), mode="replicate")[0] if padding else values
    groups = padded.view(rows, -1, group_size)
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).clamp_min(_EPS).bfloat16()
    zero = (low + scale.float() * 8).bfloat16()
    start = zero.float() - scale.float() * 8
    q = ((groups - start[..., None]) / scale.float()[..., None]).round().clamp(0, 15).to(torch.uint8)
    return q.reshape(rows, -1)[:, :columns].contiguous(), scale, zero


def pack_nibbles(q: Tensor) -> Tensor:
    """Packs q (O, I) uint8 below 16 into (O, ceil(I/2)) uint8: the first half of a row in the low nibbles, the rest in
    the high ones (unpacking is then two contiguous copies, four times as fast as interleaving)."""
    half = (q.shape[1] + 1) // 2
    return q[:, :half] | (F.pad(q[:, half:], (0, 2 * half - q.shape[1])) << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Returns q (O, columns) uint8 from what :func:`pack_nibbles` made."""
    return torch.cat((packed & 15, packed >> 4), 1)[:, :columns]


class KernelLinear(nn.Module, ABC):
    """A linear layer that stores quantised weights as buffers and hands a kernel its own packing of them.

    The packing is derived, so it is a plain attribute: made at first use, never stored, dropped when the buffers move.
    Scales keep their type whatever the model is converted to.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._packing: Any = None

    @abstractmethod
    def pack_for_kernel(self) -> Any:
        """Returns what the kernel takes in place of the buffers."""

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

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
