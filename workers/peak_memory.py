"""Peak memory of an artefact at inference, told by a fresh process in which nothing else ever lay.

``python -m workers.peak_memory FOLDER DEVICE BATCH CHANNELS SIZE THREADS`` prints the bytes. On CUDA it is the
allocator's peak, weights included; on a CPU the growth of the peak resident set from before loading, which counts pages
and is too coarse for small models.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from workers.tasks import TaskInfo

MIN_CPU_BYTES = 20_000_000
"""Smallest model file whose resident growth on a CPU is told: below it the libraries' own allocations are as large."""

CHILD_TIMEOUT_S = 600


class NotTellable(Exception):
    """The quantity cannot be told for this model or on this machine; the message says why."""


def peak_memory_bytes(folder: str | Path, batch: int, info: TaskInfo, device: torch.device, threads: int) -> int:
    """Returns the peak memory in bytes of one inference of ``batch`` images, weights included.

    Raises:
        NotTellable: the model is too small for a CPU, the machine is not Linux, or the process failed.
    """
    if device.type == "cpu":
        from workers import artefact

        size = (Path(folder) / artefact.TENSORS).stat().st_size
        if size < MIN_CPU_BYTES:
            raise NotTellable(
                f"peak memory on a CPU is told for model files of {MIN_CPU_BYTES} bytes or more, this one has {size}"
            )
        if not sys.platform.startswith("linux"):
            raise NotTellable("peak memory on a CPU is read from /proc, which this system does not have")
    arguments = (Path(folder).resolve(), device, batch, info.in_chans, info.image_size, threads)
    command = [sys.executable, "-m", "workers.peak_memory", *map(str, arguments)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CHILD_TIMEOUT_S, cwd=root)
    if done.returncode:
        raise NotTellable(f"the process that tells peak memory failed: {done.stderr.strip()[-2000:]}")
    return int(done.stdout.split()[-1])


def resident_bytes(line: str) -> int:
    """Returns a line of /proc/self/status in bytes: ``VmRSS`` (now) or ``VmHWM`` (peak)."""
    text = Path("/proc/self/status").read_text()
    return 1024 * next(int(row.split()[1]) for row in text.splitlines() if row.startswith(line + ":"))


def main(folder: str, device: str, batch: str, channels: str, size: str, threads: str) -> None:
    """Loads the artefact, runs it and prints the peak."""
    import torch

    from workers import artefact

    torch.set_num_threads(int(threads))
    images = torch.randn(int(batch), int(channels), int(size), int(size), device=device)
    with torch.inference_mode():
        torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)  # the libraries' own workspaces come first
        before = 0
        if device == "cpu":
            before = resident_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak, proc(5)
        model = artefact.load(folder, device=device)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            model(images)
        peak = resident_bytes("VmHWM") - before if device == "cpu" else torch.cuda.max_memory_allocated()
    print(peak)


if __name__ == "__main__":
    main(*sys.argv[1:])
