"""What :mod:`workers.techniques.contract` asks with: a small model of each shape that a technique must honour, inputs, surroundings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from workers.inputs import Inputs
from workers.models import timm_vit
from workers.techniques.record import Surroundings

VARIANTS: dict[str, dict[str, Any]] = {
    "class": {},
    "distil": {"distilled": True},
    "registers": {"reg_tokens": 4},
    "average": {"class_token": False, "global_pool": "avg"},
    "layerscale": {"init_values": 0.5},
    "qk_norm": {"qk_norm": True},
}
"""Image models, one a kind of tokens, pooling, scale and norm; 16 patch tokens, 3 blocks, 4 heads of 8."""

JOINT = ("vilt", "meter")
"""Vision-language models, one a family: 4 layers over 16 patches and texts of 20 tokens at most, two sentences' entailment."""

CLASSES, JOINT_CLASSES = 5, 3

_SIZE = {
    "img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "num_classes": CLASSES,
}  # fmt: skip


def family_of(variant: str) -> str:
    """Returns the family of models that a variant belongs to, a key of :mod:`workers.models`."""
    return variant if variant in JOINT else "timm"


def describe(variant: str, **changes: Any) -> dict[str, Any]:
    """Returns the description of a variant, as :func:`workers.models.describe` does; ``changes`` are values of its ``create``."""
    if variant in JOINT:
        settings = {"task": "entailment", "init_std": 0.02, **changes}
        joint: dict[str, Any] = _joint(variant).describe({"name": f"{variant}_tiny", "create": settings})
        return joint
    create = {**_SIZE, **VARIANTS[variant], **changes}
    name = "deit_tiny_distilled_patch16_224" if create.pop("distilled", False) else None
    return {"family": "timm", "name": name, "create": create}


def _joint(variant: str) -> Any:
    return import_module(f"workers.models.{variant}")  # transformers takes seconds, image models need none of it


def build(variant: str = "class", *, seed: int = 0, device: str = "cpu", **changes: Any) -> Any:
    """Returns a variant in eval mode whose every parameter, norms and scales too, has a random value of ``seed``."""
    model: Any = (_joint(variant) if variant in JOINT else timm_vit).create(describe(variant, **changes), device=device)
    if device != "meta":
        (_shake if variant in JOINT else _fill)(model, torch.Generator().manual_seed(seed))
    return model.eval()


def _fill(model: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + 0.2 * noise
    for module in model.modules():
        if isinstance(module, LayerScale):
            module.gamma.data += 0.5


def _shake(model: nn.Module, generator: torch.Generator) -> None:
    """Makes the weights large enough that every token matters; positions and patches keep their own first values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.15 * torch.randn(parameter.shape, generator=generator))


def images(batch: int = 4, seed: int = 1, size: int = 16) -> Tensor:
    """(B, 3, size, size) float32 noise."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def inputs(variant: str, batch: int = 4, seed: int = 1) -> Any:
    """Returns what the model takes: images, or images with texts of different lengths, padded."""
    if variant not in JOINT:
        return images(batch, seed)
    generator, length = torch.Generator().manual_seed(seed), 8
    lengths = length - torch.arange(batch) % 4
    return Inputs(
        {
            "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
            "input_ids": torch.randint(5, 256, (batch, length), generator=generator),
            "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        }
    )


def classes(variant: str) -> int:
    """Returns how many logits the model has."""
    return JOINT_CLASSES if variant in JOINT else CLASSES


def without_values(variant: str) -> Surroundings:
    """What :mod:`workers.techniques.foresight` gives: batches and a teacher on the meta device, which have shapes and no values."""

    def batches() -> Iterator[tuple[Any, Tensor]]:
        yield inputs(variant).to("meta"), torch.zeros(4, dtype=torch.int64, device="meta")

    generator = torch.Generator().manual_seed(0)
    return Surroundings(torch.device("meta"), 0, generator, batches, lambda: build(variant, device="meta"))


def surroundings(model: nn.Module, seed: int = 0, variant: str = "class") -> Surroundings:
    """Two batches of noise, and a copy of the model as the teacher."""
    teacher = copy.deepcopy(model)

    def batches() -> Iterator[tuple[Any, Tensor]]:
        for i in range(2):
            yield inputs(variant, 8, seed=10 + i), torch.arange(8) % classes(variant)

    return Surroundings(torch.device("cpu"), seed, torch.Generator().manual_seed(seed), batches, lambda: teacher)
