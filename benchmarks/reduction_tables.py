"""Full-size models with fewer tokens against the best way to run them whole: what bench_tome and bench_pumer share.

The strong baseline is the fastest of fp32, bf16 and fp16, all with fused attention (and torch.compile with --compile), and the
reduced models run in that way too. Throughput is at each model's own best batch size, latency at batch 1, as PuMer and ToMe
measure. All models of a table take turns in one run, the order reversed every other round; ``speed-up`` is the median of the
paired ratios with its 95 % bootstrap interval, and the row ``again`` is the baseline against a copy of itself: what is within
its distance from 1 is noise. ``MACs`` is the speed-up that the work left would allow. Weights are random: the cost of these
techniques does not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from workers import artefact, models
from workers.measuring import strong_baseline, timing
from workers.measuring.counting import count_macs
from workers.measuring.made_inputs import make_inputs
from workers.measuring.peak_memory import peak_in_child
from workers.measuring.protocols import PROTOCOLS
from workers.measuring.ways import COMPILE, as_way
from workers.node.conditions import device_conditions, device_name, threads
from workers.tasks import TaskInfo
from workers.techniques import registry
from workers.techniques.record import Surroundings, make_config

RESAMPLES = 2000
BASELINE, AGAIN = "none", "none, again"

QUICK = {"window_s": 0.0, "latency_pairs": 9, "throughput_pairs": 7, "warmup": 1}
QUICK |= {"batch_start": 2, "batch_step": 2, "batch_max": 4}
"""A few minutes on two cores."""

Recipe = tuple[tuple[str, Mapping[str, Any]], ...]
"""Techniques with their parameters."""


@dataclass(frozen=True)
class Case:
    """One model, what reduces its tokens, and the published speed-ups.

    Attributes:
        model: section of a study; info: what its data would be.
        recipes: label to techniques.
        published: label to speed-up.
        batches: settings of the batch sizes that are not the protocol's.
        left: (model without weights, label) -> the tokens after the last layer, for a column.
    """

    name: str
    model: Mapping[str, Any]
    info: TaskInfo
    recipes: Mapping[str, Recipe]
    published: Mapping[str, float]
    batches: Mapping[str, int]
    left: Callable[[nn.Module, str], object] = field(default=lambda model, label: "")

    def build(self, device: str) -> nn.Module:
        """Builds the model with random weights, or on the meta device."""
        torch.manual_seed(0)
        return models.build(self.model, self.info, device=device).eval()

    def reduced(self, model: nn.Module, label: str) -> nn.Module:
        """Returns a copy of ``model`` with the techniques of ``label``."""
        return self.applied(model, label)[0]

    def applied(self, model: nn.Module, label: str) -> tuple[nn.Module, list[dict[str, Any]]]:
        """Returns a copy with the techniques of ``label``, and the steps as an artefact names them."""
        model = copy.deepcopy(model)
        device = next(model.parameters()).device
        nothing = Surroundings(device, 0, torch.Generator(), lambda: iter(()), lambda: model)
        steps = []
        for name, values in self.recipes.get(label, ()):
            technique = registry()[name]
            found = technique.apply(model, make_config(technique.Config, values), nothing)
            model = found.model
            steps.append({"technique": name, "version": technique.version, "resolved": found.resolved})
        return model.eval(), steps

    @property
    def labels(self) -> list[str]:
        """Returns the models of a table: the whole one twice, then the reduced ones."""
        return [BASELINE, AGAIN, *self.recipes]


def measure(case: Case, kind: str, settings: Mapping[str, Any], device: torch.device) -> Iterator[str]:
    """Yields the lines of the table of one model and kind of speed."""
    model, inputs = case.build(str(device)), partial(make_inputs, case.info, device)
    say(f"{case.name}, {kind}: the ways to run it whole")
    strong = strong_baseline.find(kind, model, settings, inputs, device_name(device))
    arms: dict[str, timing.Arm] = {}
    for label in case.labels:
        say(f"{case.name}, {kind}: {label}")
        run = as_way(case.reduced(model, label), strong.way)
        with torch.inference_mode():
            if kind == "latency":
                arms[label] = timing.Arm(run, inputs(1))
            else:  # the batch is found without compiling, which would take minutes a size
                plain = as_way(case.reduced(model, label), strong.way.removesuffix(COMPILE))
                whole = label in (BASELINE, AGAIN)
                batch = strong.batch if whole else strong_baseline.grow(plain, settings, inputs).best
                arms[label] = timing.blocked(run, inputs(batch))
    timed = timing.interleaved(
        list(arms.values()),
        window_s=float(settings["window_s"]),
        pairs=int(settings[f"{kind}_pairs"]),
        warmup=int(settings["warmup"]),
        most=timing.LATENCY_PAIRS if kind == "latency" else None,
    )
    batches = [len(arm.inputs) for arm in arms.values()]
    yield f"\n**{case.name}, {kind}**; strong baseline: {strong.way}. {ways(strong)}; {len(timed)} rounds.\n"
    unit = "ms" if kind == "latency" else "a second"
    yield f"| reduction | tokens left | batch | {unit} | speed-up | 95 % | MACs | published |"
    yield "|---|---|---|---|---|---|---|---|"
    yield from rows(case, kind, batches, np.array(batches) / timed)


def rows(case: Case, kind: str, batches: Sequence[int], speeds: np.ndarray) -> Iterator[str]:
    """Yields a line for each model from (rounds, models) examples/s, the baseline in the first column."""
    skeleton, example = case.build("meta"), make_inputs(case.info, "cpu", 1)
    whole = count_macs(skeleton, example)
    for index, label in enumerate(case.labels):
        ratio, low, high = timing.paired_ratio(speeds[:, index], speeds[:, 0], RESAMPLES)
        median = float(np.median(speeds[:, index]))
        shown = f"{1e3 / median:.2f}" if kind == "latency" else f"{median:.4g}"
        work = whole / count_macs(case.reduced(skeleton, label), example)
        published = f"{case.published[label]:.2f}" if label in case.published and kind == "throughput" else ""
        said = ("1", "") if index == 0 else (f"{ratio:.2f}", f"{low:.2f} to {high:.2f}")
        yield table_row(label, case.left(skeleton, label), batches[index], shown, *said, f"{work:.2f}", published)


def peaks(case: Case, batch: int, device: torch.device) -> Iterator[str]:
    """Yields the lines of the table of peak memory of one inference, each model in a fresh process, float32."""
    model = case.build("cpu")
    yield f"\n**{case.name}, peak memory of one inference**, batch {batch}, float32, each in a fresh process.\n"
    yield "| reduction | MB | of the whole |"
    yield "|---|---|---|"
    first = 0
    for label in case.labels:
        say(f"{case.name}, peak memory: {label}")
        reduced, steps = case.applied(model, label)
        with tempfile.TemporaryDirectory() as folder:
            artefact.save(reduced, folder, model_description=models.describe(case.model, case.info), steps=steps)
            peak = peak_in_child(Path(folder), batch, case.info, device, torch.get_num_threads())
        first = first or peak
        yield table_row(label, f"{peak / 1e6:.1f}", f"{peak / first:.3f}")


def table_row(*cells: object) -> str:
    """Returns a line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def ways(strong: strong_baseline.StrongBaseline) -> str:
    """Says what every way of running the model whole reached."""
    unit = "ms" if strong.kind == "latency" else "a second"
    found = (f"{n} {v:.4g} {unit}" if isinstance(v, float) else f"{n}: {v}" for n, v in strong.ways.items())
    return "Whole: " + ", ".join(found)


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


def main(doc: str | None, cases: Sequence[Case], quick: int) -> None:
    """Prints the machine and the tables of ``cases``, of the first ``quick`` with --quick."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help=f"{quick} of {len(cases)} models, small batches, few rounds"
    )
    parser.add_argument("--only", help="models whose name holds this text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="allow torch.compile, for all models alike")
    parser.add_argument("--window-s", type=float, help="seconds that each model is timed for, at least")
    parser.add_argument("--peak-memory", type=int, metavar="BATCH", help="peak memory at this batch instead of speeds")
    options = parser.parse_args()
    settings = {**PROTOCOLS["standard"], "compile": options.compile}
    settings |= {} if options.window_s is None else {"window_s": options.window_s}
    device = torch.device(options.device)
    with threads(options.threads):
        print(json.dumps({**machine(device), "settings": settings}), flush=True)
        for case in cases[: quick if options.quick else None]:
            if options.only and options.only not in case.name:
                continue
            steps = {**case.batches, **(QUICK if options.quick else {})}
            tables = (
                [peaks(case, options.peak_memory, device)]
                if options.peak_memory
                else [measure(case, kind, {**settings, **steps}, device) for kind in ("throughput", "latency")]
            )
            for table in tables:
                for line in table:
                    print(line, flush=True)
