"""Quantisation-aware training with scales that are not learned: weights from their largest value, activations from a moving average.

Source: Jacob et al., arXiv 1712.05877, section 3 (simulated quantisation; moving averages of activation ranges; zero is a level);
straight-through gradients: Bengio et al., arXiv 1308.3432.
Differs from the paper: weights are symmetric around zero with one scale a row; activation ranges start from a batch of training
images instead of being off at first; nothing is folded, as ViTs have no batch normalisation; biases stay in floating point.
What it costs and saves, and which layers it takes: :mod:`shared_quantised_training`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workers.techniques.quantisation.shared_fake_quantise import EPS, FakeQuantised, Seen
from workers.techniques.quantisation.shared_quantised_training import Config, technique

MOMENTUM = 0.01
"""Share of a training step's range in the moving average. Ours; the paper asks for a smoothing close to 1."""


class ObservedRanges(FakeQuantised):
    """A layer with buffers ``input_low`` and ``input_high`` (), the moving averages of the ends of the activations' range."""

    input_low: Tensor
    input_high: Tensor

    def __init__(self, linear: nn.Linear, bits: int, input_bits: int) -> None:
        super().__init__(linear, bits, input_bits)
        if input_bits:
            self.register_buffer("input_low", torch.empty((), device=linear.weight.device))
            self.register_buffer("input_high", torch.empty((), device=linear.weight.device))
        self._taken: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def start(self, seen: Seen) -> None:
        if self.input_bits:
            self.input_low.fill_(seen.low)
            self.input_high.fill_(seen.high)

    def weight_scale(self) -> Tensor:
        peak = self.weight.detach().abs().amax(dim=1, keepdim=True)
        # A last bit more: rounding must not put the largest weight beyond the highest level, where no gradient passes.
        return (peak / self.limits[1] * (1 + 2 * EPS)).clamp_min(EPS)

    @torch.no_grad()
    def input_grid(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        if x is not None and self.training:
            self._take_in(x.min().float(), x.max().float())
        return grid(self.input_low, self.input_high, self.input_bits)

    def _take_in(self, low: Tensor, high: Tensor) -> None:
        """Moves the averages, once where the same activations are calculated again (grad_checkpointing)."""
        share = torch.full_like(low, MOMENTUM)
        if self._taken is not None:
            again = (low == self._taken[0]) & (high == self._taken[1])
            share = torch.where(again, 0.0, share)
        self.input_low.lerp_(low, share)
        self.input_high.lerp_(high, share)
        self._taken = (low, high)


def grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns the scale and the lowest level, both (), of levels from ``low`` to ``high`` of which one is zero."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(EPS)
    return scale, (low / scale).round()


TECHNIQUE = technique(
    "qat",
    Config,
    ObservedRanges,
    scale_ndim=2,
    source="Jacob et al. 2018, arXiv 1712.05877, section 3; Bengio et al. 2013, arXiv 1308.3432",
)
