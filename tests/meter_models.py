"""Small METERs: with random weights, and with such that every token matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests import meter_release as release
from tests.vision_language import CLASSES, batch, settings
from workers.models import meter
from workers.models.meter_release import from_release_state_dict

TASKS = list(CLASSES)
UNEQUAL = {
    **{"embed_dim": 24, "cross_depth": 3, "num_heads": 2, "text_dim": 40, "text_depth": 1, "text_heads": 5},
    **{"image_dim": 32, "image_depth": 2, "image_heads": 4},
}
"""Three widths, depths and numbers of heads, so that nothing can stand in for something else."""


def tiny(task: str = "vqa", *, seed: int = 0, **more: Any) -> meter.Meter:
    torch.manual_seed(seed)
    return meter.create({"name": "meter_tiny", "create": settings(task, **more)}).eval()


def loud(task: str = "vqa", **more: Any) -> meter.Meter:
    """A tiny model whose weights are large enough that every token matters to the logits."""
    model = tiny(task, **more)
    types = 3 if task == "nlvr2" else 2
    model.load_state_dict(from_release_state_dict(release.weights(model.shape, head=task, types=types), model))
    return model


def masked(task: str = "vqa") -> dict[str, Tensor]:
    examples = batch(task)
    examples["attention_mask"] = (torch.arange(6) < torch.tensor([6, 4, 5])[:, None]).long()
    return examples
