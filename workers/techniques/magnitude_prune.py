"""Structured magnitude pruning: removes the weakest attention heads and MLP dimensions of every block for good.

Source: Han et al., arXiv 1506.02626 (magnitude); Fang et al., DepGraph, arXiv 2301.12900, section 3.3 (group L2 norm).
Differs from the paper: each block loses the same share, ranked within the block; no sparsity training before the cut.
The index selection is our own and not Torch-Pruning's: the groups of a ViT are known (a head is its rows of the fused
qkv and its columns of proj), so no graph has to be traced, blocks that other techniques replaced do not matter, and the
counts alone build the structure again on the meta device.
Saves parameters, bytes, MACs and time; needs the recovery training (accuracy before it says nothing about after it).
Not covered: norms over heads or MLP dimensions (timm's scale_attn_norm, scale_mlp_norm), gated MLPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from workers.techniques.record import Applied, ModelInfo, Surroundings, Technique, choice, number
from workers.techniques.slicing import (
    head_magnitudes,
    hidden_magnitudes,
    keep_heads,
    keep_hidden,
    largest,
    require_plain,
)


@dataclass(frozen=True)
class Config:
    """The share of heads and of MLP dimensions that each block loses."""

    head_ratio: float = number(0.25, 0.0, 0.6, 0.05, search=(0.0, 0.6, 0.1), doc="share of heads to remove")
    mlp_ratio: float = number(0.25, 0.0, 0.6, 0.05, search=(0.0, 0.6, 0.1), doc="share of MLP dimensions to remove")
    round_to: int = choice(8, (1, 4, 8, 16), search=(8,), doc="MLP dimensions left are a multiple of this")


def kept_heads(heads: int, config: Config) -> int:
    """Returns how many of ``heads`` stay: the nearest number, at least one."""
    return max(1, round(heads * (1 - config.head_ratio)))


def kept_hidden(hidden: int, config: Config) -> int:
    """Returns how many of ``hidden`` dimensions stay: the nearest multiple of round_to, at least one multiple."""
    if config.mlp_ratio == 0:
        return hidden
    multiples = max(1, round(hidden * (1 - config.mlp_ratio) / config.round_to))
    return min(hidden, multiples * config.round_to)


def _after(info: ModelInfo, config: Config) -> ModelInfo:
    heads = tuple(kept_heads(n, config) for n in info.num_heads)
    hidden = tuple(kept_hidden(n, config) for n in info.mlp_hidden)
    C, D = info.embed_dim, info.head_dim
    # Query, key and value rows with their biases, projection columns; fc1 rows with biases, fc2 columns.
    lost = (sum(info.num_heads) - sum(heads)) * D * (4 * C + 3)
    lost += (sum(info.mlp_hidden) - sum(hidden)) * (2 * C + 1)
    return replace(info, num_heads=heads, mlp_hidden=hidden, params=info.params - lost)


def _check(info: ModelInfo, config: Config) -> str | None:
    after = _after(info, config)
    if (after.num_heads, after.mlp_hidden) == (info.num_heads, info.mlp_hidden):
        return (
            f"head_ratio={config.head_ratio:g} and mlp_ratio={config.mlp_ratio:g} (round_to={config.round_to}) remove "
            f"nothing from {max(info.num_heads)} heads and {max(info.mlp_hidden)} MLP dimensions a block"
        )
    return None


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    require_plain(model, "magnitude_prune")
    vit: Any = model
    changed = []
    for i, block in enumerate(vit.blocks):
        heads, hidden = kept_heads(block.attn.num_heads, config), kept_hidden(block.mlp.fc1.out_features, config)
        if heads < block.attn.num_heads:
            keep_heads(block.attn, largest(head_magnitudes(block.attn), heads))
            changed.append(f"blocks.{i}.attn")
        if hidden < block.mlp.fc1.out_features:
            keep_hidden(block.mlp, largest(hidden_magnitudes(block.mlp), hidden))
            changed.append(f"blocks.{i}.mlp")
    resolved = {
        "heads": [block.attn.num_heads for block in vit.blocks],
        "hidden": [block.mlp.fc1.out_features for block in vit.blocks],
    }
    return Applied(model, resolved, changed)


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    vit: Any = model
    for block, heads, hidden in zip(vit.blocks, resolved["heads"], resolved["hidden"], strict=True):
        device = block.mlp.fc1.weight.device
        keep_heads(block.attn, torch.arange(heads, device=device))
        keep_hidden(block.mlp, torch.arange(hidden, device=device))
    return model


def _trains(config: Config) -> bool:
    return config.head_ratio > 0 or config.mlp_ratio > 0


TECHNIQUE = Technique(
    name="magnitude_prune",
    family="pruning",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    identity={"head_ratio": 0.0, "mlp_ratio": 0.0},
    trains=_trains,
    info_after=_after,
    source="DepGraph, arXiv 2301.12900, section 3.3; magnitudes after arXiv 1506.02626",
)
