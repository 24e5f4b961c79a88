"""Nystrom attention: three small softmax products through landmarks instead of one of N by N.

Source: Xiong et al., Nystromformer, arXiv 2102.03902, section 3 and algorithm 1.
Differs from the paper: no depthwise convolution beside the attention (the weights are a trained exact attention's); the
inverse starts from the largest column sum of each batch element and head, so that an image's result does not depend on
the others in its batch; segments may differ in length by one, so any N goes; the inverse is calculated in float32 at least.
Size is unchanged. Costs more than exact attention on short sequences: at 224 px (N = 197) m = 64 with 6 iterations costs
about twice the exact product; it pays from about N = 577 (384 px) on.
Not covered: attention masks (hence no proportional attention), dropout of attention weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from workers.techniques.record import Applied, ModelInfo, Surroundings, Technique, number


@dataclass(frozen=True)
class Config:
    """How many landmarks stand for the sequence, and how well their matrix is inverted."""

    landmarks: int = number(64, 4, 128, 1, search=(24, 96, 8), doc="segment means that stand for the N tokens")
    iterations: int = number(6, 1, 20, 1, search=(2, 6, 2), doc="steps of the iterative pseudo-inverse")


# --- mathematics ------------------------------------------------------------------------------------------------------


def segment_means(x: Tensor, m: int) -> Tensor:
    """Averages x (..., N, D) over m consecutive segments; returns (..., m, D).

    With s = N // m, the first (s + 1) m - N segments have s tokens, the rest s + 1.
    """
    N = x.shape[-2]
    s = N // m
    short = (s + 1) * m - N
    head, tail = x[..., : short * s, :], x[..., short * s :, :]
    front = head.reshape(*x.shape[:-2], short, s, x.shape[-1]).mean(dim=-2)
    if short == m:
        return front
    back = tail.reshape(*x.shape[:-2], m - short, s + 1, x.shape[-1]).mean(dim=-2)
    return torch.cat([front, back], dim=-2)


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """Approximates the pseudo-inverse of a (B, H, m, m), whose rows sum to 1, by a third-order Newton iteration.

    Z0 = A^T / (largest column sum), Z <- Z/4 (13 I - AZ (15 I - AZ (7 I - AZ))): equation 11 of the paper. The largest
    row sum, which it also divides by, is 1.
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.transpose(-1, -2) / a.sum(dim=-2).amax(dim=-1)[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def nystrom_attention(q: Tensor, k: Tensor, v: Tensor, landmarks: int, iterations: int, scale: float) -> Tensor:
    """Approximates softmax(scale q k^T) v; exact where there are as many landmarks as tokens, or more.

    Args:
        q, k, v: (B, H, N, D) of one float type.

    Returns:
        (B, H, N, D) in the type of q.
    """
    if landmarks >= q.shape[-2]:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    ql, kl = segment_means(q, landmarks), segment_means(k, landmarks)
    summary = F.scaled_dot_product_attention(ql, k, v, scale=scale)
    # 8 bits of mantissa do not converge; autocast would bring them back.
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        core = (ql.to(wide) @ kl.to(wide).transpose(-1, -2) * scale).softmax(dim=-1)
        summary = (pseudo_inverse(core, iterations) @ summary.to(wide)).to(q.dtype)
    return F.scaled_dot_product_attention(q, kl, summary, scale=scale)


# --- module -----------------------------------------------------------------------------------------------------------


class NystromAttention(nn.Module):
    """Takes the place of a timm ``Attention``: the same children under the same names, hence the same state dict."""

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Module
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, attn: Any, landmarks: int, iterations: int) -> None:
        super().__init__()
        self.landmarks, self.iterations = landmarks, iterations
        self.num_heads, self.head_dim, self.attn_dim = attn.num_heads, attn.head_dim, attn.attn_dim
        self.scale = attn.scale
        for name in ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"):
            setattr(self, name, getattr(attn, name))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attends over x (B, N, C); returns (B, N, C).

        Raises:
            ValueError: for a mask, which an attention without an attention map cannot honour.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("nystrom: attention masks are not possible, there is no N by N map to mask")
        B, N, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        out = nystrom_attention(self.q_norm(q), self.k_norm(k), v, self.landmarks, self.iterations, self.scale)
        out = self.norm(out.transpose(1, 2).reshape(B, N, self.attn_dim))
        out = self.proj(out if gate is None else out * gate)
        return cast(Tensor, self.proj_drop(out))


# --- record -----------------------------------------------------------------------------------------------------------


def _check(info: ModelInfo, config: Config) -> str | None:
    if config.landmarks >= info.num_tokens:
        return (
            f"landmarks={config.landmarks} must be below the {info.num_tokens} tokens: otherwise it is exact attention"
        )
    return None


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    vit: Any = model  # timm is not typed
    for name, block in vit.blocks.named_children():
        if not isinstance(block.attn, Attention):
            raise ValueError(f"nystrom: blocks.{name}.attn must be timm's Attention, found {type(block.attn).__name__}")
    resolved = {"landmarks": config.landmarks, "iterations": config.iterations}
    return Applied(_rebuild(model, resolved), resolved, [f"blocks.{i}.attn" for i in range(len(vit.blocks))])


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    vit: Any = model
    for block in vit.blocks:
        block.attn = NystromAttention(block.attn, **resolved)
    return model


TECHNIQUE = Technique(
    name="nystrom",
    family="low_rank_attention",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    source="Nystromformer, arXiv 2102.03902, section 3",
)
