"""Structured magnitude pruning in vision-language models: of the layers of ViLT and METER that see both modalities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from workers.techniques.pruning import shared_joint_slicing as joint
from workers.techniques.pruning.magnitude_prune import Config, kept_dims, kept_whole
from workers.techniques.pruning.shared_slicing import largest
from workers.techniques.record import Applied, Surroundings


def apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Prunes the layers that see both modalities, in place."""
    parts: Any = model
    changed = []
    count = kept_whole(len(parts.layers), config.depth_ratio)
    kept = list(range(count))
    if count < len(parts.layers):
        kept = largest(torch.tensor([joint.layer_magnitude(layer) for layer in parts.layers]), count).tolist()
        joint.keep_layers(model, kept)
        changed.append("layers")
    for i, layer in enumerate(parts.layers):
        for name, block in joint.attentions(layer):
            heads = kept_whole(block.attention.num_heads, config.head_ratio)
            dims = kept_dims(block.attention.head_dim, config.head_dim_ratio, config.round_to)
            if joint.cut_attention(block, heads, dims):
                changed.append(f"layers.{i}.{name}")
        for name, block in joint.mlps(layer):
            hidden = kept_dims(block.intermediate.dense.out_features, config.mlp_ratio, config.round_to)
            if joint.cut_mlp(block, hidden):
                changed.append(".".join(filter(None, ("layers", str(i), name, "intermediate"))))
    return Applied(model, {"layers": kept, **joint.dimensions(model)}, changed)


def rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Leaves as many layers, heads and dimensions as were left, in place."""
    return joint.shrink_to(model, resolved)
