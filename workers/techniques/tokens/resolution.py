"""Smaller input resolution: the baseline that every token technique must beat.

Source: Touvron et al., Fixing the train-test resolution discrepancy, arXiv 1906.06423 (the setting); position embeddings
after Dosovitskiy et al., arXiv 2010.11929, section 3.2, resampled by timm's ``resample_abs_pos_embed`` (bicubic).
Differs from the paper: the model takes the same images as before and makes them smaller inside (bilinear with
antialiasing), so that data, measurements and exports are those of the uncompressed model. ViLT and METER likewise: see
:mod:`workers.techniques.tokens.resolution_joint`.
Saves MACs, time and activation memory with the square of the side, and the bytes of the position embeddings. Gains from
the recovery training, and asks for it.
Not covered: models that take images of any size (timm's dynamic_img_size gets the smaller ones too).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.backbones import by_backbone
from workers.techniques.record import Applied, ModelInfo, Rule, Surroundings, Technique, number


@dataclass(frozen=True)
class Config:
    """How much smaller the images become."""

    ratio: float = number(
        0.75,
        0.25,
        1.0,
        0.0625,
        search=(0.5, 0.875, 0.125),
        doc="share of the side, to the nearest whole number of patches",
    )


def smaller(side: int, patch: int, ratio: float) -> int:
    """Returns the multiple of ``patch`` that is nearest to ratio times ``side``, in pixels."""
    return round(ratio * side / patch) * patch


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns images (B, C, H, W) of any float type in the given (height, width)."""
    small = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    return small.to(images.dtype)


def _resize_first(size: tuple[int, int], module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (resize(args[0], size), *args[1:])


# --- record -----------------------------------------------------------------------------------------------------------


def _after(info: ModelInfo, config: Config) -> ModelInfo:
    side = smaller(info.image_size, info.patch_size, config.ratio)
    gone = (info.image_size // info.patch_size) ** 2 - (side // info.patch_size) ** 2
    return replace(info, image_size=side, num_tokens=info.num_tokens - gone, params=info.params - gone * info.embed_dim)


def _check(info: ModelInfo, config: Config) -> str | None:
    side = smaller(info.image_size, info.patch_size, config.ratio)
    if side == 0:
        return f"ratio={config.ratio:g} of {info.image_size} pixels leaves no whole patch of {info.patch_size}"
    if side == info.image_size:
        return f"ratio={config.ratio:g} of {info.image_size} pixels is as many patches of {info.patch_size} as before"
    return None


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    vit: Any = model  # timm is not typed
    embed = vit.patch_embed
    size = [smaller(s, p, config.ratio) for s, p in zip(embed.img_size, embed.patch_size, strict=True)]
    changed = ["patch_embed"] if tuple(size) != tuple(embed.img_size) else []
    resolved = {"image_size": size}
    return Applied(_rebuild(model, resolved), resolved, changed)


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    vit: Any = model
    size = tuple(resolved["image_size"])
    if size != tuple(vit.patch_embed.img_size):
        with torch.no_grad():
            vit.set_input_size(img_size=size)
        vit.patch_embed.register_forward_pre_hook(partial(_resize_first, size))
    return model


def _trains(config: Config) -> bool:
    return config.ratio < 1


HALVES = dict.fromkeys(("vilt", "meter"), "workers.techniques.tokens.resolution_joint")

TECHNIQUE = Technique(
    name="resolution",
    family="token_reduction",
    version=1,
    Config=Config,
    stage="surgery",
    apply=by_backbone(_apply, HALVES),
    rebuild=by_backbone(_rebuild, HALVES),
    check=_check,
    identity={"ratio": 1.0},
    trains=_trains,
    info_after=_after,
    models=("timm", "vilt", "meter"),
    rules=(Rule(("token_reduction",), "allowed", "a smaller image only makes the sequence shorter"),),
    source="arXiv 1906.06423; position embeddings arXiv 2010.11929, section 3.2",
)
