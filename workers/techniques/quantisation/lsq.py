"""LSQ: quantisation-aware training that learns how far apart the levels of weights and of activations lie.

Source: Esser et al., Learned Step Size Quantization, arXiv 1902.08153, sections 2.1 (gradient of the step) and 2.2 (its scale).
Differs from the paper: activations of a ViT are signed, so their levels are, too. Weights are trained from the trained model, in the
recipe's recovery training; the classifier heads have 8 bits, as in the paper, or are left alone. A step learns at a rate in
proportion to its first value, since Adam, unlike SGD, does not heed the gradient's scale. What it costs and saves, and which layers
it takes: :mod:`shared_quantised_training`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.quantisation import shared_quantised_training
from workers.techniques.quantisation.shared_fake_quantise import EPS, FakeQuantised, Seen
from workers.techniques.record import number

STEP_LR = 0.01
"""Peak learning rate of a step as a share of its first value. Ours: with Adam it can double in a hundred training steps."""


@dataclass(frozen=True)
class Config(shared_quantised_training.Config):
    """Bits of weights and of activations; fewer by default than where scales are not learned."""

    weight_bits: int = number(4, 2, 8, 1, search=(3, 8, 1), doc="bits a weight")


def first_step(mean: float, high: int) -> float:
    """Returns the step that training starts from: 2 mean|v| / sqrt(Qp), section 2.1.

    Args:
        mean: magnitude of the values; high: Qp, the highest level. Values that are all 0 get levels up to 1.
    """
    return 2 * mean / math.sqrt(high) if mean > 0 else 1 / high


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Returns x; its gradient is multiplied by ``factor``."""
    same: Tensor = _Scale.apply(x, factor)
    return same


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class LearnedSteps(FakeQuantised):
    """A layer with a learned step for its weight and, where they are rounded, one for its activations; both ()."""

    def __init__(self, linear: nn.Linear, bits: int, input_bits: int) -> None:
        super().__init__(linear, bits, input_bits)
        self.weight_step = nn.Parameter(torch.empty((), device=linear.weight.device))
        self.input_step = nn.Parameter(torch.empty((), device=linear.weight.device)) if input_bits else None

    @torch.no_grad()
    def start(self, seen: Seen) -> None:
        self.weight_step.fill_(first_step(float(self.weight.abs().mean()), self.limits[1]))
        if self.input_step is not None:
            self.input_step.fill_(first_step(seen.mean, 2 ** (self.input_bits - 1) - 1))

    def weight_scale(self) -> Tensor:
        return _step(self.weight_step, self.weight.numel(), self.limits[1])

    def input_grid(self, x: Tensor | None) -> tuple[Tensor, int]:
        assert self.input_step is not None
        half = 2 ** (self.input_bits - 1)
        features = 1 if x is None else x[0].numel()  # of one image
        return _step(self.input_step, features, half - 1), -half


def _step(step: Tensor, count: int, high: int) -> Tensor:
    """Returns the step, positive, with its gradient scaled by 1 / sqrt(count Qp), section 2.2."""
    return scale_gradient(step, 1 / math.sqrt(count * high)).abs().clamp_min(EPS)


def _groups(model: nn.Module, config: shared_quantised_training.Config) -> list[dict[str, Any]]:
    steps = [
        step
        for part in model.modules()
        if isinstance(part, LearnedSteps)
        for step in (part.weight_step, part.input_step)
        if step is not None
    ]
    return [{"params": [step], "lr": STEP_LR * float(step.detach().abs()), "weight_decay": 0.0} for step in steps]


TECHNIQUE = shared_quantised_training.technique(
    "lsq",
    Config,
    LearnedSteps,
    scale_ndim=0,
    parameter_groups=_groups,
    source="Esser et al. 2020, arXiv 1902.08153, section 2",
)
