"""Smaller images in ViLT and METER: made smaller before the model looks at them, with fewer position embeddings inside.

Position embeddings are resampled as each model's own weights are for another size: bilinear in ViLT, bicubic in METER.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from workers.inputs import Inputs
from workers.techniques.record import Applied, Surroundings
from workers.techniques.tokens.resolution import Config, resize, smaller
from workers.techniques.tokens.shared_joint_tokens import family_module


def shrink(batch: Any, ratio: float, patch: int) -> Any:
    """Returns the batch with its images, and their masks, smaller; sides are whole numbers of patches.

    Args:
        batch: see :mod:`workers.models.vision_language`. What is no batch is left for the model to refuse.
    """
    if "pixel_values" not in batch or batch["pixel_values"].ndim < 4:
        return batch
    pixels = batch["pixel_values"]  # (B, [2,] C, H, W)
    height, width = (max(smaller(side, patch, ratio), patch) for side in pixels.shape[-2:])
    small = resize(pixels.flatten(0, -4), (height, width))
    changed = {"pixel_values": small.view(*pixels.shape[:-2], height, width)}
    mask = batch.get("pixel_mask")
    if mask is not None:
        changed["pixel_mask"] = _shrink_mask(mask, (height, width))
    return batch.replace(**changed) if isinstance(batch, Inputs) else {**batch, **changed}


def _shrink_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return F.interpolate(flat, size=size, mode="nearest").to(mask.dtype).view(*mask.shape[:-2], *size)


def _shrink_first(ratio: float, patch: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (shrink(args[0], ratio, patch), *args[1:])


def apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Makes the model one that turns its images into smaller ones, in place."""
    shape: Any = model.shape
    side = smaller(shape.img_size, shape.patch_size, config.ratio)
    resolved = {"image_size": [side, side]}
    changed = ["position_embeddings"] if side != shape.img_size else []
    return Applied(rebuild(model, resolved), resolved, changed)


def rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Makes the model one that turns its images into ``image_size`` pixels a side, in place."""
    shape: Any = model.shape
    size: int = resolved["image_size"][0]
    if size != shape.img_size:
        model.register_forward_pre_hook(partial(_shrink_first, size / shape.img_size, shape.patch_size))
        family_module(model).resample_(model, size)
    return model
