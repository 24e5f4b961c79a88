"""Gates in the places where timm has a norm that is an identity: factors of heads, head dimensions and MLP dimensions.

No linear layer is wrapped, so whatever works on these still finds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def open_gates(scores: Sequence[Tensor], ratio: float, round_to: int) -> list[Tensor]:
    """Returns which gates stay open: those above one threshold over all blocks, their number rounded in each block.

    Args:
        scores: (n,) a block, the larger the better.
        ratio: share of all to close.
        round_to: open ones of a block are a multiple of this, at least one multiple, or all.

    Returns:
        (n,) bool a block.
    """
    joined = torch.cat(list(scores))
    best = joined.argsort(descending=True, stable=True)[: max(1, round(len(joined) * (1 - ratio)))]
    above = torch.zeros_like(joined, dtype=torch.bool).index_fill(0, best, True)
    masks = []
    for score, chosen in zip(scores, torch.split(above, [len(s) for s in scores]), strict=True):
        left = chosen.sum()
        # Tensors to the end: this runs before every training step, and looking would wait for the device.
        rounded = (left / round_to).round().clamp(min=1) * round_to
        count = torch.where(left == len(score), left, rounded)
        masks.append(score.argsort(descending=True, stable=True).argsort() < count)
    return masks


class Gate(nn.Module):
    """A learned factor for each entry of the last dimension, in the place of timm's norm there, which is an identity.

    Soft while gates are learned; otherwise those that are not ``is_open`` are 0. Training learns them until they are
    ``closed``.

    Args:
        entries: n, the size of the dimension.
    """

    is_open: Tensor

    def __init__(self, entries: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(entries, device=device))
        self.register_buffer("is_open", torch.ones(entries, dtype=torch.bool, device=device))
        self.closed = False

    def decided(self) -> bool:
        """Whether gates that are not open count as removed."""
        return self.closed or not self.training

    def factors(self) -> Tensor:
        """Returns (n,), differentiable."""
        return self.weight * self.is_open if self.decided() else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies x (..., n)."""
        return x * self.factors().to(x.dtype)


class HeadGates(nn.Module):
    """Gates of the values of all heads, in the place of timm's norm before the projection.

    Args:
        heads: of H heads, or None; dims: of D dimensions, the same module that gates the queries, or None.
    """

    def __init__(self, heads: Gate | None, dims: Gate | None, num_heads: int) -> None:
        super().__init__()
        self.heads, self.dims, self.num_heads = heads, dims, num_heads

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies x (B, N, H D)."""
        parts = x.reshape(*x.shape[:2], self.num_heads, -1)
        if self.heads is not None:
            parts = parts * self.heads.factors()[:, None].to(x.dtype)
        if self.dims is not None:
            parts = self.dims(parts)
        return parts.reshape(x.shape)


class GatedKeys(nn.Module):
    """timm's norm of the keys; keys of closed heads and dimensions are 0, for what looks at keys alone (token merging).

    Args:
        norm: the norm whose place it takes; heads, dims: see :class:`HeadGates`.
    """

    def __init__(self, norm: nn.Module, heads: Gate | None, dims: Gate | None) -> None:
        super().__init__()
        self.norm, self.heads, self.dims = norm, heads, dims

    def forward(self, k: Tensor) -> Tensor:
        """Normalises k (B, H, N, D)."""
        k = self.norm(k)
        if self.heads is not None and self.heads.decided():
            k = k * self.heads.is_open[:, None, None]
        if self.dims is not None and self.dims.decided():
            k = k * self.dims.is_open
        return k
