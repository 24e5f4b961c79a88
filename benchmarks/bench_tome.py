"""Token merging on full-size models against the best way to run them unmerged, with the published ratios beside.

    python -m benchmarks.bench_tome [--quick] [--device cuda] [--threads 2] [--compile] [--window-s 10]

Run from the repository root; needs torch, timm and the workers package only. ViT-B/16 at 224 pixels and ViT-L/16 at 384, with
random weights (ToMe's cost does not depend on them). The strong baseline is the fastest of fp32, bf16 and fp16, all with fused
attention (and torch.compile with --compile), and the merged models run in that way too. Throughput is at each model's own
best batch size, latency at batch 1. All models of a table take turns in one run, the order reversed every other round;
``speed-up`` is the median of the paired ratios with its 95 % bootstrap interval, and the row ``again`` is the baseline against
a copy of itself: what is within its distance from 1 is noise. ``MACs`` is the speed-up that the work left would allow.
Prints the machine as one JSON line, then a Markdown table for each model and kind of speed. --quick: ViT-B/16 alone, small
batches, few rounds.

Source of the published ratios: ToMe (arXiv 2210.09461) on a V100 in fp32, from images/s in the tables of its repository:
ViT-B/16 309 to 511 (r=13) and 603 (r=16, trained with MAE), ViT-L/16 at 384 pixels 28 to 56 (r=23). No figure is known to us
for the other rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from workers import models, strong_baseline, timing
from workers.conditions import device_conditions, device_name, threads
from workers.counting import count_macs
from workers.measurement import make_inputs
from workers.protocols import PROTOCOLS
from workers.tasks import TaskInfo
from workers.techniques.record import Surroundings
from workers.techniques.tome import TECHNIQUE, Config, reductions, token_counts
from workers.ways import COMPILE, as_way

RESAMPLES = 2000
BASELINE, AGAIN = "none", "none, again"

QUICK = {"window_s": 0.0, "latency_pairs": 9, "throughput_pairs": 7, "warmup": 1}
QUICK |= {"batch_start": 2, "batch_step": 2, "batch_max": 4}
"""A few minutes on two cores."""

STEP = 32
"""Of the batch sizes: in the protocol's steps of 8 a GPU gains less than 1 % twice long before it is full."""


@dataclass(frozen=True)
class Case:
    """One model, the r to try, and the published speed-ups by r."""

    name: str
    size: int
    r: tuple[int, ...]
    published: Mapping[int, float]


CASES = (
    Case("vit_base_patch16_224", 224, (8, 13, 16), {13: 511 / 309, 16: 603 / 309}),
    Case("vit_large_patch16_384", 384, (8, 13, 16, 23), {23: 56 / 28}),
)


def info(case: Case) -> TaskInfo:
    """Returns what ImageNet would be at the size of the case."""
    return TaskInfo(num_classes=1000, in_chans=3, image_size=case.size, class_names=())


def build(case: Case, device: str) -> nn.Module:
    """Builds the model with random weights, or on the meta device."""
    torch.manual_seed(0)
    return models.build({"family": "timm", "name": case.name, "create": {}}, info(case), device=device).eval()


def merged(model: nn.Module, r: int) -> nn.Module:
    """Returns a copy of ``model`` that merges r tokens a block; the model itself for 0."""
    model = copy.deepcopy(model)
    nothing = Surroundings(torch.device("cpu"), 0, torch.Generator(), lambda: iter(()), lambda: model)
    return TECHNIQUE.apply(model, Config(r=r), nothing).model if r else model


def tokens_left(model: Any, r: int) -> int:
    """Returns the tokens after the last block."""
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    return token_counts(tokens, model.num_prefix_tokens, reductions(r, 0, len(model.blocks)))[-1]


def measure(case: Case, kind: str, settings: Mapping[str, Any], device: torch.device) -> Iterator[str]:
    """Yields the lines of the table of one model and kind of speed."""
    model, images = build(case, str(device)), partial(make_inputs, info(case), device)
    say(f"{case.name}, {kind}: the ways to run it unmerged")
    strong = strong_baseline.find(kind, model, settings, images, device_name(device))
    arms: dict[str, timing.Arm] = {}
    for name, r in {BASELINE: 0, AGAIN: 0, **{f"r={r}": r for r in case.r}}.items():
        say(f"{case.name}, {kind}: {name}")
        with torch.inference_mode():
            if kind == "latency":
                arms[name] = timing.Arm(as_way(merged(model, r), strong.way), images(1))
            else:
                batch = strong.batch if r == 0 else best_batch(merged(model, r), strong.way, settings, images)
                arms[name] = timing.blocked(as_way(merged(model, r), strong.way), images(batch))
    pairs = int(settings[f"{kind}_pairs"])
    most = timing.LATENCY_PAIRS if kind == "latency" else None
    timed = timing.interleaved(
        list(arms.values()),
        window_s=float(settings["window_s"]),
        pairs=pairs,
        warmup=int(settings["warmup"]),
        most=most,
    )
    speeds = np.array([len(arm.inputs) for arm in arms.values()]) / timed
    yield f"\n**{case.name}, {case.size} px, {kind}**; strong baseline: {strong.way}. {ways(strong)}; {len(timed)} rounds.\n"
    unit = "ms" if kind == "latency" else "images/s"
    yield f"| merging | tokens left | batch | {unit} | speed-up | 95 % | MACs | published |"
    yield "|---|---|---|---|---|---|---|---|"
    yield from rows(case, kind, [len(arm.inputs) for arm in arms.values()], speeds)


def best_batch(model: nn.Module, way: str, settings: Mapping[str, Any], images: Callable[[int], Tensor]) -> int:
    """Returns the batch size with the highest throughput, found without compiling, which would take minutes a size."""
    return strong_baseline.grow(as_way(model, way.removesuffix(COMPILE)), settings, images).best


def rows(case: Case, kind: str, batches: list[int], speeds: np.ndarray) -> Iterator[str]:
    """Yields a line for each model from (rounds, models) images/s, the baseline in the first column."""
    skeleton = build(case, "meta")
    shape = (1, 3, case.size, case.size)
    whole = count_macs(skeleton, shape)
    for index, r in enumerate((0, 0, *case.r)):
        name = (BASELINE, AGAIN)[index] if index < 2 else f"r={r}"
        ratio, low, high = timing.paired_ratio(speeds[:, index], speeds[:, 0], RESAMPLES)
        median = float(np.median(speeds[:, index]))
        shown = f"{1e3 / median:.2f}" if kind == "latency" else f"{median:.4g}"
        work = whole / count_macs(merged(skeleton, r), shape)
        published = f"{case.published[r]:.2f}" if r in case.published and kind == "throughput" else ""
        said = ("1", "") if index == 0 else (f"{ratio:.2f}", f"{low:.2f} to {high:.2f}")
        cells = (name, tokens_left(skeleton, r), batches[index], shown, *said, f"{work:.2f}", published)
        yield f"| {' | '.join(map(str, cells))} |"


def ways(strong: strong_baseline.StrongBaseline) -> str:
    """Says what every way of running the model unmerged reached."""
    unit = "ms" if strong.kind == "latency" else "images/s"
    found = (f"{n} {v:.4g} {unit}" if isinstance(v, float) else f"{n}: {v}" for n, v in strong.ways.items())
    return "Unmerged: " + ", ".join(found)


def machine(device: torch.device) -> dict[str, object]:
    """Returns what the numbers depend on besides the code."""
    return device_conditions(device) | {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "timm": timm.__version__,
    }


def say(line: str) -> None:
    """Tells progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Prints the machine and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="allow torch.compile, for all models alike")
    parser.add_argument("--window-s", type=float, help="seconds that each model is timed for, at least")
    options = parser.parse_args()
    settings = {**PROTOCOLS["standard"], "batch_step": STEP, "compile": options.compile}
    settings |= QUICK if options.quick else {}
    settings |= {} if options.window_s is None else {"window_s": options.window_s}
    device = torch.device(options.device)
    with threads(options.threads):
        print(json.dumps({**machine(device), "settings": settings}), flush=True)
        for case in CASES[:1] if options.quick else CASES:
            for kind in ("throughput", "latency"):
                for line in measure(case, kind, settings, device):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
