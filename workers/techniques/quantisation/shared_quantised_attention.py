"""Attention whose queries, keys, values and map are quantised; what ``fq_vit`` and ``repq_vit`` share.

Quantisers are modules that calibration watches from outside: while ``calibrating`` they pass everything on. They simulate: codes
are rounded as an integer kernel would, and the products are floating. Shapes: B, H heads, N tokens, D head dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from workers.techniques.quantisation.shared_calibration import asymmetric
from workers.techniques.record import ModelInfo

ATTENTION_CHILDREN = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")


class RangeQuantiser(nn.Module, ABC):
    """A quantiser whose scale comes from the range of what it gets."""

    calibrating = False

    @abstractmethod
    def fix(self, low: float, high: float) -> None:
        """Takes the range that calibration found and starts to quantise."""


class UniformQuantiser(RangeQuantiser):
    """``x ~ (q - zero) * scale`` for a whole tensor: ``scale`` () float32, ``zero`` () uint8."""

    scale: Tensor
    zero: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.empty((), device="meta"))
        self.register_buffer("zero", torch.empty((), dtype=torch.uint8, device="meta"))

    def fix(self, low: float, high: float) -> None:
        self.put(*asymmetric(low, high, self.bits))

    def put(self, scale: float, zero: int) -> None:
        """Takes a scale and a zero point from 0 to 2^bits - 1, and starts to quantise."""
        self.scale = torch.tensor(scale, dtype=torch.float32)
        self.zero = torch.tensor(zero, dtype=torch.uint8)
        self.calibrating = False

    def codes(self, x: Tensor) -> Tensor:
        """Returns the codes of x, float32 from 0 to 2^bits - 1."""
        return (x.float() / self.scale + self.zero).round_().clamp_(0, 2**self.bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x rounded, in its own type."""
        return x if self.calibrating else ((self.codes(x) - self.zero) * self.scale).to(x.dtype)


class QuantisedAttention(nn.Module):
    """Takes the place of a timm ``Attention``: the same children under the same names, and quantisers.

    Args:
        softmax: logits (B, H, N, N) -> attention weights, quantised.
        bits: of queries, keys and values.
    """

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, attn: Any, softmax: nn.Module, bits: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = attn.num_heads, attn.head_dim, attn.attn_dim
        self.scale, self.fused_attn = attn.scale, False
        for name in ATTENTION_CHILDREN:
            setattr(self, name, getattr(attn, name))
        self.q_quant, self.k_quant, self.v_quant = (UniformQuantiser(bits) for _ in range(3))
        self.softmax = softmax

    def attend_quantised(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Attends over x (B, N, C).

        Args:
            bias: added to the scaled logits before they are quantised, so that a merged token's size counts; or None.

        Returns:
            output (B, N, C), quantised queries and keys (B, H, N, D).
        """
        B, N, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = self.q_quant(self.q_norm(q)), self.k_quant(self.k_norm(k)), self.v_quant(v)
        logits = (q @ k.transpose(-1, -2)) * self.scale
        weights = self.softmax(logits if bias is None else logits + bias.to(logits.dtype))
        out = self.norm((weights.to(v.dtype) @ v).transpose(1, 2).reshape(B, N, self.attn_dim))
        return self.proj_drop(self.proj(out if gate is None else out * gate)), q, k

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attends over x (B, N, C); returns (B, N, C). ``attn_mask`` is added to the logits.

        Raises:
            ValueError: for a mask that is not additive.
        """
        if is_causal or (attn_mask is not None and attn_mask.dtype == torch.bool):
            raise ValueError("quantised attention takes additive masks only")
        return self.attend_quantised(x, attn_mask)[0]


def attention_fault(info: ModelInfo) -> str | None:
    """Returns why no :class:`QuantisedAttention` can take the place of a model's attentions, or None."""
    if info.attention == "Attention":
        return None
    return f"quantises inside timm's Attention; here the blocks have {info.attention}"


def replace_attention(model: nn.Module, softmax: Callable[[], nn.Module], bits: int) -> list[str]:
    """Quantises every timm ``Attention`` of the blocks; those without a map stay. Returns the names of what was replaced."""
    vit: Any = model
    names = []
    for name, block in vit.blocks.named_children():
        if type(block.attn) is Attention:
            block.attn = QuantisedAttention(block.attn, softmax(), bits)
            names.append(f"blocks.{name}.attn")
    return names


def quantisers(model: nn.Module) -> Iterator[tuple[str, RangeQuantiser]]:
    """Yields every quantiser of a range, by name."""
    for name, part in model.named_modules():
        if isinstance(part, RangeQuantiser):
            yield name, part
