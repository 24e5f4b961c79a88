"""Times several models in turn on one device: interleaved calls, paired ratios, the best batch size.

An absolute time drifts by half within a process; the ratio of two models that take turns stays within a few per cent
(docs/measurement.md). The caller holds the lane.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.inputs import Inputs

Batch = Tensor | Inputs
Call = Callable[[Any], object]
"""A model, as it is run: a batch in, logits out."""

BOOTSTRAP_SEED = 0

LATENCY_PAIRS = 2000
"""Most single calls a latency is taken from: the 95th percentile is then told from a hundred calls beyond it."""

BLOCK_S = 0.02
"""Shortest time that one sample of a throughput covers; shorter calls are timed several at a time."""

GROWTH_CALLS = 3
GAIN = 1.01
"""A batch size counts as a gain where its throughput is this many times the best so far."""

PATIENCE = 2
"""Batch sizes without a gain after which growing stops."""

NEAR = 0.5
"""Sizes with at least this share of the best throughput are timed again, in turn: growing times one after the other, from a
cold start, and a size that was disturbed would be passed over for good."""

NEAREST = 5
"""Most sizes that are timed again."""

CONFIRMING_ROUNDS = 5


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Call, inputs: Batch, calls: int = 1) -> float:
    """Returns the seconds that ``calls`` calls take, work on the device included."""
    synchronise(inputs.device)
    start = time.perf_counter()
    for _ in range(calls):
        call(inputs)
    synchronise(inputs.device)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Arm:
    """One model in a comparison; ``calls`` of it are timed together as one sample."""

    call: Call
    inputs: Batch
    calls: int = 1


def blocked(call: Call, inputs: Batch) -> Arm:
    """Returns the arm whose samples cover at least :data:`BLOCK_S`."""
    once = min(seconds_of(call, inputs) for _ in range(GROWTH_CALLS))
    return Arm(call, inputs, max(1, math.ceil(BLOCK_S / once)))


@torch.inference_mode()
def interleaved(
    arms: Sequence[Arm], *, window_s: float, pairs: int, warmup: int, most: int | None = None
) -> NDArray[np.float64]:
    """Runs the arms in turn, the order reversed every other time so that none always follows the same one.

    Args:
        window_s: seconds each arm is timed for, at least.
        pairs: rounds, at least; ``most``: rounds after which it ends in any case.
        warmup: untimed rounds before.

    Returns:
        (rounds, arms) seconds a call.
    """
    for _ in range(warmup):
        for arm in arms:
            arm.call(arm.inputs)
    order = list(range(len(arms)))
    rounds: list[list[float]] = []
    spent = [0.0] * len(arms)
    while (len(rounds) < pairs or min(spent) < window_s) and (most is None or len(rounds) < max(most, pairs)):
        found = [0.0] * len(arms)
        for index in order:
            arm = arms[index]
            seconds = seconds_of(arm.call, arm.inputs, arm.calls)
            spent[index] += seconds
            found[index] = seconds / arm.calls
        rounds.append(found)
        order.reverse()
    return np.array(rounds)


def paired_ratio(own: NDArray[np.float64], baseline: NDArray[np.float64], resamples: int) -> tuple[float, float, float]:
    """Returns the median of the paired ratios and its 95 % percentile bootstrap interval over pairs.

    Args:
        own, baseline: (n,) values of the same quantity, measured in turn.
    """
    ratios = own / baseline
    drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(len(ratios), size=(resamples, len(ratios)))
    medians = np.median(ratios[drawn], axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(np.median(ratios)), float(low), float(high)


@dataclass(frozen=True)
class Growth:
    """What growing the batch found: the best size, the largest that ran, images/s by size (medians in turn for those near the
    best, single calls for the others), and why it ended."""

    best: int
    largest: int
    images_per_s: dict[int, float]
    ended: str


@torch.inference_mode()
def grow_batch(call: Call, inputs: Callable[[int], Batch], *, start: int, step: int, most: int) -> Growth:
    """Finds the batch size with the highest throughput: grown until memory is out, nothing is gained, or ``most``.

    Args:
        inputs: makes a batch of the given size on the device.

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: not even ``start`` images fit.
    """
    found: dict[int, float] = {}
    best, idle, ended = start, 0, "largest size allowed"
    for size in range(start, max(start, most) + 1, step):
        try:
            batch = inputs(size)
            call(batch)
            fastest = min(seconds_of(call, batch) for _ in range(GROWTH_CALLS))
        except (RuntimeError, MemoryError) as error:
            if not found or not out_of_memory(error):
                raise
            ended = "out of memory"
            break
        found[size] = size / fastest
        if found[size] > GAIN * found[best] or size == start:
            best, idle = size, 0
        else:
            idle += 1
        if idle >= PATIENCE:
            ended = "no gain"
            break
    with suppress(AttributeError, RuntimeError):
        torch.cuda.empty_cache()
    found |= _in_turn(call, inputs, found)
    best = min(size for size in found if GAIN * found[size] >= max(found.values()))  # what gains nothing is not larger
    return Growth(best, max(found), found, ended)


def _in_turn(call: Call, inputs: Callable[[int], Batch], found: dict[int, float]) -> dict[int, float]:
    """Returns images/s of the sizes near the best, timed in turn; nothing where there is one."""
    limit = NEAR * max(found.values())
    near = sorted((s for s in found if found[s] >= limit), key=found.__getitem__, reverse=True)[:NEAREST]
    if len(near) == 1:
        return {}
    arms = [Arm(call, inputs(size), max(1, math.ceil(BLOCK_S * found[size] / size))) for size in near]
    seconds = np.median(interleaved(arms, window_s=0.0, pairs=CONFIRMING_ROUNDS, warmup=0), axis=0)
    return {size: size / float(once) for size, once in zip(near, seconds, strict=True)}


def out_of_memory(error: BaseException) -> bool:
    """Says whether the device's or the host's memory was too small."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
