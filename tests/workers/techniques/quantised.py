"""What the tests of quantisers share: a model that is hard to quantise, what none may change beforehand, and the way to an artefact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.workers.techniques.models import images, surroundings, vit
from workers import artefact, models
from workers.tasks import TaskInfo
from workers.techniques import registry
from workers.techniques.low_rank import performer
from workers.techniques.record import make_config
from workers.techniques.tokens import tome

Step = tuple[str, dict[str, Any]]


def with_large_channels() -> Any:
    """A ViT whose norms give out a few channels that are far larger than the others, and are read with small weights."""
    model = vit()
    for block in model.blocks:
        for norm, reader in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight.data[:3] *= 100
            norm.bias.data[:3] *= 100
            reader.weight.data[:, :3] /= 100
    return model


def merging_with_performer() -> Any:
    """A ViT whose blocks merge tokens and attend without a map."""
    model = vit()
    tome.TECHNIQUE.apply(model, tome.Config(r=3), surroundings(model))
    performer.TECHNIQUE.apply(model, performer.Config(), surroundings(model))
    return model


def require_exact(model: Any, change: Callable[[Any], Any], tolerance: float = 2e-5) -> Any:
    """Asserts that ``change`` leaves the logits as they are; returns what it returned."""
    with torch.inference_mode():
        expected = model(images())
        found = change(model)
        torch.testing.assert_close(model(images()), expected, atol=tolerance, rtol=tolerance)
    return found


def error_of(model: Any, quantise: Callable[[Any], Any]) -> float:
    """Returns how far ``quantise`` moves the logits, as a share of them."""
    with torch.inference_mode():
        expected = model(images())
        quantise(model)
        return float((model(images()) - expected).norm() / expected.norm())


def require_reload(steps: Sequence[Step], path: Path, embed_dim: int = 64) -> Any:
    """Asserts that a seed gives the same tensors twice, and that the artefact computes the same bit by bit; returns the model."""
    size = {"patch_size": 4, "embed_dim": embed_dim, "depth": 2, "num_heads": 4}
    section = {"family": "timm", "name": None, "create": size}
    data = TaskInfo(num_classes=5, in_chans=3, image_size=16, class_names=tuple("01234"))

    def build() -> tuple[Any, list[dict[str, Any]]]:
        torch.manual_seed(0)
        model, records = models.build(section, data).eval(), []
        for name, values in steps:
            technique = registry()[name]
            applied = technique.apply(model, make_config(technique.Config, values), surroundings(model))
            records.append({"technique": name, "version": technique.version, "resolved": applied.resolved})
        return model, records

    (model, records), (again, _) = build(), build()
    tensors = model.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.state_dict().items())
    artefact.save(model, path, model_description=models.describe(section, data), steps=records)
    with torch.inference_mode():
        assert torch.equal(artefact.load(path)(images()), model(images()))
    return model
