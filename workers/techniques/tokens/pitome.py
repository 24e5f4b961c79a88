"""PiToMe: merges tokens that have many alike, and protects those that are alone.

Source: Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging, arXiv 2405.16148, section 3.
Differs from the paper: the margin starts at 0.75, and a similarity counts from the margin on (the ELU of the difference);
every block protects by energy, where the published code does so in half of them and merges the most similar pairs of all in the others;
class, distillation and register tokens are protected and give no energy; proportional attention is an additive mask, so
fused attention stays; where a model pools over tokens, the merged ones are repeated before the pooling.
Saves MACs, time and activation memory; the size of the model stays. Needs no training and gains from it. Costs one
product of all keys with all keys a block, four times that of ToMe.
Not covered: attention masks and intermediate features (an error).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.record import Applied, ModelInfo, Surroundings, Technique, choice, number
from workers.techniques.tokens.shared_blocks import best_first, blocks_fault, require_blocks, rows
from workers.techniques.tokens.shared_merging import Matching, MergingBlocks

MARGIN = 0.75
"""Cosine from which two tokens of the first block count as alike; falls linearly to 0 after the last."""


@dataclass(frozen=True)
class Config:
    """The share of the unprotected tokens that each block passes on."""

    keep: float = number(
        0.9, 0.5, 1.0, 0.025, search=(0.8, 0.975, 0.025), doc="share of the patch tokens left by each block"
    )
    proportional_attention: bool = choice(
        True, (True, False), search=(True,), doc="a merged token counts as often as it has sources"
    )


# --- mathematics ------------------------------------------------------------------------------------------------------


def merged_counts(patches: int, keep: float, depth: int) -> list[int]:
    """Returns the tokens to merge in each block: each leaves ceil(keep P) of the P that it gets."""
    counts = []
    for _ in range(depth):
        left = math.ceil(keep * patches - 1e-9)
        counts.append(min(patches - left, patches // 2))
        patches -= counts[-1]
    return counts


def margin(layer: int, depth: int) -> float:
    """Returns the margin of a block: 0.75 (1 - l / L)."""
    return MARGIN * (1 - layer / depth)


def energies(cosines: Tensor, margin: float) -> Tensor:
    """Returns (B, P): E_i = mean over j of ELU(cosine_ij - margin); high where a token has many alike.

    Args:
        cosines: (B, P, P).
    """
    return F.elu(cosines - margin).mean(dim=-1)


def match(keys: Tensor, r: int, margin: float, prefix: int) -> Matching | None:
    """Takes the 2r tokens of the highest energy and merges every second one into the most similar of the others.

    Args:
        keys: (B, N, D) what similarity is measured on, averaged over the heads.
        r: tokens to remove; at most half of the unprotected ones.
        prefix: protected tokens in front.

    Returns:
        None where there is nothing to merge. The result has the order [prefix ; protected ; other half of the 2r].
    """
    batch, N = keys.shape[:2]
    if r <= 0:
        return None
    keys = F.normalize(keys[:, prefix:].detach().float(), dim=-1)
    order = best_first(energies(keys @ keys.transpose(1, 2), margin))
    merged, takers = order[:, 0 : 2 * r : 2], order[:, 1 : 2 * r : 2]
    partner = (rows(keys, merged) @ rows(keys, takers).transpose(1, 2)).argmax(dim=-1)
    alone = order[:, 2 * r :].sort(dim=-1).values
    front = torch.arange(prefix, device=keys.device).expand(batch, -1)
    return Matching(
        rest=torch.cat([front, alone + prefix, takers + prefix], dim=1),
        merged=merged + prefix,
        into=partner + N - 2 * r,
    )


# --- record -----------------------------------------------------------------------------------------------------------


def _check(info: ModelInfo, config: Config) -> str | None:
    if reason := blocks_fault(info):
        return reason
    patches = info.num_tokens - info.num_prefix_tokens
    if not any(merged_counts(patches, config.keep, info.depth)):
        return f"keep={config.keep:g} merges none of {patches} patch tokens"
    return None


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    require_blocks(model, "pitome")
    vit: Any = model  # timm is not typed
    merged = merged_counts(vit.patch_embed.num_patches, config.keep, len(vit.blocks))
    resolved = {
        "merged": merged,
        "prefix": vit.num_prefix_tokens,
        "proportional": config.proportional_attention,
        "restore": vit.global_pool != "token",
    }
    return Applied(_rebuild(model, resolved), resolved, [f"blocks.{i}" for i, r in enumerate(merged) if r])


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    vit: Any = model
    merged, prefix = resolved["merged"], resolved["prefix"]
    matches = [partial(match, r=r, margin=margin(i, len(merged)), prefix=prefix) for i, r in enumerate(merged)]
    vit.blocks = MergingBlocks(vit.blocks, matches, prefix, resolved["proportional"], resolved["restore"])
    return model


TECHNIQUE = Technique(
    name="pitome",
    family="token_reduction",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    identity={"keep": 1.0},
    source="Spectrum-Preserving Token Merging, arXiv 2405.16148, section 3",
)
