"""Vision transformers of timm: any plain ViT by name (DeiT, distilled DeiT, registers, LayerScale, q/k-norm), or one
built from width, depth, heads and patch size.

``create`` holds keyword arguments of timm's model, and one of ours: ``pos_embed_std`` draws the position embeddings
anew with that standard deviation (0.02 is too small for models of a few pixels a side trained from scratch).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from workers.model_info import ModelInfo

if TYPE_CHECKING:
    from workers.tasks import TaskInfo

_FROM_DATA = {"num_classes": "num_classes", "in_chans": "in_chans", "img_size": "image_size"}


class ModelError(ValueError):
    """A model that cannot be built, or weights that do not fit it."""


def describe(model: Mapping[str, Any], data: TaskInfo) -> dict[str, Any]:
    """See :func:`workers.models.describe`."""
    create = dict(model.get("create") or {})
    for key, fact in _FROM_DATA.items():
        value = getattr(data, fact)
        if create.setdefault(key, value) != value:
            raise ModelError(f"model.create.{key} must be the data's {fact} {value}, got {create[key]}; leave it out")
    return {"family": "timm", "name": model.get("name"), "create": create}


def create(description: Mapping[str, Any], *, device: str = "cpu", pretrained: bool = False) -> nn.Module:
    """Builds a described model, randomly initialised from torch's global generator, or with timm's pretrained weights.

    Raises:
        ModelError: an unknown name or argument, no plain ViT, or pretrained weights that cannot be fetched.
    """
    name, kwargs = description["name"], dict(description["create"])
    pos_embed_std = kwargs.pop("pos_embed_std", None)
    if name is None and pretrained:
        raise ModelError("model.pretrained needs model.name: only named timm models have pretrained weights")
    if name is not None and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models("*vit*") + timm.list_models("deit*"), n=1)
        raise ModelError(f"model.name: timm has no model {name!r}" + (f"; nearest: {near[0]}" if near else ""))
    try:
        with torch.device(device):
            module: Any = _construct(name, kwargs, pretrained)
    except (TypeError, AssertionError, ValueError) as error:
        raise ModelError(f"model {name or 'VisionTransformer'}: create {kwargs} is refused: {error}") from error
    _require_plain(module, name)
    if pos_embed_std is not None and not pretrained and module.pos_embed is not None:
        nn.init.normal_(module.pos_embed, std=pos_embed_std)
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = True  # in every arm: a baseline without it flatters everything measured against it
    return cast(nn.Module, module)


def _construct(name: str | None, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    if name is None:
        known = list(inspect.signature(VisionTransformer.__init__).parameters)[1:]
        unknown = [k for k in kwargs if k not in known]
        if unknown:
            raise TypeError(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
        module: nn.Module = VisionTransformer(**kwargs)
        return module
    try:
        created: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
        return created
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise ModelError(f"model {name}: timm cannot build it: {error}") from error
        raise ModelError(
            f"model {name}: its pretrained weights could not be loaded ({str(error).splitlines()[0]}); connect to the "
            "network, fill the Hugging Face cache (HF_HOME), or give model.checkpoint a local file"
        ) from error


def _require_plain(module: Any, name: str | None) -> None:
    """Refuses what is no plain ViT: techniques rely on ``patch_embed``, ``blocks[i].attn`` and ``blocks[i].mlp``."""
    if not isinstance(module, VisionTransformer) or not isinstance(module.patch_embed, PatchEmbed):
        raise ModelError(f"model {name} is a {type(module).__name__}; must be a plain timm VisionTransformer")
    for block in module.blocks:
        if not all(hasattr(getattr(block, "attn", None), part) for part in ("qkv", "proj", "num_heads")):
            raise ModelError(f"model {name} has blocks of type {type(block).__name__}; must be plain attention + MLP")
    embed = module.patch_embed
    if any(side % patch for side, patch in zip(embed.img_size, embed.patch_size, strict=True)):
        raise ModelError(f"image size {embed.img_size[0]} must be a multiple of the patch size {embed.patch_size[0]}")


def model_info(module: nn.Module, device: str) -> ModelInfo:
    """See :func:`workers.models.model_info`.

    ``mlp_hidden`` is the input width of each block's second MLP layer; ``params`` counts parameters, packed weights are
    buffers and do not count.
    """
    vit: Any = module  # timm is not typed
    attentions = [block.attn for block in vit.blocks]
    architecture = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture")
    return ModelInfo(
        family="timm",
        name=architecture or "vit",
        depth=len(attentions),
        embed_dim=vit.embed_dim,
        head_dim=attentions[0].head_dim,
        num_heads=tuple(a.num_heads for a in attentions),
        mlp_hidden=tuple(block.mlp.fc2.in_features for block in vit.blocks),
        num_tokens=vit.patch_embed.num_patches + vit.num_prefix_tokens,
        num_prefix_tokens=vit.num_prefix_tokens,
        has_class_token=vit.cls_token is not None,
        has_distil_token=hasattr(vit, "dist_token"),
        image_size=vit.patch_embed.img_size[0],
        patch_size=vit.patch_embed.patch_size[0],
        in_chans=vit.in_chans,
        num_classes=vit.num_classes,
        params=sum(p.numel() for p in vit.parameters()),
        device=device,
        has_qk_norm=not isinstance(getattr(attentions[0], "q_norm", nn.Identity()), nn.Identity),
    )
