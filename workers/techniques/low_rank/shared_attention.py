"""What attentions without an N by N map share: the shell around the mathematics, and putting one into every block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

import torch
from timm.layers import Attention
from torch import Tensor, nn

from workers.techniques.record import ModelInfo


class LowRankAttention(nn.Module, ABC):
    """Takes the place of a timm ``Attention``: the same children under the same names, hence the same weights.

    A subclass supplies :meth:`mix`. Heads, q/k norms, scale, output norm, gate and projection are the replaced
    attention's own, whose dimensions may differ from block to block. Dropout of attention weights is left out: there are
    none to drop.
    """

    technique: ClassVar[str]
    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Module
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = attn.num_heads, attn.head_dim, attn.attn_dim
        self.scale = attn.scale
        for name in ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"):
            setattr(self, name, getattr(attn, name))

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stands for softmax(scale q k^T) v: (B, H, N, D) three times in, once out."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns normalised queries and keys, and values, (B, H, N, D) each, of x (B, N, C)."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def join(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Returns the attention's output (B, N, C) from its input x (B, N, C) and the mixed values (B, H, N, D)."""
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        out = self.norm(mixed.transpose(1, 2).reshape(*x.shape[:2], self.attn_dim))
        return cast(Tensor, self.proj_drop(self.proj(out if gate is None else out * gate)))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attends over x (B, N, C); returns (B, N, C).

        Raises:
            ValueError: for a mask, which an attention without an attention map cannot honour.
        """
        if attn_mask is not None or is_causal:
            raise ValueError(f"{self.technique}: attention masks are not possible, there is no N by N map to mask")
        return self.join(x, self.mix(*self.split(x)))


def as_written(device: torch.device) -> AbstractContextManager[object]:
    """Returns a block in which autocast narrows nothing; on the meta device, which autocast refuses, there is nothing to narrow."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def attention_fault(info: ModelInfo) -> str | None:
    """Returns why no :class:`LowRankAttention` can take the place of a model's attentions, or None."""
    if info.attention == "Attention":
        return None
    return f"takes the place of timm's Attention; here the blocks have {info.attention}"


def require_attention(model: nn.Module, technique: str) -> None:
    """Refuses a model with a block whose attention is not timm's own.

    Raises:
        ValueError: naming the block and what it has.
    """
    vit: Any = model
    for name, block in vit.blocks.named_children():
        if not isinstance(block.attn, Attention):
            raise ValueError(
                f"{technique}: blocks.{name}.attn must be timm's Attention, found {type(block.attn).__name__}"
            )


def replace_attention(model: nn.Module, make: Callable[[Any, int], LowRankAttention]) -> nn.Module:
    """Puts ``make(attention, index of the block)`` in the place of every block's attention; returns the model."""
    vit: Any = model
    for index, block in enumerate(vit.blocks):
        block.attn = make(block.attn, index)
    return model


def attention_names(model: nn.Module) -> list[str]:
    """Returns the name of every block's attention."""
    vit: Any = model
    return [f"blocks.{i}.attn" for i in range(len(vit.blocks))]
