"""What moves the weights: the optimiser and its groups, the schedule of the learning rate, the mean of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.record import Technique
from workers.training.settings import TrainingSettings

Steps = Sequence[tuple[Technique, Any]]
"""Techniques of a recipe with their configs."""


def make_optimizer(model: nn.Module, settings: TrainingSettings, steps: Steps) -> torch.optim.Optimizer:
    """Builds the optimiser: decayed matrices, undecayed vectors and embeddings, then the techniques' own groups."""
    lr, decay = settings.lr, settings.weight_decay
    own: list[dict[str, Any]] = []
    for technique, config in steps:
        if technique.parameter_groups is not None:
            own += [{**g, "params": list(g["params"])} for g in technique.parameter_groups(model, config)]
    claimed = {id(p) for group in own for p in group["params"]}
    no_decay: Callable[[], set[str]] = getattr(model, "no_weight_decay", set)
    excluded = no_decay()
    free = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in claimed]
    matrices = [p for n, p in free if p.ndim >= 2 and n not in excluded]
    others = [p for n, p in free if p.ndim < 2 or n in excluded]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}, *own]
    groups = [g for g in groups if g["params"]]
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=decay, fused=True)
    else:
        momentum = settings.momentum or 0.0
        optimizer = torch.optim.SGD(
            groups, lr=lr, weight_decay=decay, momentum=momentum, nesterov=momentum > 0, fused=True
        )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def schedule(name: str, warmup: float) -> Callable[[float], float]:
    """Returns progress (0 to 1) -> share of the peak learning rate.

    ``one_cycle`` rises along a cosine from 1/25 (Smith and Topin 2017, arXiv 1708.07120), ``cosine`` rises linearly
    from 0; both fall along a cosine to 0 after the ``warmup`` share of the training.
    """

    def factor(progress: float) -> float:
        if progress < warmup:
            rise = progress / warmup
            return rise if name == "cosine" else 1 - (1 - 1 / 25) * (1 + math.cos(math.pi * rise)) / 2
        return (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9))) / 2

    return factor


class WeightAverage:
    """Exponential moving average of the trained weights.

    ``mean <- d mean + (1 - d) weights`` after step t = 1, 2, ... with d = min(decay, (1 + t) / (10 + t)): the first
    weights, those of a model just cut, would otherwise weigh on short trainings.
    Source: the rising decay is that of TensorFlow's ExponentialMovingAverage (num_updates).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.means: list[Tensor] = [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step number ``step``, from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.means, self.weights, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the means for weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges weights and means."""
        for weight, mean in zip(self.weights, self.means, strict=True):
            weights = weight.clone()
            weight.copy_(mean)
            mean.copy_(weights)
