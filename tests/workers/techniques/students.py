"""Students for the tests of distillation, and a short training of one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.workers.techniques.models import images, surroundings, vit
from workers.tasks.batches import Split
from workers.techniques.distillation.distill import TECHNIQUE, Config
from workers.techniques.record import LossInputs
from workers.training.loop import train


def logits(seed: int, rows: int = 6) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)) * 2


def inputs(student: Tensor, teacher: Tensor | None) -> LossInputs:
    return LossInputs(torch.nn.Identity(), images(6), student, torch.arange(6) % 5, teacher, 0.5)


def student(variant: str = "class", seed: int = 0, **config: Any) -> Any:
    model = vit(variant, depth=4)
    return TECHNIQUE.apply(model, Config(**config), surroundings(model, seed))


def noise(count: int = 32) -> Split:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return Split(pixels, generator.integers(0, 5, count), (0.5,) * 3, (0.25,) * 3)


SETTINGS: dict[str, Any] = {
    "epochs": 6, "batch_size": 16, "lr": 5e-3, "weight_decay": 0.0, "warmup_fraction": 0.1, "optimizer": "adamw",
    "schedule": "cosine", "grad_clip": 1.0,
}  # fmt: skip


def fit(model: Any, config: Config, split: Split, **more: Any) -> Tensor:
    """Trains a student of the ViT of seed 9 and returns what the teacher says of the images."""
    teacher = vit(seed=9)
    shown = torch.cat([x for _, x, _ in split.batches(16)])
    with torch.no_grad():
        said: Tensor = teacher(shown)
    more = more or {"teacher_logits": said}
    train(model, split, SETTINGS, seed=0, device="cpu", steps=[(TECHNIQUE, config)], **more)
    return said
