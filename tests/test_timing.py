"""Interleaving, paired ratios and batch growth with models whose cost is known."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workers import timing
from workers.timing import GROWTH_CALLS, Arm, grow_batch, interleaved, paired_ratio


class Sleeper(nn.Module):
    """Takes ``seconds`` and ``per_image_s`` for every image, however busy the machine is, as far as sleeping goes."""

    def __init__(self, seconds: float, per_image_s: float = 0.0, limit: int | None = None) -> None:
        super().__init__()
        self.seconds, self.per_image_s, self.limit = seconds, per_image_s, limit
        self.calls: list[tuple[float, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        if self.limit is not None and len(images) > self.limit:
            raise torch.OutOfMemoryError("the device is full")
        self.calls.append((time.monotonic(), len(images)))
        time.sleep(self.seconds + self.per_image_s * len(images))
        return images.new_zeros(len(images), 10)


def images(batch: int) -> Tensor:
    return torch.zeros(batch, 1, 2, 2)


def test_arms_take_turns_and_the_order_is_reversed_every_other_time() -> None:
    first, second = Sleeper(0.001), Sleeper(0.001)
    seconds = interleaved([Arm(first, images(1)), Arm(second, images(1))], window_s=0, pairs=4, warmup=0)
    assert seconds.shape == (4, 2)
    both = sorted([(*c, "A") for c in first.calls] + [(*c, "B") for c in second.calls])
    assert "".join(c[2] for c in both) == "ABBAABBA"


def test_a_window_is_filled_for_each_arm_and_the_most_rounds_end_it() -> None:
    slow, fast = Sleeper(0.02), Sleeper(0.002)
    seconds = interleaved([Arm(slow, images(1)), Arm(fast, images(1))], window_s=0.05, pairs=2, warmup=1)
    assert seconds[:, 1].sum() >= 0.05
    assert len(seconds) > 5
    assert len(slow.calls) == len(seconds) + 1
    ended = interleaved([Arm(slow, images(1))], window_s=60, pairs=2, warmup=0, most=5)
    assert len(ended) == 5


def test_several_calls_a_sample_are_told_for_one_call() -> None:
    model = Sleeper(0.003)
    arm = torch.inference_mode()(timing.blocked)(model, images(2))
    assert arm.calls >= 2
    assert arm.calls * 0.003 >= timing.BLOCK_S * 0.9 or arm.calls == 7
    seconds = interleaved([arm], window_s=0, pairs=3, warmup=0)
    assert np.median(seconds) == pytest.approx(0.003, rel=0.5)


def test_growing_stops_where_nothing_is_gained() -> None:
    model = Sleeper(0.02)  # a fixed cost: every larger batch gains
    grown = torch.inference_mode()(grow_batch)(model, images, start=2, step=2, most=8)
    assert (grown.best, grown.largest, grown.ended) == (8, 8, "largest size allowed")
    flat = Sleeper(0.0, per_image_s=0.004)  # a cost an image: none does
    grown = torch.inference_mode()(grow_batch)(flat, images, start=4, step=4, most=400)
    assert grown.best <= 12
    assert grown.largest <= 40
    assert grown.ended == "no gain"
    assert grown.images_per_s[4] == pytest.approx(250, rel=0.3)


def test_a_size_that_was_disturbed_while_growing_is_not_passed_over() -> None:
    calls = 0

    def model(batch: Tensor) -> None:
        """10 ms and 1 ms an image; the first calls of 8 images, as many as growing makes, take a quarter longer."""
        nonlocal calls
        calls += len(batch) == 8
        time.sleep((0.010 + 0.001 * len(batch)) * (1.25 if len(batch) == 8 and calls <= 1 + GROWTH_CALLS else 1.0))

    grown = grow_batch(model, lambda size: torch.zeros(size, 1), start=2, step=2, most=8)
    assert calls > 1 + GROWTH_CALLS
    assert grown.best == 8


def test_growing_stops_where_memory_is_out() -> None:
    model = Sleeper(0.02, limit=7)
    grown = torch.inference_mode()(grow_batch)(model, images, start=3, step=2, most=100)
    assert (grown.best, grown.largest, grown.ended) == (7, 7, "out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        torch.inference_mode()(grow_batch)(model, images, start=8, step=2, most=100)


def test_other_errors_than_memory_are_not_taken_for_it() -> None:
    class Broken(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            if len(batch) > 2:
                raise RuntimeError("shapes do not fit")
            return batch

    with pytest.raises(RuntimeError, match="shapes"):
        grow_batch(Broken(), images, start=1, step=1, most=9)


def test_the_interval_of_equal_models_holds_one() -> None:
    generator = np.random.default_rng(3)
    drift = np.linspace(1, 1.5, 40)  # both drift together, which pairing takes out
    own, baseline = (drift * generator.lognormal(0, 0.05, 40) for _ in range(2))
    ratio, low, high = paired_ratio(own, baseline, 1000)
    assert low <= 1 <= high
    assert 0.9 < low <= ratio <= high < 1.1
    assert paired_ratio(own, baseline, 1000) == (ratio, low, high)


def test_the_paired_ratio_of_known_values() -> None:
    assert paired_ratio(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]), 10) == (2, 2, 2)
    ratio, low, high = paired_ratio(np.array([1.0, 2.0, 30.0]), np.ones(3), 2000)
    assert ratio == 2
    assert (low, high) == (1, 30)
