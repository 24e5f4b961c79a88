"""Small models and facts that the tests of techniques share; the models are those that the contract asks with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from workers.techniques.contract.models import VARIANTS, images, surroundings
from workers.techniques.contract.models import build as vit
from workers.techniques.record import ModelInfo

__all__ = ["VARIANTS", "images", "info", "surroundings", "vit"]


def info(**changes: Any) -> ModelInfo:
    """Facts of :func:`vit` in its ``class`` variant, with changes."""
    facts = ModelInfo(
        family="timm", name="vit", depth=3, embed_dim=32, head_dim=8, num_heads=(4,) * 3, mlp_hidden=(64,) * 3,
        num_tokens=17, num_prefix_tokens=1, has_class_token=True, has_distil_token=False, image_size=16, patch_size=4,
        in_chans=3, num_classes=5, params=sum(p.numel() for p in vit().parameters()), device="cpu",
    )  # fmt: skip
    return replace(facts, **changes)
