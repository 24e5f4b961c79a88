"""Measures an artefact against the strong baseline: latency, throughput, peak memory (docs/measurement.md).

Source: the protocol is PuMer's (arXiv 2305.17530, section 5) and ToMe's (arXiv 2210.09461, section 4): throughput at the best
batch size, found by growing it; latency at batch 1; peak memory at a batch that both models take.
Differs: the two models take turns in one process, and what counts is the median of the paired ratios with its bootstrap
interval; the baseline is the best uncompressed way to run the model (strong_baseline.py) at its own best batch size.

Times are taken alone on the device: the caller holds the lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.inputs import Inputs
from workers.measuring import timing
from workers.measuring.counting import count_macs, count_params
from workers.measuring.made_inputs import make_inputs
from workers.measuring.peak_memory import NotTellable
from workers.measuring.strong_baseline import StrongBaseline, grow
from workers.measuring.timing import Arm
from workers.measuring.ways import COMPILE, as_way, compile_model
from workers.metrics import METRICS, SPEEDS
from workers.node.conditions import device_conditions, dtypes, fused, threads
from workers.tasks import TaskInfo
from workers.trial import Measurement

__all__ = ["NotTellable", "Subject", "count_macs", "count_params", "make_inputs", "measure_speed"]


@dataclass(frozen=True)
class Subject:
    """What is measured and under which settings.

    Attributes:
        model: the reloaded artefact on ``device``; ``baseline``: the uncompressed model, there too.
        artefact_key: stage key that the records carry.
        settings: the measurement section of the context: those of :mod:`workers.measuring.protocols`, and ``protocol``,
            ``threads``, ``bootstrap``, ``compile``.
    """

    model: nn.Module
    baseline: nn.Module
    artefact_key: str
    settings: Mapping[str, Any]
    task_info: TaskInfo
    device: torch.device


def measure_speed(subject: Subject, strong: StrongBaseline) -> Measurement:
    """Measures one kind of speed, the one that ``strong`` is a record of, with ``subject.settings['threads']`` threads.

    Returns:
        a record whose ``ratio`` is compressed over strong baseline, ``value`` the median of the compressed model's samples.
    """
    settings = subject.settings
    with threads(int(settings["threads"])), torch.inference_mode():
        arms, found = _arms(subject, strong)
        latency = strong.kind == "latency"
        seconds = timing.interleaved(
            arms,
            window_s=float(settings["window_s"]),
            pairs=int(settings["latency_pairs" if latency else "throughput_pairs"]),
            warmup=int(settings["warmup"]),
            most=timing.LATENCY_PAIRS if latency else None,
        )
        conditions = _conditions(subject, strong) | found
    sizes = np.array([len(arm.inputs) for arm in arms])
    return _record(subject, strong, sizes, seconds, conditions)


def _arms(subject: Subject, strong: StrongBaseline) -> tuple[list[Arm], dict[str, Any]]:
    """Returns the arms, compressed and baseline, and how the compressed one is run."""
    inputs: Callable[[int], Tensor | Inputs] = partial(make_inputs, subject.task_info, subject.device)
    baseline = as_way(subject.baseline, strong.way)
    model = subject.model.eval()
    if strong.kind == "latency":
        arms = [Arm(model, inputs(1)), Arm(baseline, inputs(1))]
        found: dict[str, Any] = {}
    else:
        growth = grow(model, subject.settings, inputs)
        arms = [timing.blocked(model, inputs(growth.best)), timing.blocked(baseline, inputs(strong.batch))]
        found = {
            "largest_batch": growth.largest,
            "growth_ended": growth.ended,
            "growth_images_per_s": {str(size): round(value, 1) for size, value in growth.images_per_s.items()},
        }
    found["compiled"] = False
    if subject.settings["compile"]:  # what the baseline may use, the artefact may
        arms[0], found["compiled"] = _faster(arms[0])
    return arms, found | {"calls_per_sample": [arm.calls for arm in arms]}


def _faster(eager: Arm) -> tuple[Arm, bool | str]:
    """Returns the arm eager or compiled, whichever is faster, and whether it is compiled (or why it cannot be)."""
    eager.call(eager.inputs)  # what layers make at their first call, a kernel's packing, the compiler must find made
    try:
        compiled = timing.blocked(compile_model(eager.call), eager.inputs)  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - the compiler meets kernels that it cannot take
        return eager, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
    found = np.median(timing.interleaved([eager, compiled], window_s=0.0, pairs=9, warmup=1), axis=0)
    # Both as many calls a sample as before: a latency stays that of single calls.
    return (Arm(compiled.call, eager.inputs, eager.calls), True) if found[1] < found[0] else (eager, False)


def _record(
    subject: Subject,
    strong: StrongBaseline,
    sizes: NDArray[np.int64],
    seconds: NDArray[np.float64],
    conditions: Mapping[str, Any],
) -> Measurement:
    """Makes the record from (rounds, 2) seconds a call and the two batch sizes."""
    values = seconds * 1e3 if strong.kind == "latency" else sizes / seconds
    ratio, low, high = timing.paired_ratio(values[:, 0], values[:, 1], int(subject.settings["bootstrap"]))
    p95 = np.percentile(seconds * 1e3, 95, axis=0)
    more = {
        "repeats": len(seconds),
        "baseline_batch": int(sizes[1]),
        "call_ms_p95": float(p95[0]),
        "baseline_call_ms_p95": float(p95[1]),
    }
    return Measurement(
        kind=strong.kind,
        artefact=subject.artefact_key,
        device=subject.device.type,
        batch=int(sizes[0]),
        resolution=subject.task_info.image_size,
        protocol=str(subject.settings["protocol"]),
        value=float(np.median(values[:, 0])),
        unit=METRICS[SPEEDS[strong.kind]].unit,
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        samples=tuple(values[:, 0].tolist()),
        baseline_samples=tuple(values[:, 1].tolist()),
        conditions={**conditions, **more},
    )


def _conditions(subject: Subject, strong: StrongBaseline) -> dict[str, Any]:
    way = strong.way.removesuffix(COMPILE)
    return device_conditions(subject.device) | {
        "dtype": dtypes(subject.model),
        "baseline_dtype": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[way],
        "fused_attention": fused(subject.model),
        "baseline_fused_attention": fused(subject.baseline),
        "threads": int(subject.settings["threads"]),
        "warmup": int(subject.settings["warmup"]),
        "window_s": float(subject.settings["window_s"]),
        "way": strong.way,
        "noise_sigma": strong.noise_sigma,
        "noise_dof": strong.noise_dof,
    }


def half_width(found: Measurement, strong: StrongBaseline) -> float:
    """Returns the half width, as a log ratio, of the 95 % interval of a speed: of bootstrap and A/A noise the larger."""
    if found.ratio is None or found.ratio_low is None or found.ratio_high is None:
        raise ValueError(f"{found.kind} was measured without its baseline")
    bootstrap = max(math.log(found.ratio_high / found.ratio), math.log(found.ratio / found.ratio_low))
    return max(bootstrap, strong.half_width())
