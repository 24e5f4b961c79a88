"""ToMe: merges similar tokens in every block, between the attention residual and the MLP.

Source: Bolya et al., Token Merging: Your ViT But Faster, arXiv 2210.09461, section 3 and appendix D.
Differs from the paper: class, distillation and register tokens are all protected; proportional attention is an additive
mask, so fused attention stays; where a model pools over tokens, the merged ones are repeated before the pooling, which
makes a mean the size-weighted mean.
Saves MACs, time and activation memory; the size of the model stays. Needs no training and gains from it.
Not covered: gradient checkpointing, attention masks, intermediate features (timm iterates over the blocks there and so
passes by the merging).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from workers.techniques.record import Applied, ModelInfo, Surroundings, Technique, choice, number

SHAPES = {"decreasing": -1, "constant": 0, "increasing": 1}
"""The paper's schedule parameter f: the sign of the slope of r over the blocks."""


@dataclass(frozen=True)
class Config:
    """Average number of tokens to merge in a block, and how it is spread over the blocks."""

    r: int = number(8, 0, 64, 1, search=(1, 16, 1), doc="tokens merged in a block, mean over the blocks")
    schedule: str = choice("constant", tuple(SHAPES), doc="how r changes from the first block to the last")
    proportional_attention: bool = choice(
        True, (True, False), search=(True,), doc="a merged token counts as often as it has sources"
    )


# --- mathematics ------------------------------------------------------------------------------------------------------


def reductions(r: int, shape: int, depth: int) -> list[int]:
    """Returns the tokens to merge in each block: linear from int(r (1 - f)) to 2r minus that, then cut to integers.

    Args:
        shape: f, one of -1, 0, 1. (16, -1) over 12 blocks is [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0].
    """
    if depth == 1:
        return [r]
    first = int(r * (1 - shape))
    last = 2 * r - first
    return [int(first + (last - first) * i / (depth - 1)) for i in range(depth)]


def token_counts(num_tokens: int, prefix: int, merged: Iterable[int]) -> list[int]:
    """Returns the sequence length after each block; a block merges at most half of its unprotected tokens."""
    counts = []
    for r in merged:
        num_tokens -= min(r, (num_tokens - prefix) // 2)
        counts.append(num_tokens)
    return counts


@dataclass(frozen=True)
class Matching:
    """Which tokens of one block go together, as indices into the halves A (even positions) and B (odd positions).

    Attributes:
        merged: (B, r, 1) rows of A to merge; into: (B, r, 1) the row of B that each is merged into.
        kept: (B, A - r, 1) the other rows of A, ascending.
        prefix: protected tokens in front, outside both halves.
    """

    merged: Tensor
    into: Tensor
    kept: Tensor
    prefix: int

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Splits the unprotected rows of x (B, N, C) by their position in the whole sequence: even, odd."""
        start = self.prefix % 2
        return x[:, self.prefix + start :: 2], x[:, self.prefix + 1 - start :: 2]

    def sums(self, x: Tensor) -> Tensor:
        """Adds up the rows of x (B, N, C) that go together; returns (B, N - r, C) as [prefix ; kept of A ; B]."""
        a, b = self.halves(x)
        width = (-1, -1, x.shape[-1])
        b = b.scatter_add(1, self.into.expand(width), a.gather(1, self.merged.expand(width)))
        return torch.cat([x[:, : self.prefix], a.gather(1, self.kept.expand(width)), b], dim=1)

    def destinations(self, num_tokens: int) -> Tensor:
        """Returns (B, N) int64: the row that each of the N tokens has after the merging."""
        batch, kept = self.kept.shape[:2]
        place = self.merged.new_empty(batch, num_tokens)
        place[:, : self.prefix] = torch.arange(self.prefix, device=place.device)
        a, b = self.halves(place[..., None])
        a.scatter_(1, self.kept, torch.arange(kept, device=place.device)[:, None].expand(batch, -1, 1) + self.prefix)
        a.scatter_(1, self.merged, self.into + self.prefix + kept)
        b[:] = torch.arange(b.shape[1], device=place.device)[:, None] + self.prefix + kept
        return place


def match(metric: Tensor, r: int, prefix: int) -> Matching | None:
    """Pairs each token of A with its most similar one of B and takes the r best pairs (bipartite soft matching).

    Args:
        metric: (B, N, D) what similarity is measured on: keys averaged over the heads.
        r: tokens to remove; cut to half of the unprotected ones.
        prefix: protected tokens in front.

    Returns:
        None where there is nothing to merge.
    """
    r = min(r, (metric.shape[1] - prefix) // 2)
    if r <= 0:
        return None
    metric = F.normalize(metric.detach().float(), dim=-1)
    start = prefix % 2
    a, b = metric[:, prefix + start :: 2], metric[:, prefix + 1 - start :: 2]
    score, partner = (a @ b.transpose(1, 2)).max(dim=-1)
    best = score.argsort(dim=-1, descending=True, stable=True)
    merged, kept = best[:, :r], best[:, r:].sort(dim=-1).values
    return Matching(merged[..., None], partner.gather(1, merged)[..., None], kept[..., None], prefix)


def merge(x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Replaces the tokens that go together by their mean, weighted by size.

    Args:
        x: (B, N, C) tokens.
        size: (B, N, 1) float32, how many original tokens each stands for.

    Returns:
        tokens (B, N - r, C) in the type of x, sizes (B, N - r, 1).
    """
    merged_size = matching.sums(size)
    return (matching.sums(x * size) / merged_size).to(x.dtype), merged_size


def attend(attn: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes timm's ``Attention.forward`` with keys weighted by token size.

    Args:
        attn: a timm ``Attention``; its own num_heads and head_dim are used (pruned models differ).
        x: (B, N, C); size: (B, N, 1), None where every token counts once.

    Returns:
        output (B, N, C), keys averaged over the heads (B, N, D).
    """
    B, N, _ = x.shape
    gate = attn.gate(x).sigmoid() if attn.gate is not None else None
    q, k, v = attn.qkv(x).reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    # softmax(q k + log s) counts a key of size s as s equal keys.
    mask = None if size is None else size.log().transpose(1, 2)[:, None].to(q.dtype)
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=attn.scale)
    out = attn.norm(out.transpose(1, 2).reshape(B, N, attn.attn_dim))
    out = attn.proj(out if gate is None else out * gate)
    return attn.proj_drop(out), k.mean(dim=1)


# --- module -----------------------------------------------------------------------------------------------------------


class MergingBlocks(nn.ModuleList):
    """timm's ``blocks`` with merging: the same children under the same names, and sizes passed from block to block.

    Args:
        blocks: timm ``Block`` modules.
        merged: tokens to merge in each.
        prefix: protected tokens in front.
        proportional: proportional attention.
        restore: repeat merged tokens at the end, for models that pool over tokens.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], merged: list[int], prefix: int, proportional: bool, restore: bool
    ) -> None:
        super().__init__(blocks)
        self.merged, self.prefix, self.proportional, self.restore = merged, prefix, proportional, restore

    def forward(self, x: Tensor) -> Tensor:
        """Runs the blocks on x (B, N, C); returns (B, N', C), or (B, N, C) with ``restore``."""
        size: Tensor | None = None
        row: Tensor | None = None
        block: Any
        for block, r in zip(self, self.merged, strict=True):
            out, metric = attend(block.attn, block.norm1(x), size if self.proportional else None)
            x = x + block.drop_path1(block.ls1(out))
            if matching := match(metric, r, self.prefix):
                if self.restore:
                    moved = matching.destinations(x.shape[1])
                    row = moved if row is None else moved.gather(1, row)
                ones = torch.ones(*x.shape[:2], 1, device=x.device)
                x, size = merge(x, ones if size is None else size, matching)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x if row is None else x.gather(1, row[..., None].expand(-1, -1, x.shape[-1]))


# --- record -----------------------------------------------------------------------------------------------------------


def _check(info: ModelInfo, config: Config) -> str | None:
    merged = reductions(config.r, SHAPES[config.schedule], info.depth)
    left = token_counts(info.num_tokens, info.num_prefix_tokens, merged)[-1]
    if left == info.num_tokens:
        return f"r={config.r} merges none of {info.num_tokens} tokens ({info.num_prefix_tokens} are protected)"
    return None


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    vit: Any = model  # timm is not typed
    for name, block in vit.blocks.named_children():
        if not isinstance(block.attn, Attention) or not hasattr(block, "drop_path2"):
            raise ValueError(
                f"tome: blocks.{name} must be timm's Block with timm's Attention, "
                f"found {type(block).__name__} with {type(block.attn).__name__}"
            )
    if vit.grad_checkpointing:
        raise ValueError("tome: gradient checkpointing must be off, it passes by the merging")
    merged = reductions(config.r, SHAPES[config.schedule], len(vit.blocks))
    resolved = {
        "merged": merged,
        "prefix": vit.num_prefix_tokens,
        "proportional": config.proportional_attention,
        "restore": vit.global_pool != "token",
    }
    return Applied(_rebuild(model, resolved), resolved, [f"blocks.{i}" for i, r in enumerate(merged) if r])


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    vit: Any = model
    vit.blocks = MergingBlocks(vit.blocks, **resolved)
    return model


TECHNIQUE = Technique(
    name="tome",
    family="token_reduction",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    identity={"r": 0},
    source="Token Merging: Your ViT But Faster, arXiv 2210.09461, section 3",
)
