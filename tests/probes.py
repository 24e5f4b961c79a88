"""What the tests of training train: a model of a thousand weights, sixty images, a technique that does what a test says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workers.tasks.image_classification import Split
from workers.techniques.record import Technique, number
from workers.training.loop import train

SETTINGS: dict[str, Any] = {
    "epochs": 8,
    "batch_size": 16,
    "lr": 0.02,
    "weight_decay": 0.0,
    "warmup_fraction": 0.25,
    "optimizer": "adamw",
    "momentum": 0.9,
    "schedule": "one_cycle",
    "label_smoothing": 0.0,
    "grad_clip": 1.0,
    "amp": "none",
}


def make_split(count: int = 60) -> Split:
    """Three classes; class c is brightest in column c."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 3
    images = generator.normal(0, 0.3, (count, 3, 3, 1)).astype(np.float32)
    images[np.arange(count), :, labels] += 1
    return Split(images, labels.astype(np.int64), (0.0,), (1.0,))


def make_model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.Dropout(dropout), nn.GELU(), nn.Linear(16, 3))


def fit(model: nn.Module, *, seed: int = 0, split: Split | None = None, **more: Any) -> Any:
    settings = {**SETTINGS, **more.pop("settings", {})}
    return train(model, split or make_split(), settings, seed=seed, device="cpu", **more)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@dataclass(frozen=True)
class Config:
    weight: float = number(0.5, 0, 1, 0.5, doc="of the task loss")


def technique(**functions: Any) -> Technique:
    return Technique(
        "probe",
        "distillation",
        1,
        Config,
        "surgery",
        apply=lambda m, c, s: None,  # type: ignore[arg-type, return-value]
        rebuild=lambda m, r: m,
        source="none",
        **functions,
    )
