"""Merging tokens in every block, between the attention residual and the MLP: what ``tome`` and ``pitome`` share.

They differ in which tokens go together, a :class:`Matching`; this file merges them, lets a merged token count as often as
it has sources, and repeats merged tokens for models that pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.tokens.shared_blocks import TokenBlocks, Tokens, attend, key_bias, rows


@dataclass(frozen=True)
class Matching:
    """Which tokens of one block go together.

    Attributes:
        rest: (B, M) int64, rows that stay, in the order of the result; every protected one is among them.
        merged: (B, r) int64, rows that are merged; into: (B, r) int64, the row of the result that takes each.

    A row that is in neither is removed.
    """

    rest: Tensor
    merged: Tensor
    into: Tensor

    def sums(self, x: Tensor) -> Tensor:
        """Adds up the rows of x (B, N, C) that go together; returns (B, M, C)."""
        return rows(x, self.rest).scatter_add(1, self.into[..., None].expand(-1, -1, x.shape[-1]), rows(x, self.merged))

    def destinations(self, num_tokens: int) -> Tensor:
        """Returns (B, N) int64: the row that each of the N tokens has after the merging."""
        batch, left = self.rest.shape
        place = self.rest.new_zeros(batch, num_tokens)
        place.scatter_(1, self.rest, torch.arange(left, device=place.device).expand(batch, -1))
        return place.scatter_(1, self.merged, self.into)


def merge(x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Replaces the tokens that go together by their mean, weighted by size.

    Args:
        x: (B, N, C) tokens.
        size: (B, N, 1) float32, how many original tokens each stands for.

    Returns:
        tokens (B, M, C) in the type of x, sizes (B, M, 1).
    """
    merged_size = matching.sums(size)
    return (matching.sums(x * size) / merged_size).to(x.dtype), merged_size


def attend_sized(attn: Any, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Attends with keys that count as often as their size says.

    Args:
        attn: a timm ``Attention``, or an attention without a map that has an ``attend_sized`` of its own.
        x: (B, N, C), the normalised tokens.

    Returns:
        output (B, N, C), keys averaged over the heads (B, N, D).
    """
    if hasattr(attn, "attend_sized"):
        out, keys = attn.attend_sized(x, tokens.size)
        return out, keys
    out, seen = attend(attn, x, key_bias(tokens))
    return out, seen.k.mean(dim=1)


Match = Callable[[Tensor], Matching | None]
"""Keys averaged over the heads (B, N, D) -> which tokens go together, None where there are none."""


class MergingBlocks(TokenBlocks):
    """timm's ``blocks`` with merging in each.

    Args:
        blocks, prefix: see :class:`TokenBlocks`.
        matches: one a block.
        proportional: proportional attention.
        restore: repeat merged tokens at the end, for models that pool over tokens.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], matches: Sequence[Match], prefix: int, proportional: bool, restore: bool
    ) -> None:
        super().__init__(blocks, prefix)
        self.matches, self.proportional, self.restore = tuple(matches), proportional, restore

    def attend(self, attn: Any, x: Tensor, tokens: Tokens) -> tuple[Tensor, Any]:
        """See :func:`attend_sized`."""
        return attend_sized(attn, x, tokens if self.proportional else replace(tokens, size=None))

    def reduce(self, i: int, block: Any, tokens: Tokens, seen: Any) -> Tokens:
        """Merges what goes together by the keys ``seen`` (B, N, D)."""
        matching = self.matches[i](seen)
        if matching is None:
            return tokens
        row = tokens.row
        if self.restore:
            moved = matching.destinations(tokens.x.shape[1])
            row = moved if row is None else moved.gather(1, row)
        x, size = merge(tokens.x, tokens.weights(), matching)
        return replace(tokens, x=x, size=size, row=row)

    def finish(self, tokens: Tokens) -> Tensor:
        """Returns (B, N', C), or (B, N, C) with ``restore``: its mean is the size-weighted mean."""
        return tokens.x if tokens.row is None else rows(tokens.x, tokens.row)
