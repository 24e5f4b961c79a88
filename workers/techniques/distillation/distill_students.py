"""Students: a ViT cut down to fewer blocks and heads, another one of timm, one that starts anew, one with a second token.

Used by :mod:`workers.techniques.distillation.distill`; every function works on the meta device too, where only shapes count.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from timm.layers import PatchDropout
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from workers.models import model_info, timm_vit
from workers.techniques.pruning.shared_slicing import (
    channel_magnitudes,
    head_magnitudes,
    hidden_magnitudes,
    keep_channels,
    keep_heads,
    keep_hidden,
    largest,
)
from workers.techniques.record import ModelInfo


def student_layers(depth: int, fraction: float) -> list[int]:
    """Returns the evenly spaced blocks of the teacher that the student takes over, the first and the last among them."""
    count = max(1, int(depth * fraction))
    return [round(i * (depth - 1) / max(1, count - 1)) for i in range(count)]


def shrink(model: nn.Module, layers: list[int], heads: int, hidden: int, *, by_magnitude: bool) -> None:
    """Cuts a model to the student's dimensions; leading indices where the weights do not matter."""
    vit: Any = model
    device = vit.patch_embed.proj.weight.device
    if len(layers) < len(vit.blocks):
        vit.blocks = nn.Sequential(*(vit.blocks[i] for i in layers))
        vit.feature_info = vit.feature_info[: len(layers)]
    if heads == vit.blocks[0].attn.num_heads:
        return

    def chosen(magnitudes: Tensor, count: int) -> Tensor:
        return largest(magnitudes, count) if by_magnitude else torch.arange(count, device=device)

    channels = chosen(channel_magnitudes(vit), heads * vit.blocks[0].attn.head_dim)
    for block in vit.blocks:
        keep_heads(block.attn, chosen(head_magnitudes(block.attn), heads))
        keep_hidden(block.mlp, chosen(hidden_magnitudes(block.mlp), hidden))
    keep_channels(vit, channels)


def spread_of_positions(model: nn.Module) -> float | None:
    """Returns the standard deviation of a model's position embeddings; None where it has none."""
    vit: Any = model
    return None if vit.pos_embed is None else float(vit.pos_embed.detach().std())


def start_anew(model: nn.Module, generator: torch.Generator, spread: float | None) -> None:
    """Draws all weights as timm does; position embeddings have the standard deviation ``spread``, the teacher's.

    timm's 0.02 would undo a study's ``pos_embed_std``, without which models of few pixels do not learn.
    """
    vit: Any = model
    device = vit.patch_embed.proj.weight.device
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    vit.cpu()
    with torch.random.fork_rng(devices=[]):  # timm draws from the global generator
        torch.manual_seed(seed)
        vit.init_weights()
        if spread is not None and vit.pos_embed is not None:
            nn.init.normal_(vit.pos_embed, std=spread)
    vit.to(device)


def anew(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Returns a vision-language model of the same shape with weights of its own, drawn as its family draws them."""
    parts: Any = model
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):  # modules draw from the global generator
        torch.manual_seed(seed)
        made: nn.Module = type(parts)(parts.shape)
    return made.to(next(model.parameters()).device).train(model.training)


def named(name: str, classes: int, channels: int, side: int, *, device: str, pretrained: bool = False) -> nn.Module:
    """Builds a ViT of timm by name for the data: (B, channels, side, side) -> (B, classes).

    Raises:
        ModelError: its patches do not fit the images, or its pretrained weights cannot be had.
    """
    size = {"num_classes": classes, "in_chans": channels, "img_size": side}
    return timm_vit.create({"name": name, "create": size}, device=device, pretrained=pretrained)


@lru_cache(maxsize=64)
def named_info(name: str, classes: int, channels: int, side: int) -> ModelInfo:
    """Returns the facts of :func:`named`, without weights."""
    return model_info(named(name, classes, channels, side, device="meta"))


def with_token(model: nn.Module) -> nn.Module:
    """Returns timm's distilled ViT made of the parts of a plain one; token, position and head copy the class token's.

    Raises:
        ValueError: a model that pools over tokens, or has register tokens or no positions.
    """
    vit: Any = model
    plain = type(vit) is VisionTransformer and vit.global_pool == "token" and vit.cls_token is not None
    if not plain or vit.num_reg_tokens or vit.pos_embed is None:
        raise ValueError(
            "distill: a distillation token needs a plain ViT with a class token, positions and no registers"
        )
    made: Any = VisionTransformerDistilled(
        img_size=vit.patch_embed.img_size, patch_size=vit.patch_embed.patch_size, in_chans=vit.in_chans,
        num_classes=vit.num_classes, embed_dim=vit.embed_dim, depth=1, num_heads=1, weight_init="skip", device="meta",
        no_embed_class=vit.no_embed_class, dynamic_img_size=vit.dynamic_img_size,
    )  # fmt: skip
    embedding, ending = (
        ("patch_embed", "cls_token", "pos_drop", "patch_drop", "norm_pre"),
        ("norm", "head_drop", "head"),
    )
    for part in (*embedding, "blocks", *ending):
        setattr(made, part, getattr(vit, part))
    for fact in ("feature_info", "weight_init_mode", "fix_init", "pretrained_cfg"):
        if hasattr(vit, fact):
            setattr(made, fact, getattr(vit, fact))
    if isinstance(made.patch_drop, PatchDropout):
        made.patch_drop.num_prefix_tokens = 2
    made.dist_token = nn.Parameter(vit.cls_token.detach().clone())
    positions = vit.pos_embed.detach()
    first = positions[:, :0] if vit.no_embed_class else positions[:, :1]
    made.pos_embed = nn.Parameter(torch.cat([first, positions], dim=1))
    made.head_dist = copy.deepcopy(vit.head)
    module: nn.Module = made
    return module.train(vit.training)
