"""Peak memory of an artefact at one inference, told by a fresh process in which nothing else ever lay.

Counted: the weights as loaded, a kernel's own packing of them, the images, activations, scratch. Not counted: the
libraries, the file's bytes (loading may peak higher than inference does), memory that an allocator keeps in reserve.

On CUDA it is the allocator's peak, which is exact and includes cuBLAS's workspace. On a CPU it is the growth of the peak
of the anonymous resident pages, in a process whose libraries give freed memory back: by default glibc and MKL keep it,
and the growth of one model then differed by 46 MB from run to run.

CPU resolution, seen on Linux 6.18 with torch 2.15, 2 cores, 2 threads, ViT-B/16 and ViT-tiny at 224 pixels, batches 1, 8 and
32, two or three fresh processes a case (``python -m benchmarks.bench_peak_memory``): processes differed by 0.35 MB at most.
Above weights, images and what PyTorch's allocator handed out lay, in float32 0.1 to 0.8 MB and 3.2 MB at batch 1 (there a
convolution reorders its weights, 2.4 MB), in bfloat16 0.2 to 0.6 MB; in int8, the kernel's packing taken to be as large as
the weights, 2.1 to 2.5 MB (ViT-tiny) and 7.5 to 7.7 MB (ViT-B, of 191 and 434): more that a kernel keeps, at every batch.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from workers import artefact
from workers.measuring.made_inputs import make_inputs
from workers.measuring.protocols import CPU_RESOLUTION_BYTES, MIN_CPU_BYTES
from workers.node.storage import open_storage
from workers.node.storage_faults import check_child, fault_as_exit_status
from workers.tasks import TaskInfo

CHILD_TIMEOUT_S = 900

_GIVE_BACK = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # fixed: otherwise it grows with each block freed, and blocks below it stay
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MKL_DISABLE_FAST_MM": "1",
}
"""Environment that makes glibc (mallopt(3)) and MKL return what is freed."""

_PR_SET_THP_DISABLE = 41  # prctl(2): a huge page would make a page touched into 2 MiB


class NotTellable(Exception):
    """The quantity cannot be told for this model or on this machine; the message says why."""


@dataclass(frozen=True)
class PeakMemory:
    """A peak, how far off it may be either way (bytes, 0 where it is exact), and how it was taken."""

    bytes: int
    resolution_bytes: int
    method: str


def peak_memory(folder: str | Path, batch: int, info: TaskInfo, device: torch.device, threads: int) -> PeakMemory:
    """Returns the peak memory of one inference of ``batch`` images by an artefact.

    Args:
        folder: the artefact's folder: a path, or the URL of an object store, which is copied to this machine for the while.
        info: gives the shapes of the inputs.
        threads: of the process on a CPU.

    Raises:
        NotTellable: the peak on a CPU is below ``MIN_CPU_BYTES``, the system is not Linux, or the process failed.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what this process keeps in reserve the other one cannot have
        with _on_disk(folder) as path:
            return PeakMemory(peak_in_child(path, batch, info, device, threads), 0, "allocator peak in a fresh process")
    if not sys.platform.startswith("linux"):
        raise NotTellable("peak memory on a CPU is read from /proc, which this system does not have")
    with _on_disk(folder) as path:
        peak = peak_in_child(path, batch, info, device, threads)
    if peak < MIN_CPU_BYTES:
        raise NotTellable(
            f"peak memory on a CPU is told from {MIN_CPU_BYTES} bytes on, with a resolution of {CPU_RESOLUTION_BYTES}; "
            f"this artefact's is about {peak} at batch {batch}: take a larger model, or leave peak_memory_bytes out"
        )
    return PeakMemory(peak, CPU_RESOLUTION_BYTES, "resident growth in a fresh process")


@contextmanager
def _on_disk(folder: str | Path) -> Iterator[Path]:

    storage = open_storage(folder)
    path = storage.local("")
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="vitpareto-artefact-") as copy:
        for name, data in artefact.files(folder).items():
            (Path(copy) / name).write_bytes(data)
        yield Path(copy)


def peak_in_child(folder: Path, batch: int, info: TaskInfo, device: torch.device, threads: int) -> int:
    """Returns the peak in bytes as a fresh process tells it, however small; see :func:`peak_memory`.

    Raises:
        NotTellable: the process failed, or was killed.
        StorageFault: it could not read the artefact.
    """
    arguments = (folder.resolve(), device, batch, json.dumps(asdict(info)), threads)
    command = [sys.executable, "-m", "workers.measuring.peak_memory", *map(str, arguments)]
    environ = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | _GIVE_BACK  # another malloc has other rules
    root = Path(__file__).parents[2]
    try:
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, check=False, timeout=CHILD_TIMEOUT_S, cwd=root
        )
    except subprocess.TimeoutExpired as error:
        raise NotTellable(f"peak memory: one inference of {batch} images took over {CHILD_TIMEOUT_S} s") from error
    check_child(done)
    if done.returncode:
        killed = f"signal {-done.returncode}, which the system sends when memory runs out"
        how = killed if done.returncode < 0 else f"exit status {done.returncode}"
        said = done.stderr.strip()[-2000:] or "nothing on stderr"
        raise NotTellable(f"the process that tells peak memory at batch {batch} ended with {how}: {said}")
    return int(done.stdout.split()[-1])


# --- in the child -----------------------------------------------------------------------------------------------------


def resident() -> dict[str, int]:
    """Returns memory lines of /proc/self/status in bytes: ``VmHWM`` (peak), ``RssAnon``, ``RssFile``, ``VmSwap``, ..."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("Vm", "Rss")))
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}


def _peak_on_cpu(folder: str, info: TaskInfo, batch: int) -> int:
    """Rehearses once, which leaves what libraries keep (imports, compiled kernels, threads), then takes the growth."""

    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)

    def load_and_run() -> None:
        model = artefact.load(folder)
        inputs = make_inputs(info, "cpu", batch)
        model(inputs[:1])  # kernels pack their weights; what packing takes is not inference
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, proc(5)
        model(inputs)

    load_and_run()
    gc.collect()
    libc.malloc_trim(0)
    before = resident()["RssAnon"]
    load_and_run()
    after = resident()
    if after["VmSwap"]:
        raise SystemExit("the machine is short of memory and swaps")
    # Pages of files (the libraries' code) come as it runs and never go, so at the end all are there to subtract.
    return after["VmHWM"] - after["RssFile"] - after["RssShmem"] - before


def _peak_on_cuda(folder: str, info: TaskInfo, batch: int, device: str) -> int:

    model: nn.Module = artefact.load(folder, device=device)
    inputs = make_inputs(info, device, batch)
    model(inputs)
    torch.cuda.reset_peak_memory_stats()
    model(inputs)
    return torch.cuda.max_memory_allocated()


def main(folder: str, device: str, batch: str, facts: str, threads: str) -> None:
    """Prints the peak in bytes."""

    torch.set_num_threads(int(threads))
    info = TaskInfo.from_dict(json.loads(facts))
    with torch.inference_mode(), fault_as_exit_status():
        print(
            _peak_on_cpu(folder, info, int(batch))
            if device == "cpu"
            else _peak_on_cuda(folder, info, int(batch), device)
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
