"""Calibration: what activations a model computes on training examples, watched at the inputs of modules, and ranges from it.

A watcher sees the input of one module, batch by batch, in a fixed order, and keeps sums and evenly spaced samples, so the
same images give the same ranges. The model runs as it will ship, its token reduction included. Shapes: (..., C).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from workers.inputs import Inputs
from workers.techniques.quantisation.shared_affine import NotQuantisable
from workers.techniques.record import Surroundings

EPS = torch.finfo(torch.float32).eps
"""Smallest scale, as torchao and torch.ao: a constant of zero has no scale."""

VALUES_A_BATCH = 65_536
"""Sampled of the first batch for percentiles: 16 such batches hold a hundred values above the 99.99th of a million."""


# --- samples ----------------------------------------------------------------------------------------------------------


def even_step(values: int, count: int, avoid: int) -> int:
    """Returns the step that takes about ``count`` of so many values; it shares no factor with ``avoid``.

    A step that divided the number of channels, or of tokens, would see only some of them.
    """
    step = max(1, -(-values // count))
    while gcd(step, avoid) > 1:
        step += 1
    return step


# --- watchers ---------------------------------------------------------------------------------------------------------


class TensorRange:
    """Range of all values of a tensor.

    Args:
        percentile: 100 for the extremes; below, the range that this share of the values lies within, the rest being cut
            off at either end alike. The extremes too where the samples are too few to hold a value outside: the largest of a
            sample is no percentile, and would cut more than was asked for.
    """

    def __init__(self, percentile: float = 100.0) -> None:
        self.percentile = percentile
        self.low, self.high = float("inf"), float("-inf")
        self.samples: list[Tensor] = []
        self._step = 0

    def see(self, x: Tensor) -> None:
        """Takes the values of x (..., C).

        Raises:
            NotQuantisable: one is NaN or infinite.
        """
        low, high = torch.aminmax(x)
        require_finite(low, high)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        if self.percentile < 100:
            # That of the first batch for all, so that a value counts as much in a smaller last one.
            self._step = self._step or even_step(x.numel(), VALUES_A_BATCH, x.shape[-1])
            self.samples.append(x.reshape(-1)[:: self._step].float().cpu())

    def range(self) -> tuple[float, float]:
        """Returns the smallest and the largest value to represent."""
        if self.percentile == 100:
            return self.low, self.high
        values = torch.cat(self.samples).sort().values
        cut = round(len(values) * (1 - self.percentile / 100) / 2)
        if cut == 0:
            return self.low, self.high
        return float(values[cut]), float(values[len(values) - 1 - cut])


class ChannelRange:
    """Range of each channel over all tokens."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """Takes x (..., C); raises NotQuantisable for NaN and infinity."""
        rows = x.reshape(-1, x.shape[-1]).float()
        low, high = rows.amin(0), rows.amax(0)
        require_finite(low, high)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def range(self) -> tuple[Tensor, Tensor]:
        """Returns the smallest and the largest value of each channel, (C,) float32 each."""
        if self.low is None or self.high is None:
            raise NotQuantisable("calibration saw no image")
        return self.low, self.high


def require_finite(*values: Tensor) -> None:
    """Raises NotQuantisable where one of ``values`` holds NaN or infinity."""
    if not all(bool(v.isfinite().all()) for v in values):
        raise NotQuantisable("holds NaN or infinity")


# --- running ----------------------------------------------------------------------------------------------------------


def calibration_batches(surroundings: Surroundings, images: int) -> Iterator[Tensor | Inputs]:
    """Yields the first ``images`` training examples of the seed's order, a batch each; fewer where there are fewer."""
    left = images
    for batch, _ in surroundings.batches():
        surroundings.tick()
        yield batch[:left]
        left -= len(batch)
        if left <= 0:
            return


@torch.no_grad()
def watch(
    model: nn.Module, watchers: Mapping[str, Callable[[Tensor], None]], surroundings: Surroundings, images: int
) -> set[str]:
    """Runs the model in eval mode over training examples and shows each watcher what its module gets.

    Args:
        watchers: name of a module -> function of its first input.

    Returns:
        names of the modules that ran; those that no forward calls have no range.

    Raises:
        NotQuantisable: an input holds NaN or infinity, naming the module; or there is no training image.
    """
    ran: set[str] = set()

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            ran.add(name)
            try:
                watchers[name](args[0].detach())
            except NotQuantisable as error:
                raise NotQuantisable(f"calibration: the input of {name} {error}") from None

        return hook

    was = {part: part.training for part in model.modules()}
    hooks = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in watchers]
    seen = 0
    try:
        model.eval()
        for batch in calibration_batches(surroundings, images):
            model(batch)
            seen += len(batch)
    finally:
        for handle in hooks:
            handle.remove()
        for part, training in was.items():
            part.training = training
    if not seen:
        raise NotQuantisable("calibration: there is no training image")
    return ran


def running(model: nn.Module, names: Iterable[str], surroundings: Surroundings) -> list[str]:
    """Returns those of the named modules that a forward pass calls, in their order; values do not matter."""
    asked = list(names)
    ran = watch(model, dict.fromkeys(asked, lambda x: None), surroundings, 1)
    return [name for name in asked if name in ran]


# --- scales -----------------------------------------------------------------------------------------------------------


def asymmetric(low: float, high: float, bits: int = 8) -> tuple[float, int]:
    """Returns scale and zero point of unsigned codes: ``x ~ (q - zero_point) * scale``, q from 0 to 2^bits - 1.

    Zero is represented exactly. A constant c has the scale |c| / (2^bits - 1), which represents it exactly.
    """
    top = 2**bits - 1
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / top, EPS)
    return scale, min(max(round(-low / scale), 0), top)
