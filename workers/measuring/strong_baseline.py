"""The strong baseline: the fastest way to run the uncompressed model on this device, and how well it is told from itself.

Found once a study and device, by the first trial that needs it there, and stored in
``<study>/baselines/<context>-<device>-<kind>.json``. Every speed of a study is a ratio to it. Its noise is that of A/A
measurements: the same model, loaded twice, measured as a trial is, each time in a fresh process, since what differs between
processes (memory layout, threads on cores) is invisible inside one.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from workers.measuring import timing
from workers.measuring.timing import Arm
from workers.measuring.ways import as_way, way_names
from workers.node.storage_faults import check_child
from workers.trial import Measurement

CHILD_TIMEOUT_S = 3600

CORRECTIONS = 2
"""Times that A/A runs may move the batch of the unit, see :func:`corrected`."""

PROCESS_SIGMA = 0.005
"""Standard deviation of the log ratio that one artefact shows from trial to trial and that A/A runs in fresh, short processes
do not: a worker lives long, and what lay in its memory before moves the layout. Seen: 0.5 % over twelve trials whose A/A runs
had 0.14 % (``tests/orchestrator/sweep/test_remeasure.py``, twelve names)."""


@dataclass(frozen=True)
class StrongBaseline:
    """The best uncompressed way on one device for one kind of speed.

    Attributes:
        kind: ``latency`` (ms, median at batch 1) or ``throughput`` (images/s, median at ``batch``).
        way: see :mod:`workers.measuring.ways`; ``value``: its speed, the unit of every other one.
        batch: images a call; ``largest_batch``: the largest that ran while growing.
        ways: what every way reached in the same run, or why it did not run.
        noise_sigma: standard deviation of the log of an A/A ratio, its mean known to be 0, over ``noise_dof`` runs.
        noise_ratios: the A/A ratios.
    """

    kind: str
    way: str
    value: float
    batch: int
    largest_batch: int
    ways: Mapping[str, float | str]
    device_name: str
    seconds: float
    noise_sigma: float | None = None
    noise_dof: int = 0
    noise_ratios: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads what ``dataclasses.asdict`` and JSON made of a record."""
        return cls(**{**values, "noise_ratios": tuple(values["noise_ratios"])})

    def to_json(self) -> bytes:
        """Returns the record as it is stored."""
        return json.dumps(asdict(self)).encode()

    def half_width(self) -> float:
        """Returns the half width, as a log ratio, of the 95 % interval of one measurement: Student's t over the A/A runs, and
        :data:`PROCESS_SIGMA`."""
        if self.noise_sigma is None or not self.noise_dof:
            return 0.0
        from scipy import stats

        seen = float(stats.t.ppf(0.975, self.noise_dof)) * self.noise_sigma
        return math.hypot(seen, float(stats.norm.ppf(0.975)) * PROCESS_SIGMA)


def file_name(study: str, context: str, device_name: str, kind: str) -> str:
    """Returns where the record of a study, device and kind lies in the storage."""
    device = re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-")
    return f"{study}/baselines/{context}-{device}-{kind}.json"


@torch.inference_mode()
def find(
    kind: str, model: nn.Module, settings: Mapping[str, Any], inputs: Callable[[int], timing.Batch], device_name: str
) -> StrongBaseline:
    """Measures every way to run ``model``, interleaved, and returns the best. The caller holds the lane.

    Args:
        kind: ``latency`` or ``throughput``.
        inputs: makes a batch of the given size on the device.

    Raises:
        ValueError: for another kind.
    """
    if kind not in ("latency", "throughput"):
        raise ValueError(f"strong baseline: must be of latency or throughput, got {kind!r}; say here how it is timed")
    start = time.monotonic()
    arms: dict[str, Arm] = {}
    growths: dict[str, timing.Growth] = {}
    ways: dict[str, float | str] = {}
    for name in way_names(compiled=bool(settings["compile"])):
        try:
            run = as_way(model, name)
            if kind == "latency":
                arms[name] = Arm(run, inputs(1))
                run(arms[name].inputs)
            else:
                # Compiling for every size would take minutes: the size is found without it.
                growths[name] = grow(as_way(model, name.partition("+")[0]), settings, inputs)
                arms[name] = timing.blocked(run, inputs(growths[name].best))
        except Exception as error:  # noqa: BLE001 - whatever a way lacks on this device, the others run
            arms.pop(name, None)
            ways[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
    if not arms:
        raise RuntimeError(f"the uncompressed model runs in no way: {ways}")
    pairs = int(settings["latency_pairs" if kind == "latency" else "throughput_pairs"])
    seconds = timing.interleaved(
        list(arms.values()),
        window_s=float(settings["window_s"]),
        pairs=pairs,
        warmup=int(settings["warmup"]),
        most=timing.LATENCY_PAIRS if kind == "latency" else None,
    )
    for name, column in zip(arms, np.median(seconds, axis=0), strict=True):
        ways[name] = float(column * 1e3 if kind == "latency" else len(arms[name].inputs) / column)
    speeds = {name: value for name, value in ways.items() if isinstance(value, float)}
    way = min(speeds, key=speeds.__getitem__) if kind == "latency" else max(speeds, key=speeds.__getitem__)
    largest = growths[way].largest if way in growths else 1
    batch = len(arms[way].inputs)
    return StrongBaseline(kind, way, speeds[way], batch, largest, ways, device_name, round(time.monotonic() - start, 3))


def grow(model: nn.Module, settings: Mapping[str, Any], inputs: Callable[[int], timing.Batch]) -> timing.Growth:
    """Finds the best batch size of ``model`` as the protocol says; see :func:`workers.measuring.timing.grow_batch`."""
    start, step, most = (int(settings[name]) for name in ("batch_start", "batch_step", "batch_max"))
    return timing.grow_batch(model, inputs, start=start, step=step, most=most)


def noise_of(ratios: Sequence[float]) -> tuple[float, int]:
    """Returns (sigma, degrees of freedom) of the log of A/A ratios, whose mean is 0 by construction."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.sqrt(sum(x * x for x in logs) / len(logs)), len(logs)


def measure_itself(
    records: Sequence[StrongBaseline],
    folder: str | Path,
    settings: Mapping[str, Any],
    task: Mapping[str, Any],
    device: str,
) -> list[Measurement]:
    """Measures the artefact in ``folder`` against itself, once for each of ``records``, in one fresh process.

    Raises:
        RuntimeError: the process failed; the message holds the end of its errors.
        StorageFault: it could not read the artefact.
    """
    question = {
        "records": [asdict(record) for record in records],
        "folder": str(folder),
        "settings": dict(settings),
        "task": dict(task),
        "device": device,
    }
    done = subprocess.run(
        [sys.executable, "-m", "workers.measuring.aa_runs"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
        timeout=CHILD_TIMEOUT_S,
        cwd=Path(__file__).parents[2],
    )
    check_child(done)
    if done.returncode:
        raise RuntimeError(f"the process of an A/A measurement failed: {done.stderr.strip()[-2000:]}")
    return [Measurement.from_dict(answer) for answer in json.loads(done.stdout.splitlines()[-1])]


def corrected(record: StrongBaseline, runs: Sequence[Measurement]) -> StrongBaseline:
    """Returns ``record`` at the batch size that fresh processes found to be faster, or ``record`` itself.

    A/A runs choose their own batch. Where more than half of them took another one and were faster with it, the record's was
    chosen in a disturbed moment, and every speed-up would be too large by as much.
    """
    ours = [run for run in runs if run.kind == f"aa_{record.kind}" and run.ratio is not None]
    faster: dict[int, list[float]] = {}
    for run in ours:
        if run.batch != record.batch and run.ratio is not None and run.ratio > timing.GAIN:
            faster.setdefault(run.batch, []).append(run.ratio)
    if 2 * sum(map(len, faster.values())) <= len(ours):
        return record
    batch = max(faster, key=lambda size: statistics.median(faster[size]))
    return replace(record, batch=batch, value=record.value * statistics.median(faster[batch]))


def settled(
    records: Sequence[StrongBaseline], measure: Callable[[Sequence[StrongBaseline]], list[Measurement]], times: int
) -> tuple[list[StrongBaseline], list[Measurement]]:
    """Returns the records with their noise, corrected where the A/A runs ask for it, and the runs of what they are now.

    Args:
        measure: makes one A/A run of each record, in a fresh process.
        times: A/A runs of each record.
    """
    done: dict[str, tuple[StrongBaseline, list[Measurement]]] = {}
    left = list(records)
    for attempt in range(1 + CORRECTIONS):
        runs = [run for _ in range(times) for run in measure(left)]
        again = []
        for record in left:
            now = corrected(record, runs) if attempt < CORRECTIONS else record
            own = [run for run in runs if run.kind == f"aa_{record.kind}"]
            if now is record:
                done[record.kind] = (with_noise(record, own), own)
            else:
                again.append(now)
        left = again
        if not left:
            break
    return [done[record.kind][0] for record in records], [run for record in records for run in done[record.kind][1]]


def with_noise(record: StrongBaseline, runs: Sequence[Measurement]) -> StrongBaseline:
    """Returns ``record`` with the noise that the A/A ``runs`` of its kind show."""
    ratios = [run.ratio for run in runs if run.kind == f"aa_{record.kind}" and run.ratio is not None]
    sigma, dof = noise_of(ratios)
    return replace(record, noise_sigma=sigma, noise_dof=dof, noise_ratios=tuple(ratios))
