"""What a measured number depends on besides the model: device, driver, clocks, dtypes, kernels."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_VECTOR_FLAGS = ("sse", "avx", "amx", "fma", "f16c", "asimd", "sve", "bf16", "i8mm", "fphp")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the block with ``count`` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_conditions(device: torch.device) -> dict[str, Any]:
    """Returns the device's name, the versions of what drives it, and its clock as of now."""
    found: dict[str, Any] = {"device_name": device_name(device), "torch": str(torch.__version__)}
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "driver": driver()}
    found["clock_mhz"] = clock_mhz(device)
    return found


def device_name(device: torch.device) -> str:
    """Returns the product name of the GPU or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


@cache
def _cpu_name() -> str:
    return first_cpu().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Returns the vector instructions that the CPU states, by which libraries choose kernels; [] where unknown."""
    lines = first_cpu()
    stated = (lines.get("flags") or lines.get("Features") or "").split()
    return sorted(flag for flag in stated if flag.startswith(_VECTOR_FLAGS))


@cache
def first_cpu() -> dict[str, str]:
    """Returns the lines of the first processor in /proc/cpuinfo; {} where there is none."""
    return next(_cpus(), {})


def _cpus() -> Iterator[dict[str, str]]:
    try:
        processors = Path("/proc/cpuinfo").read_text().strip().split("\n\n")
    except OSError:
        return
    for lines in processors:
        yield {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines.splitlines())}


@cache
def driver() -> str | None:
    """Returns the version of the NVIDIA driver, None where there is none."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return " ".join(first.split(":", 1)[-1].split())


def clock_mhz(device: torch.device) -> float | None:
    """Returns the clock as of now: a GPU's multiprocessors by nvidia-smi, the mean of a CPU's cores; None if unknown.

    A virtual machine may show a constant that is not its host's clock.
    """
    if device.type == "cpu":
        cores = [float(lines["cpu MHz"]) for lines in _cpus() if "cpu MHz" in lines]
        return sum(cores) / len(cores) if cores else None
    if shutil.which("nvidia-smi") is None:
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    text = done.stdout.strip()
    return float(text) if done.returncode == 0 and text.replace(".", "").isdigit() else None


def dtypes(model: nn.Module) -> str:
    """Returns the dtypes of the state, most bytes first: ``float32``, ``int8+float32``."""
    sizes: dict[str, int] = {}
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor):
            name = str(tensor.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + tensor.numel() * tensor.element_size()
    return "+".join(sorted(sizes, key=lambda name: -sizes[name])) or "none"


def fused(model: nn.Module) -> bool | None:
    """Returns whether every attention with timm's switch uses the fused kernel; None where there is no such switch."""
    switches = [bool(m.fused_attn) for m in model.modules() if hasattr(m, "fused_attn")]
    return all(switches) if switches else None
