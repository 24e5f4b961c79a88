"""How well peak memory on a CPU is told: the growth of fresh processes, beside what PyTorch's allocator says of the same call.

    python -m benchmarks.bench_peak_memory [--threads 2] [--processes 3] [--batches 1 8 32] [--models vit_tiny_patch16_224 ...]

Run from the repository root. ``allocator`` is the artefact's tensors, the images, and the highest sum of what the call takes
and gives back; it does not see a kernel's own packing of weights (``packed``, counted as large as the int8 weights) or
scratch. ``off`` is how far the growth lies above both together. One JSON object a line, the machine first, last the
largest spread and the extremes of ``off`` over all cases.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from workers import artefact, models
from workers.measuring.peak_memory import peak_in_child
from workers.node.conditions import device_name, threads
from workers.tasks import TaskInfo
from workers.techniques import registry
from workers.techniques.quantisation.shared_affine import KernelLinear
from workers.techniques.record import Surroundings, make_config

INFO = TaskInfo(num_classes=1000, in_chans=3, image_size=224, class_names=())
MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
WAYS = {"fp32": None, "bf16": ("precision", {"dtype": "bf16"}), "int8": ("dynamic_int8", {})}
CPU = torch.device("cpu")


def save(name: str, way: str, folder: Path) -> None:
    """Writes the artefact of a timm model with random weights, run in one of WAYS."""
    torch.manual_seed(0)
    section = {"family": "timm", "name": name, "create": {}}
    model, steps = models.build(section, INFO), []
    if (step := WAYS[way]) is not None:
        technique = registry()[step[0]]
        nothing = Surroundings(CPU, 0, torch.Generator(), lambda: iter(()), lambda: model)
        applied = technique.apply(model, make_config(technique.Config, step[1]), nothing)
        model = applied.model
        steps = [{"technique": step[0], "version": technique.version, "resolved": applied.resolved}]
    artefact.save(model, folder, model_description=models.describe(section, INFO), steps=steps)


def state_bytes(model: nn.Module) -> tuple[int, int]:
    """Returns the bytes of a model's tensors, and those of weights that a kernel packs for itself once more."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    kernels = [part for part in model.modules() if isinstance(part, KernelLinear)]
    return sum(tensors.values()), sum(b.nbytes for part in kernels for b in part.buffers() if b.dtype == torch.int8)


@torch.inference_mode()
def call_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """Returns the highest sum of bytes that the allocator handed out during one call and had not got back."""
    model(images[:1])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model(images)
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0)


def main() -> None:
    """Prints the machine, one line a case, and the extremes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 32))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--ways", nargs="+", default=tuple(WAYS), choices=tuple(WAYS))
    options = parser.parse_args()
    system = {"platform": platform.platform(), "cpu": device_name(CPU), "torch": str(torch.__version__)}
    print(json.dumps({**system, "threads": options.threads, "processes": options.processes}), flush=True)
    spreads, distances = [], []
    for name, way in itertools.product(options.models, options.ways):
        with tempfile.TemporaryDirectory() as folder, threads(options.threads):
            save(name, way, Path(folder))
            model = artefact.load(folder)
            held, packed = state_bytes(model)
            for batch in options.batches:
                images = torch.randn(batch, INFO.in_chans, INFO.image_size, INFO.image_size)
                allocator = held + images.nbytes + call_bytes(model, images)
                grown = [
                    peak_in_child(Path(folder), batch, INFO, CPU, options.threads) for _ in range(options.processes)
                ]
                off = [growth - allocator - packed for growth in grown]
                spreads.append(max(grown) - min(grown))
                distances += off
                case = {"model": name, "way": way, "batch": batch, "allocator": allocator, "packed": packed}
                print(json.dumps({**case, "grown": grown, "spread": spreads[-1], "off": off}), flush=True)
    print(json.dumps({"largest_spread": max(spreads), "off_from": min(distances), "off_to": max(distances)}))


if __name__ == "__main__":
    main()
