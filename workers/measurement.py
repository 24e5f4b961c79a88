"""Measurement: speed against the interleaved baseline, peak memory, MACs, parameters (METHODS section 7).

Times are taken alone on the device: the caller holds the lane. The compressed model and the baseline run in turn,
A B A B, in this process, and what counts is the median of the paired ratios with its bootstrap interval, because an
absolute time drifts by half within a process.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from workers.peak_memory import NotTellable, peak_memory_bytes
from workers.protocol import Measurement
from workers.tasks import TaskInfo

__all__ = ["NotTellable", "count_macs", "count_params", "measure", "paired_ratio"]

BOOTSTRAP_SEED = 0
INPUT_SEED = 0


def measure(
    model: nn.Module,
    baseline: nn.Module,
    settings: Mapping[str, Any],
    *,
    task_info: TaskInfo,
    device: torch.device | str,
    artefact_key: str,
    quantities: Collection[str] = ("latency", "throughput"),
    artefact_path: str | Path | None = None,
) -> tuple[Measurement, ...]:
    """Measures ``model`` on ``device``, where it and ``baseline`` lie already.

    Args:
        model: the reloaded artefact; ``baseline``: the uncompressed model that it is timed against.
        settings: ``protocol, batch, latency_repeats, throughput_batches, warmup, threads, bootstrap``.
        artefact_key: stage key that the records carry.
        quantities: of ``latency`` (batch 1, ms), ``throughput`` (``settings["batch"]``, images/s), ``peak_memory``
            (same batch, bytes).
        artefact_path: folder of the artefact, which a fresh process loads for ``peak_memory``.

    Raises:
        NotTellable: peak memory cannot be told for this model or machine.
        ValueError: an unknown quantity.
    """
    unknown = set(quantities) - {"latency", "throughput", "peak_memory"}
    if unknown:
        raise ValueError(f"quantities must be of latency, throughput, peak_memory; got {', '.join(sorted(unknown))}")
    device = torch.device(device)
    found = []
    with _threads(int(settings["threads"])):
        conditions = _conditions(model, baseline, settings, device)

        def record(kind: str, batch: int, value: float, unit: str, **more: Any) -> None:
            own = conditions | more.pop("conditions", {})
            resolution, protocol = task_info.image_size, str(settings.get("protocol", "quick"))
            found.append(
                Measurement(
                    kind, artefact_key, device.type, batch, resolution, protocol, value, unit, conditions=own, **more
                )
            )

        for kind, batch, repeats in (
            ("latency", 1, int(settings["latency_repeats"])),
            ("throughput", int(settings["batch"]), int(settings["throughput_batches"])),
        ):
            if kind in quantities:
                images = _images(task_info, batch, device)
                seconds = _interleaved(model, baseline, images, repeats, int(settings["warmup"]))
                _record_speed(record, kind, batch, seconds, int(settings["bootstrap"]))
    if "peak_memory" in quantities:
        if artefact_path is None:
            raise NotTellable("peak memory is taken from an artefact in a fresh process; artefact_path is missing")
        batch = int(settings["batch"])
        peak = peak_memory_bytes(artefact_path, batch, task_info, device, int(settings["threads"]))
        how = "allocator peak" if device.type == "cuda" else "resident growth"
        record("peak_memory", batch, float(peak), "bytes", conditions={"method": f"{how} in a fresh process"})
    return tuple(found)


def _record_speed(
    record: Callable[..., None], kind: str, batch: int, seconds: NDArray[np.float64], bootstrap: int
) -> None:
    """Records latency in ms or throughput in images/s from (repeats, 2) seconds a call: compressed, baseline."""
    values = seconds * 1e3 if kind == "latency" else batch / seconds
    ratio, low, high = paired_ratio(values[:, 0], values[:, 1], bootstrap)
    p95 = np.percentile(seconds * 1e3, 95, axis=0)
    record(
        kind,
        batch,
        float(np.median(values[:, 0])),
        "ms" if kind == "latency" else "images/s",
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        samples=tuple(values[:, 0].tolist()),
        baseline_samples=tuple(values[:, 1].tolist()),
        conditions={"repeats": len(seconds), "call_ms_p95": float(p95[0]), "baseline_call_ms_p95": float(p95[1])},
    )


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


def _interleaved(
    model: nn.Module, baseline: nn.Module, images: Tensor, repeats: int, warmup: int
) -> NDArray[np.float64]:
    """Returns seconds a call: (repeats, 2), compressed and baseline in turn."""
    pair = (model.eval(), baseline.eval())
    seconds = np.empty((repeats, 2))

    def synchronise() -> None:
        if images.is_cuda:
            torch.cuda.synchronize(images.device)

    with torch.inference_mode():
        for _ in range(warmup):
            for one in pair:
                one(images)
        for repeat in range(repeats):
            for column, one in enumerate(pair):
                synchronise()
                start = time.perf_counter()
                one(images)
                synchronise()
                seconds[repeat, column] = time.perf_counter() - start
    return seconds


def _images(info: TaskInfo, batch: int, device: torch.device) -> Tensor:
    """Returns standard normal images (B, C, H, W) float32, as normalised data is."""
    generator = torch.Generator().manual_seed(INPUT_SEED)
    return torch.randn(batch, info.in_chans, info.image_size, info.image_size, generator=generator).to(device)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- conditions -------------------------------------------------------------------------------------------------------


def _conditions(
    model: nn.Module, baseline: nn.Module, settings: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    conditions: dict[str, Any] = {
        "device_name": device_name(device),
        "dtype": _dtypes(model),
        "baseline_dtype": _dtypes(baseline),
        "fused_attention": _fused(model),
        "baseline_fused_attention": _fused(baseline),
        "threads": int(settings["threads"]),
        "warmup": int(settings["warmup"]),
        "torch": str(torch.__version__),
    }
    if device.type == "cuda":
        conditions |= {"cuda": torch.version.cuda, "driver": _driver()}
    return conditions


def device_name(device: torch.device) -> str:
    """Returns the product name of the GPU or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


@cache
def _driver() -> str | None:
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return " ".join(first.split(":", 1)[-1].split())


def _dtypes(model: nn.Module) -> str:
    """Returns the dtypes of the state, most bytes first: ``float32``, ``int8+float32``."""
    sizes: dict[str, int] = {}
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor):
            name = str(tensor.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + tensor.numel() * tensor.element_size()
    return "+".join(sorted(sizes, key=lambda name: -sizes[name])) or "none"


def _fused(model: nn.Module) -> bool | None:
    """Returns whether every attention with timm's switch uses the fused kernel; None where there is no such switch."""
    switches = [bool(m.fused_attn) for m in model.modules() if hasattr(m, "fused_attn")]
    return all(switches) if switches else None


# --- counts -----------------------------------------------------------------------------------------------------------


def count_macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Returns the multiply-accumulates of one call, attention included: half the FLOPs that PyTorch's counter sees.

    Counts matrix products, convolutions and fused attention. Opaque kernels of packed weights are not seen: count on
    the model before conversion, which computes the same products.

    Args:
        model: on any device, meta included.
        input_shape: (B, C, H, W); B = 1 for the per-image count.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(input_shape, device=device))
    finally:
        model.train(training)
    return int(counter.get_total_flops()) // 2


def count_params(model: nn.Module) -> int:
    """Returns the number of weights, shared ones once; buffers (statistics, projections) are not weights."""
    return sum(math.prod(p.shape) for p in model.parameters())
