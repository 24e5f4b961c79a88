"""Interleaving, paired ratios and batch growth with models whose cost is known."""

from __future__ import annotations

import math
import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import sleepers
from tests.clocks import Clock
from tests.sleepers import Sleeper
from workers.measuring import timing
from workers.measuring.timing import (
    BLOCK_S,
    CONFIRMING_ROUNDS,
    GROWTH_CALLS,
    Arm,
    grow_batch,
    interleaved,
    paired_ratio,
)

clock = sleepers.clock

GROWN = 1 + GROWTH_CALLS
"""Calls of one size while the batch grows: a first one that warms up, and the timed ones."""


def images(batch: int) -> Tensor:
    return torch.zeros(batch, 1, 2, 2)


def test_seconds_are_those_of_the_wall_clock() -> None:
    asleep = timing.seconds_of(lambda _: time.sleep(0.002), images(1), calls=3)
    assert asleep >= 3 * 0.002  # the processor's own time would be next to none


def test_arms_take_turns_and_the_order_is_reversed_every_other_time(clock: Clock) -> None:
    first, second = Sleeper(clock, 1 / 64), Sleeper(clock, 1 / 32)
    seconds = interleaved([Arm(first, images(1)), Arm(second, images(1))], window_s=0, pairs=4, warmup=0)
    assert seconds.tolist() == [[1 / 64, 1 / 32]] * 4
    both = sorted([(*c, "A") for c in first.calls] + [(*c, "B") for c in second.calls])
    assert "".join(c[2] for c in both) == "ABBAABBA"


def test_a_window_is_filled_for_each_arm_and_the_most_rounds_end_it(clock: Clock) -> None:
    slow, fast = Sleeper(clock, 1 / 64), Sleeper(clock, 1 / 512)
    seconds = interleaved([Arm(slow, images(1)), Arm(fast, images(1))], window_s=1 / 16, pairs=2, warmup=1)
    assert len(seconds) == 512 / 16
    assert len(slow.calls) == len(seconds) + 1
    ended = interleaved([Arm(slow, images(1))], window_s=60, pairs=2, warmup=0, most=5)
    assert len(ended) == 5


def test_several_calls_a_sample_are_told_for_one_call(clock: Clock) -> None:
    model = Sleeper(clock, 1 / 256)
    arm = torch.inference_mode()(timing.blocked)(model, images(2))
    assert arm.calls == math.ceil(256 * BLOCK_S) > 1
    seconds = interleaved([arm], window_s=0, pairs=3, warmup=0)
    assert seconds.tolist() == [[1 / 256]] * 3
    assert len(model.calls) == GROWTH_CALLS + 3 * arm.calls


def test_growing_stops_where_nothing_is_gained(clock: Clock) -> None:
    model = Sleeper(clock, 1 / 64)  # a fixed cost: every larger batch gains
    grown = torch.inference_mode()(grow_batch)(model, images, start=2, step=2, most=8)
    assert (grown.best, grown.largest, grown.ended) == (8, 8, "largest size allowed")
    assert grown.images_per_s == {size: 64 * size for size in (2, 4, 6, 8)}
    again = CONFIRMING_ROUNDS * math.ceil(64 * BLOCK_S)  # those with half the best throughput
    assert Counter(size for _, size in model.calls) == {2: GROWN, **dict.fromkeys((4, 6, 8), GROWN + again)}
    flat = Sleeper(clock, 0.0, per_image_s=1 / 256)  # a cost an image: none does
    grown = torch.inference_mode()(grow_batch)(flat, images, start=4, step=4, most=400)
    assert (grown.best, grown.largest, grown.ended) == (4, 12, "no gain")
    assert grown.images_per_s == dict.fromkeys((4, 8, 12), 256)


def test_a_size_that_was_disturbed_while_growing_is_not_passed_over(clock: Clock) -> None:
    calls = 0

    def model(batch: Tensor) -> None:
        """16 ticks and one an image; the first calls of 8 images, as many as growing makes, take a quarter longer."""
        nonlocal calls
        calls += len(batch) == 8
        ticks = 16 + len(batch)
        clock.sleep(ticks * (1.25 if len(batch) == 8 and calls <= GROWN else 1.0) / 1024)

    grown = grow_batch(model, lambda size: torch.zeros(size, 1), start=2, step=2, most=8)
    assert calls == GROWN + CONFIRMING_ROUNDS
    assert grown.best == 8
    assert grown.images_per_s[8] == pytest.approx(8 * 1024 / 24)


def test_growing_stops_where_memory_is_out(clock: Clock) -> None:
    model = Sleeper(clock, 1 / 64, limit=7)
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
