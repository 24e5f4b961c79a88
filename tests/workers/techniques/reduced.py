"""Every vision transformer of timm by name, made small: two narrow blocks, four patches a side, five classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import timm
import torch

from workers import models
from workers.model_info import ModelInfo
from workers.models import ModelError, timm_vit
from workers.tasks.batches import Split

PATTERNS = ("vit_*", "deit*", "eva*", "beit*")

CLASSES, SIDE, BATCH = 5, 4, 8
"""Of the data; patches a side; images of a batch, of which there are two."""

SIZES: tuple[dict[str, int], ...] = (
    {"embed_dim": 64, "depth": 2, "num_heads": 4},
    {"embed_dim": 128, "depth": 2, "num_heads": 16},
    {"embed_dim": 192, "num_heads": 48},
    {"embed_dim": 256, "num_heads": 64},
    {},
)
"""Tried in turn, since not every architecture allows every width, and some list something for each of their blocks."""

SIZED = frozenset(
    {"name", "params", "depth", "embed_dim", "head_dim", "num_heads", "mlp_hidden", "image_size", "patch_size"}
)
"""Facts that come from the size of a model, of which :func:`kind` does not speak."""


def names() -> list[str]:
    """Returns the names of the installed timm, sorted."""
    return sorted({name for pattern in PATTERNS for name in timm.list_models(pattern)})


def described(name: str | None, **create: Any) -> dict[str, Any]:
    """Returns the description of the reduced model; its settings may be overridden, and without a name a patch has to be given.

    Raises:
        ModelError: the study's reason not to take this model, of whatever size.
    """
    reason: ModelError | None = None
    for size in SIZES:
        settings = {"num_classes": CLASSES, "in_chans": 3, **size, **create}
        side = SIDE * int(create["patch_size"]) if name is None else _side(name)
        found = {"family": "timm", "name": name, "create": {"img_size": side, **settings}}
        try:
            models.skeleton(found)
        except ModelError as error:
            reason = error
        else:
            return found
    raise reason or ModelError(f"{name}: there is no size to try")


@cache
def _side(name: str) -> int:
    """Returns the pixels of :data:`SIDE` patches; the architecture's own size where it has no patches."""
    for size in (SIZES[1], {}):
        with torch.device("meta"):
            try:
                patch = int(timm.create_model(name, **size).patch_embed.patch_size[0])
            except (AssertionError, TypeError, RuntimeError):
                continue
        return SIDE * patch if patch > 1 else int(timm.get_pretrained_cfg(name).input_size[-1])
    return int(timm.get_pretrained_cfg(name).input_size[-1])


def kind(info: ModelInfo) -> str:
    """Returns the facts that do not come from the size: techniques answer models of one kind alike."""
    return json.dumps({key: value for key, value in asdict(info).items() if key not in SIZED}, sort_keys=True)


def built(description: Mapping[str, Any]) -> Any:
    """Returns the described model in eval mode, with weights so large that every part of it matters."""
    torch.manual_seed(0)
    model: Any = timm_vit.create(description)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def pictures(description: Mapping[str, Any]) -> Split:
    """Returns two batches of noise that the described model takes."""
    side, channels = description["create"]["img_size"], description["create"]["in_chans"]
    noise = np.random.default_rng(0).integers(0, 255, (2 * BATCH, side, side, channels), dtype=np.uint8)
    return Split(noise, np.arange(2 * BATCH) % CLASSES, (0.5,) * channels, (0.25,) * channels)
