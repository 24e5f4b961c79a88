"""ToMe: merges similar tokens in every block, between the attention residual and the MLP.

Source: Bolya et al., Token Merging: Your ViT But Faster, arXiv 2210.09461, section 3 and appendix D.
Differs from the paper: class, distillation and register tokens are all protected; proportional attention is an additive
mask, so fused attention stays; where a model pools over tokens, the merged ones are repeated before the pooling, which
makes a mean the size-weighted mean. In ViLT and METER image tokens are merged, and never with text: see
:mod:`workers.techniques.tokens.tome_joint`.
Saves MACs, time and activation memory; the size of the model stays. Needs no training and gains from it.
Not covered: attention masks and intermediate features (an error).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.backbones import by_backbone
from workers.techniques.record import Applied, ModelInfo, Rule, Surroundings, Technique, choice, number
from workers.techniques.tokens.shared_blocks import best_first, blocks_fault, require_blocks
from workers.techniques.tokens.shared_merging import Matching, MergingBlocks

SHAPES = {"decreasing": -1, "constant": 0, "increasing": 1}
"""The paper's schedule parameter f: the sign of the slope of r over the blocks."""

MOST = 288
"""Largest ``r``: half of METER's 576 patches at 384 px, whose six layers need to merge many at once."""

IMAGE_TOWER = "image_tower"
"""Value of ``where`` that merges in METER's image encoder."""


@dataclass(frozen=True)
class Config:
    """Average number of tokens to merge in a block, and how it is spread over the blocks."""

    r: int = number(8, 0, MOST, 1, search=(1, 16, 1), doc="tokens merged in a block, mean over the blocks")
    schedule: str = choice("constant", tuple(SHAPES), doc="how r changes from the first block to the last")
    proportional_attention: bool = choice(
        True, (True, False), search=(True,), doc="a merged token counts as often as it has sources"
    )
    where: str = choice(
        "layers",
        ("layers", IMAGE_TOWER),
        search=("layers",),
        doc="all layers; in METER the fusion layers, or its image encoder",
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


def match(keys: Tensor, r: int, prefix: int, valid: Tensor | None = None) -> Matching | None:
    """Pairs each token of A (even positions) with its most similar one of B (odd ones) and takes the r best pairs.

    Args:
        keys: (B, N, D) what similarity is measured on, averaged over the heads.
        r: tokens to remove; cut to half of the unprotected ones.
        prefix: protected tokens in front, in neither half.
        valid: (B, N) bool, false for padding: it goes first, and no other token goes into it while there is a better place.

    Returns:
        None where there is nothing to merge. The result has the order [prefix ; rest of A ; B].
    """
    batch, N = keys.shape[:2]
    r = min(r, (N - prefix) // 2)
    if r <= 0:
        return None
    keys = F.normalize(keys.detach().float(), dim=-1)
    place = torch.arange(N, device=keys.device).expand(batch, -1)
    start = prefix % 2
    even, odd = slice(prefix + start, None, 2), slice(prefix + 1 - start, None, 2)
    similarity = keys[:, even] @ keys[:, odd].transpose(1, 2)
    if valid is not None:
        similarity = similarity.masked_fill(~valid[:, None, odd], -2.0)  # below every cosine
    score, partner = similarity.max(dim=-1)
    if valid is not None:
        score = score.masked_fill(~valid[:, even], 2.0)
    order = best_first(score)
    merged, kept = order[:, :r], order[:, r:].sort(dim=-1).values
    return Matching(
        rest=torch.cat([place[:, :prefix], place[:, even].gather(1, kept), place[:, odd]], dim=1),
        merged=place[:, even].gather(1, merged),
        into=partner.gather(1, merged) + prefix + kept.shape[1],
    )


# --- record -----------------------------------------------------------------------------------------------------------


def _counts(info: ModelInfo, config: Config) -> list[int]:
    """Returns the tokens that can be merged and those protected among them, after each layer that merges."""
    depth = info.tower_depth if config.where == IMAGE_TOWER else info.depth
    images = info.num_tokens - info.num_text_tokens
    return token_counts(images, info.num_prefix_tokens, reductions(config.r, SHAPES[config.schedule], depth))


def _check(info: ModelInfo, config: Config) -> str | None:
    if reason := blocks_fault(info):
        return reason
    if config.where == IMAGE_TOWER and info.tower_depth == 0:
        return f"where={IMAGE_TOWER} needs an image encoder of its own, as METER has; {info.family} has none"
    if config.where != IMAGE_TOWER and info.reduces_tokens:
        return f"its layers reduce tokens already; in METER's image encoder it can be done: where={IMAGE_TOWER}"
    images = info.num_tokens - info.num_text_tokens
    if _counts(info, config)[-1] == images:
        return f"r={config.r} merges none of {images} tokens ({info.num_prefix_tokens} are protected)"
    return None


def _after(info: ModelInfo, config: Config) -> ModelInfo:
    if config.where == IMAGE_TOWER and info.tower_depth:
        return replace(info, num_tokens=info.num_text_tokens + _counts(info, config)[-1])
    return replace(info, reduces_tokens=info.num_text_tokens > 0)


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    require_blocks(model, "tome")
    vit: Any = model  # timm is not typed
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
    prefix = resolved["prefix"]
    matches = [partial(match, r=r, prefix=prefix) for r in resolved["merged"]]
    vit.blocks = MergingBlocks(vit.blocks, matches, prefix, resolved["proportional"], resolved["restore"])
    return model


HALVES = dict.fromkeys(("vilt", "meter"), "workers.techniques.tokens.tome_joint")

TECHNIQUE = Technique(
    name="tome",
    family="token_reduction",
    version=1,
    Config=Config,
    stage="surgery",
    apply=by_backbone(_apply, HALVES),
    rebuild=by_backbone(_rebuild, HALVES),
    check=_check,
    identity={"r": 0},
    info_after=_after,
    models=("timm", "vilt", "meter"),
    rules=(
        Rule(("pumer",), "allowed", "ToMe works in the image tower, PuMer in the fusion layers", only_on=("meter",)),
    ),
    source="Token Merging: Your ViT But Faster, arXiv 2210.09461, section 3",
)
