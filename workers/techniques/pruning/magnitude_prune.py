"""Structured magnitude pruning: removes the weakest heads, dimensions, channels and blocks of a ViT for good.

Source: Han et al., arXiv 1506.02626 (magnitude); Fang et al., DepGraph, arXiv 2301.12900, section 3.3 (group L2 norm).
Differs from the paper: each block loses the same share of heads, head dimensions and MLP dimensions, ranked within the
block (head dimensions within the head); whole blocks are ranked by what they write into the residual stream; no sparsity
training before the cut.
The index selection is our own and not Torch-Pruning's: the groups of a ViT are known (a head is its rows of the fused
qkv and its columns of proj), so no graph has to be traced, blocks that other techniques replaced do not matter, and the
counts alone build the structure again on the meta device.
Saves parameters, bytes, MACs and time; needs the recovery training (accuracy before it says nothing about after it).
On a vision-language model it prunes the layers that see both modalities, ViLT's all and METER's fusion layers; the softmax keeps its
scale there, and embed_ratio is 0. METER's encoders stay: a recipe can make them small with a quantiser.
Not covered: heads where timm normalises over them (scale_attn_norm), MLP dimensions likewise (scale_mlp_norm), head dimensions where
queries and keys are normalised; heads and channels of other attentions than timm's plain one (rotary, relative, differential);
channels of models that pool by attention; blocks whose rotary angles are their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from workers.techniques.backbones import by_backbone
from workers.techniques.pruning.shared_prunable import (
    HEADS_NORMALISED,
    Judge,
    channels_fault,
    depth_fault,
    fault,
    head_dims_fault,
    heads_fault,
    hidden_fault,
    require,
)
from workers.techniques.pruning.shared_slicing import (
    block_magnitude,
    channel_magnitudes,
    dimensions,
    head_dim,
    head_dim_sums,
    head_magnitudes,
    hidden_magnitudes,
    keep_blocks,
    keep_channels,
    keep_head_dims,
    keep_heads,
    keep_hidden,
    largest,
    multiple,
    shrink_to,
    stack_weights,
)
from workers.techniques.record import Applied, ModelInfo, Surroundings, Technique, choice, number


@dataclass(frozen=True)
class Config:
    """The share of heads, of dimensions of each kind and of blocks that the model loses."""

    head_ratio: float = number(0.25, 0.0, 0.6, 0.05, search=(0.0, 0.6, 0.1), doc="share of heads to remove")
    mlp_ratio: float = number(0.25, 0.0, 0.6, 0.05, search=(0.0, 0.6, 0.1), doc="share of MLP dimensions to remove")
    head_dim_ratio: float = number(
        0.0, 0.0, 0.6, 0.05, search=(0.0, 0.0, 0.05), doc="share of the dimensions of each head to remove"
    )
    embed_ratio: float = number(
        0.0, 0.0, 0.6, 0.05, search=(0.0, 0.0, 0.05), doc="share of the channels of the residual stream to remove"
    )
    depth_ratio: float = number(0.0, 0.0, 0.6, 0.05, search=(0.0, 0.0, 0.05), doc="share of blocks to remove")
    round_to: int = choice(8, (1, 4, 8, 16), search=(8,), doc="dimensions and channels left are a multiple of this")


def kept_whole(count: int, ratio: float) -> int:
    """Returns how many of ``count`` heads or blocks stay: the nearest number, at least one."""
    return max(1, round(count * (1 - ratio)))


def kept_dims(count: int, ratio: float, round_to: int) -> int:
    """Returns how many of ``count`` dimensions stay: the nearest multiple of round_to, at least one multiple."""
    return multiple(count * (1 - ratio), round_to, count) if ratio else count


# --- facts ------------------------------------------------------------------------------------------------------------


def _after(info: ModelInfo, config: Config) -> ModelInfo:
    layers = kept_whole(info.depth, config.depth_ratio)
    after = replace(
        info,
        depth=layers,
        embed_dim=kept_dims(info.embed_dim, config.embed_ratio, config.round_to),
        head_dim=kept_dims(info.head_dim, config.head_dim_ratio, config.round_to),
        num_heads=tuple(kept_whole(n, config.head_ratio) for n in info.num_heads[:layers]),
        mlp_hidden=tuple(kept_dims(n, config.mlp_ratio, config.round_to) for n in info.mlp_hidden[:layers]),
    )
    return replace(after, params=info.params - _weights(info) + _weights(after))


def _weights(info: ModelInfo) -> int:
    """Returns the weights of a plain ViT of these dimensions; of another model they differ by a constant."""
    positions = info.num_tokens + info.num_prefix_tokens
    heads_of_classes = info.num_classes * (1 + info.has_distil_token)
    return stack_weights(info) + info.embed_dim * (
        info.patch_size**2 * info.in_chans + 1 + positions + 2 + heads_of_classes
    )


JUDGES: Mapping[str, Judge] = {
    "head_ratio": heads_fault,
    "mlp_ratio": hidden_fault,
    "head_dim_ratio": head_dims_fault,
    "embed_ratio": channels_fault,
    "depth_ratio": depth_fault,
}


def _wanted(config: Config) -> dict[str, Judge]:
    """Returns who judges what the config asks for."""
    return {f"{name}={value:g}": judge for name, judge in JUDGES.items() if (value := getattr(config, name))}


def _check(info: ModelInfo, config: Config) -> str | None:
    if reason := fault(info, _wanted(config)):
        return f"{reason}; must be 0"
    if config.head_dim_ratio and info.has_qk_norm:
        return f"head_dim_ratio={config.head_dim_ratio:g}: {HEADS_NORMALISED}; must be 0"
    if config.embed_ratio and info.family != "timm":
        return (
            f"embed_ratio={config.embed_ratio:g}: the channels of {info.family} are read by its embeddings, encoders and "
            "poolers, which are not pruned; must be 0"
        )
    after = _after(info, config)
    if replace(after, params=0) == replace(info, params=0):
        ratios = ", ".join(f"{name}={value:g}" for name, value in vars(config).items() if name != "round_to")
        return (
            f"{ratios} (round_to={config.round_to}) remove nothing from {max(info.num_heads)} heads of {info.head_dim} "
            f"and {max(info.mlp_hidden)} MLP dimensions a block, {info.embed_dim} channels and {info.depth} blocks"
        )
    return None


# --- the cut ----------------------------------------------------------------------------------------------------------


def _prune_block(block: Any, config: Config) -> list[str]:
    """Cuts one block; returns which of its parts changed."""
    attn, mlp, changed = block.attn, block.mlp, []
    heads = kept_whole(attn.num_heads, config.head_ratio)
    width = head_dim(attn)
    dims = kept_dims(width, config.head_dim_ratio, config.round_to)
    hidden = kept_dims(mlp.fc2.in_features, config.mlp_ratio, config.round_to)
    if heads < attn.num_heads or dims < width:
        changed.append("attn")
    if heads < attn.num_heads:
        keep_heads(attn, largest(head_magnitudes(attn), heads))
    if dims < width:
        qk, v = head_dim_sums(attn)
        keep_head_dims(attn, largest(qk, dims), largest(v, dims))
    if hidden < mlp.fc2.in_features:
        keep_hidden(mlp, largest(hidden_magnitudes(mlp), hidden))
        changed.append("mlp")
    return changed


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    require(model, "magnitude_prune", _wanted(config))
    vit: Any = model
    changed = []
    layers = kept_whole(len(vit.blocks), config.depth_ratio)
    channels = kept_dims(vit.embed_dim, config.embed_ratio, config.round_to)
    kept = list(range(layers))
    if layers < len(vit.blocks):
        kept = largest(torch.tensor([block_magnitude(block) for block in vit.blocks]), layers).tolist()
        keep_blocks(vit, kept)
        changed.append("blocks")
    strengths = channel_magnitudes(vit) if channels < vit.embed_dim else torch.empty(0)
    for i, block in enumerate(vit.blocks):
        changed += [f"blocks.{i}.{part}" for part in _prune_block(block, config)]
    if channels < vit.embed_dim:
        keep_channels(vit, largest(strengths, channels))
        changed.append("patch_embed")
    return Applied(model, {**dimensions(model), "blocks": kept}, changed)


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    return shrink_to(model, resolved)


def _trains(config: Config) -> bool:
    return any(value > 0 for name, value in vars(config).items() if name.endswith("_ratio"))


HALVES = dict.fromkeys(("vilt", "meter"), "workers.techniques.pruning.magnitude_prune_joint")

TECHNIQUE = Technique(
    name="magnitude_prune",
    family="pruning",
    version=2,
    Config=Config,
    stage="surgery",
    apply=by_backbone(_apply, HALVES),
    rebuild=by_backbone(_rebuild, HALVES),
    check=_check,
    identity={"head_ratio": 0.0, "mlp_ratio": 0.0},
    trains=_trains,
    info_after=_after,
    models=("timm", "vilt", "meter"),
    source="DepGraph, arXiv 2301.12900, section 3.3; magnitudes after arXiv 1506.02626",
)
