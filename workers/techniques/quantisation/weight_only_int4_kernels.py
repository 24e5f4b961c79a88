"""PyTorch's products with 4-bit weights as they are stored, one for each device: bfloat16 factors, float32 sums.

The format is tinygemm's, that of :func:`workers.techniques.quantisation.shared_affine.grouped_int4`: ``w = (q - 8) * scale + zero``, scale and zero of groups of a
row in bfloat16. The kernels differ in how they lay the weights out and in the shapes that they take; what is short of those is
padded with zeros in the kernel's own copy. Shapes: O out-features, I in-features, G groups a row, M tokens.

- CPU: ``_weight_int4pack_mm_for_cpu``, O a multiple of 16.
- CUDA: ``_weight_int4pack_mm``, tensor cores of compute capability 8.0 or later, O a multiple of 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.techniques.quantisation.shared_affine import unpack_nibbles

OUT_MULTIPLE = {"cpu": 16, "cuda": 8}

TILE = 16
"""Columns of a tile of CUDA's layout, which packs 2, 4 or 8 of them together: the more, the wider its loads."""


@dataclass(frozen=True)
class Int4Weight:
    """What a kernel takes.

    Attributes:
        layout: of the device's kernel.
        pairs: (G, O, 2) bfloat16, scale and zero.
    """

    layout: Tensor
    pairs: Tensor
    group_size: int
    out_features: int


def lacking(device: str) -> str | None:
    """Returns why the kernel of a device kind cannot run here, or None; None too where no such device is at hand to ask."""
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the 4-bit kernel needs a CUDA device of compute capability 8.0 or later"
    return None


def pack(stored: Tensor, scale: Tensor, zero: Tensor, columns: int, group_size: int) -> Int4Weight:
    """Lays weights out for the kernel of the device that they lie on.

    Args:
        stored: (O, bytes) uint8, of :func:`workers.techniques.quantisation.shared_affine.pack_nibbles`.
        scale, zero: (O, G) bfloat16.
        columns: I.
    """
    device = stored.device.type
    below = -len(stored) % OUT_MULTIPLE[device]
    q = F.pad(unpack_nibbles(stored, columns), (0, -columns % group_size, 0, below))
    pairs = F.pad(torch.stack((scale, zero), 2), (0, 0, 0, 0, 0, below)).transpose(0, 1).contiguous()
    if device == "cuda":
        layout = torch.ops.aten._convert_weight_to_int4pack(neighbours(q), tiles(q.shape[1]))
    else:
        layout = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    return Int4Weight(layout, pairs, group_size, len(stored))


def neighbours(q: Tensor) -> Tensor:
    """Packs q (O, I) uint8 below 16 into (O, I / 2): each byte two neighbours of a row, the first in the high nibble."""
    return (q[:, ::2] << 4 | q[:, 1::2]).contiguous()


def tiles(columns: int) -> int:
    """Returns how many tiles of :data:`TILE` columns the layout packs together; ``columns`` is a multiple of 32."""
    return next(count for count in (8, 4, 2) if columns % (count * TILE) == 0)


def product(rows: Tensor, weight: Int4Weight) -> Tensor:
    """rows (M, I) bfloat16 -> (M, O) bfloat16."""
    kernel = torch.ops.aten._weight_int4pack_mm if rows.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
    padded = F.pad(rows, (0, -rows.shape[1] % weight.group_size)).contiguous()
    found: Tensor = kernel(padded, weight.layout, weight.group_size, weight.pairs)
    return found[:, : weight.out_features]
