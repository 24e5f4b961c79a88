"""Real digits for tests of techniques that must train: a split of them, a small ViT that has learned it, and settings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tests.workers.techniques.models import vit
from workers import tasks
from workers.tasks.image_classification import Split
from workers.techniques import registry
from workers.training.loop import train
from workers.trial import Step

SETTINGS: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 40,
    "lr": 2e-3,
    "weight_decay": 0.0,
    "warmup_fraction": 0.1,
    "optimizer": "adamw",
    "momentum": 0.9,
    "schedule": "cosine",
    "label_smoothing": 0.0,
    "grad_clip": 1.0,
    "amp": "none",
}


def digits(count: int) -> Split:
    """That many training images, 8 x 8 pixels of one channel."""
    return tasks.load({"kind": "digits", "train_limit": count}).train


def learned(split: Split, epochs: int = 3) -> Any:
    """A ViT of 16 patch tokens, 3 blocks and a class token, after a short training."""
    model = vit(img_size=8, patch_size=2, in_chans=1, num_classes=10)
    train(model, split, {**SETTINGS, "epochs": epochs}, seed=0, device="cpu")
    return model


def full(name: str, **config: Any) -> Step:
    """A step of a recipe with every parameter given."""
    return Step(name, asdict(registry()[name].Config(**config)))
