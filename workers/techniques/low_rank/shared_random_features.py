"""Positive orthogonal random features, whose products approximate the softmax kernel.

Source: Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794, sections 2.3 and 2.4 (FAVOR+).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.low_rank.shared_attention import LowRankAttention
from workers.techniques.record import Surroundings


class RandomFeatureAttention(LowRankAttention):
    """An attention whose random features come from a projection (m, D) float32, a buffer that is stored with the weights."""

    projection: Tensor

    def __init__(self, attn: Any, projection: Tensor) -> None:
        super().__init__(attn)
        self.register_buffer("projection", projection)

    def keep_dims(self, dims: Tensor) -> None:
        """Leaves the given head dimensions, (d,) of queries and keys; the features of those stay what they are."""
        self.projection = self.projection[:, dims]


def feature_count(head_dim: int, share: float = 1.0) -> int:
    """Returns int(D ln D) times ``share``, 266 for D = 64: theorem 4 of the paper asks for this order of magnitude."""
    return max(1, int(share * int(head_dim * math.log(head_dim))))


def orthogonal_projection(features: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """Draws (features, D) float32 directions: each row like a standard normal vector, rows of a block of D orthogonal.

    Haar-distributed orthogonal matrices, stacked and cut; lengths are those of independent normal vectors (chi).
    """
    blocks = []
    for _ in range(0, features, head_dim):
        normal = torch.randn(head_dim, head_dim, generator=generator, device=generator.device)
        q, r = torch.linalg.qr(normal)
        blocks.append(q * r.diagonal().sign())  # a QR with a positive diagonal is unique, which makes q Haar
    lengths = torch.randn(features, head_dim, generator=generator, device=generator.device).square().sum(dim=1).sqrt()
    return lengths[:, None] * torch.cat(blocks)[:features]


def positive_features(q: Tensor, k: Tensor, projection: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns features with exp(scale q_i k_j) ~ exp(offset_i) (query feature_i . key feature_j).

    phi(x) = exp(W x - |x|^2 / 2) / sqrt(m) of x times sqrt(scale), which is D^-1/4. Every feature is at most 1; each
    query has one and, for each feature, some key has one that is exactly 1.

    Args:
        q, k: (..., N, D) of one type, float32 or wider.
        projection: (m, D) of that type.

    Returns:
        query features (..., N, m), key features (..., N, m), offset (..., N, 1).
    """
    directions = (projection * math.sqrt(scale)).transpose(0, 1)
    a = q @ directions - q.square().sum(dim=-1, keepdim=True) * (scale / 2)
    b = k @ directions - k.square().sum(dim=-1, keepdim=True) * (scale / 2)
    top = b.detach().amax(dim=-2, keepdim=True)
    a = a + top
    best = a.detach().amax(dim=-1, keepdim=True)
    return (a - best).exp(), (b - top).exp(), best - math.log(projection.shape[0])


def draw_projections(model: nn.Module, share: float, surroundings: Surroundings) -> list[Tensor]:
    """Draws the projection of every block, for its own head dimension, onto the device of its weights."""
    vit: Any = model
    drawn = []
    for block in vit.blocks:
        dim = block.attn.head_dim
        drawn.append(orthogonal_projection(feature_count(dim, share), dim, surroundings.generator))
    return [d.to(surroundings.device) for d in drawn]


def empty_projections(model: nn.Module, features: list[int]) -> list[Tensor]:
    """Returns projections without values, for a structure whose tensors come later."""
    vit: Any = model
    sizes = [(m, block.attn.head_dim) for m, block in zip(features, vit.blocks, strict=True)]
    return [torch.empty(size, device=vit.patch_embed.proj.weight.device) for size in sizes]
