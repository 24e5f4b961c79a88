"""What a timm ViT is besides its weights: facts that no checkpoint holds, and what timm's own pretrained weights come with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from workers.models.sources import Origin
from workers.models.timm_vit import ModelError

if TYPE_CHECKING:
    from workers.tasks import TaskInfo


def assumed(module: nn.Module) -> str:
    """Returns what weights do not say of a model and its settings do, as one sentence."""
    vit: Any = module  # timm is not typed
    eps = sorted({part.eps for part in vit.modules() if isinstance(part, nn.LayerNorm)})
    heads = sorted({block.attn.num_heads for block in vit.blocks})
    act = vit.blocks[0].mlp.act
    name = type(act).__name__ + (" (tanh)" if getattr(act, "approximate", "none") == "tanh" else "")
    pool = {"token": "the class token", "avg": "the mean of the patches"}.get(vit.global_pool, vit.global_pool)
    return (
        f"what weights do not say is taken to be: {', '.join(map(str, heads))} heads, LayerNorm eps "
        f"{', '.join(f'{e:g}' for e in eps)}, activation {name}, pooling by {pool}"
    )


def pretrained_origin(module: nn.Module) -> Origin:
    """Returns what timm says of the pretrained weights of a model by name."""
    cfg = _cfg(module)
    mean, std = cfg.get("mean"), cfg.get("std")
    return Origin(mean=tuple(mean) if mean else None, std=tuple(std) if std else None)


def pretrained_notes(module: nn.Module, model: Mapping[str, Any], data: TaskInfo) -> list[str]:
    """Returns what timm changes of its pretrained weights to make them fit the data.

    Raises:
        ModelError: their head is of another number of classes and nothing trains a new one.
    """
    cfg, vit = _cfg(module), _any(module)
    classes, size, notes = cfg.get("num_classes"), cfg.get("input_size"), []
    if classes is not None and classes != data.num_classes:
        if not model.get("train"):
            raise ModelError(
                f"model.pretrained: the head of {model.get('name')} must be of the data's {data.num_classes} classes, is of "
                f"{classes}; set model.train: true, which trains a new one"
            )
        notes.append(f"its head is of {classes} classes; a new one is trained")
    if size and tuple(size[1:]) != tuple(vit.patch_embed.img_size):
        sides = "x".join(map(str, size[1:]))
        notes.append(f"pretrained on images of {sides} pixels: position embeddings are resampled as timm does")
    if size and size[0] != vit.in_chans:
        notes.append(
            f"pretrained on {size[0]} channels: the patch embedding is made one of {vit.in_chans} as timm does"
        )
    return notes


def _cfg(module: nn.Module) -> Mapping[str, Any]:
    return getattr(module, "pretrained_cfg", None) or {}


def _any(module: nn.Module) -> Any:
    return module  # timm is not typed
