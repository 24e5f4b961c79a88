"""Small models and facts that the tests of techniques share: a ViT of each shape that a technique must honour."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from timm.layers import LayerScale
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from workers.techniques.record import ModelInfo, Surroundings

VARIANTS: dict[str, dict[str, Any]] = {
    "class": {},
    "distil": {"distilled": True},
    "registers": {"reg_tokens": 4},
    "average": {"class_token": False, "global_pool": "avg"},
    "layerscale": {"init_values": 0.5},
    "qk_norm": {"qk_norm": True},
}
"""One model a kind of tokens, pooling, scale and norm; 16 patch tokens, 3 blocks, 4 heads of 8."""


def vit(variant: str = "class", *, seed: int = 0, device: str = "cpu", **changes: Any) -> Any:
    """A small ViT in eval mode whose every parameter, norms and scales too, has a random value."""
    kwargs = {
        "img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "num_classes": 5,
        **VARIANTS[variant], **changes,
    }  # fmt: skip
    make = VisionTransformerDistilled if kwargs.pop("distilled", False) else VisionTransformer
    with torch.device(device):
        model: Any = make(**kwargs)
    if device != "meta":
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data = centre + 0.2 * noise
        for module in model.modules():
            if isinstance(module, LayerScale):
                module.gamma.data += 0.5
    return model.eval()


def info(**changes: Any) -> ModelInfo:
    """Facts of :func:`vit` in its ``class`` variant, with changes."""
    facts = ModelInfo(
        family="timm", name="vit", depth=3, embed_dim=32, head_dim=8, num_heads=(4,) * 3, mlp_hidden=(64,) * 3,
        num_tokens=17, num_prefix_tokens=1, has_class_token=True, has_distil_token=False, image_size=16, patch_size=4,
        in_chans=3, num_classes=5, params=sum(p.numel() for p in vit().parameters()), device="cpu",
    )  # fmt: skip
    return replace(facts, **changes)


def images(batch: int = 4, seed: int = 1, size: int = 16) -> torch.Tensor:
    """(B, 3, size, size) float32 noise."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def surroundings(model: nn.Module, seed: int = 0) -> Surroundings:
    """Two batches of noise, and a copy of the model as the teacher."""
    teacher = copy.deepcopy(model)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for i in range(2):
            yield images(8, seed=10 + i), torch.arange(8) % 5

    return Surroundings(torch.device("cpu"), seed, torch.Generator().manual_seed(seed), batches, lambda: teacher)
