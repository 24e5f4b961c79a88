"""Models whose cost is known, on a clock of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.clocks import Clock
from workers.measuring import strong_baseline, timing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The one clock that all who time a model see; a module takes it over with ``clock = sleepers.clock``."""
    return Clock(monkeypatch, timing, strong_baseline)


class Sleeper(nn.Module):
    """Takes ``seconds``, and ``per_image_s`` for every image, of the clock."""

    def __init__(self, clock: Clock, seconds: float, per_image_s: float = 0.0, limit: int | None = None) -> None:
        super().__init__()
        self.clock, self.seconds, self.per_image_s, self.limit = clock, seconds, per_image_s, limit
        self.calls: list[tuple[float, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        if self.limit is not None and len(images) > self.limit:
            raise torch.OutOfMemoryError("the device is full")
        self.calls.append((self.clock.monotonic(), len(images)))
        self.clock.sleep(self.seconds + self.per_image_s * len(images))
        return images.new_zeros(len(images), 10)
