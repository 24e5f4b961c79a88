"""From records to metrics: which quantities a trial measures, against what, and with which interval.

A speed's metric is its ratio to the strong baseline times the one value that the study stores for that baseline and device:
absolute times drift within a process, ratios do not, so all rows of one device share one scale.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from workers import artefact
from workers.measuring import strong_baseline
from workers.measuring.against_baseline import Subject, half_width, measure_speed
from workers.measuring.made_inputs import make_inputs
from workers.measuring.peak_memory import NotTellable, PeakMemory, peak_memory
from workers.measuring.strong_baseline import StrongBaseline
from workers.measuring.structure import structure
from workers.metrics import METRICS, SPEEDS
from workers.node.conditions import device_conditions, device_name, threads
from workers.node.storage import StorageFault
from workers.stages.graph import prefix
from workers.stages.workbench import Workbench
from workers.trial import Measurement, TrialSpec

PEAK = "peak_memory_bytes"


@dataclass
class Found:
    """What was measured for one trial: metrics, records, and conditions for the row."""

    metrics: dict[str, float] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)


@dataclass
class Quantities:
    """Measures one artefact of a study; the caller holds the lane.

    Attributes:
        model: what is timed: the reloaded artefact, or its unquantised twin where no integer kernel runs.
        key: stage key of the artefact.
        is_baseline: ``model`` is the uncompressed model itself.
    """

    bench: Workbench
    spec: TrialSpec
    model: nn.Module
    key: str
    is_baseline: bool

    def measure(self) -> Found:
        """Measures what the trial's objectives ask for.

        Raises:
            NotTellable: peak memory cannot be told for this model or machine.
        """
        found = Found()
        wanted = [kind for kind, objective in SPEEDS.items() if objective in self.spec.objectives]
        found.measurements += self.find_strong(wanted)
        for kind in wanted:
            self._speed(kind, found)
        if PEAK in self.spec.objectives:
            self._peak(found)
        if self.is_baseline and not self.spec.recipe.steps:
            found.conditions["strong_baseline"] = self._record_for_row(found)
        return found

    @property
    def settings(self) -> Mapping[str, Any]:
        """The measurement section of the context."""
        return self.bench.context.measurement

    def prepare(self) -> None:
        """Loads what is measured against, so that nobody waits for that in the lane."""
        if not self.is_baseline:
            _ = self._baseline

    @cached_property
    def _baseline(self) -> nn.Module:
        return self.bench.load(self.bench.baseline_key)

    def _subject(self) -> Subject:
        return Subject(self.model, self._baseline, self.key, self.settings, self.bench.task.info, self.bench.device)

    def unit(self) -> list[object] | None:
        """Returns the strong baselines that this trial's speeds are multiples of, None where the study has not all of them yet."""
        kinds = [kind for kind, objective in SPEEDS.items() if objective in self.spec.objectives]
        if not all(self.bench.storage.exists(self._strong_file(kind)) for kind in kinds):
            return None
        return [[kind, s.way, s.value, s.batch] for kind in kinds for s in (self.strong(kind),)]

    def structure(self) -> str | None:
        """Returns what the timed model's speed depends on; see :func:`workers.measuring.structure.structure`."""
        inputs = partial(make_inputs, self.bench.task.info, self.bench.device)
        with threads(int(self.settings["threads"])):
            return structure(self.model.eval(), inputs)

    # --- speed --------------------------------------------------------------------------------------------------------

    def speed(self, kind: str) -> Measurement:
        """Measures one kind of speed once; finds the strong baseline first where nobody has on this device."""
        return measure_speed(self._subject(), self.strong(kind))

    def _speed(self, kind: str, found: Found) -> None:
        strong, objective = self.strong(kind), SPEEDS[kind]
        if self.is_baseline:  # the unit that the others are measured in; running it in another way is not compression
            found.metrics |= {objective: strong.value, f"{objective}_ratio": 1.0}
            found.conditions["way"] = strong.way
            return
        measured = measure_speed(self._subject(), strong)
        assert measured.ratio is not None
        half = half_width(measured, strong)
        value = measured.ratio * strong.value
        found.measurements.append(measured)
        found.metrics |= {
            objective: value,
            f"{objective}_ratio": measured.ratio,
            f"{objective}_low": value * math.exp(-half),
            f"{objective}_high": value * math.exp(half),
        }
        if kind == "latency":
            found.metrics["latency_ms_p95"] = (
                float(measured.conditions["call_ms_p95"]) / measured.value * value  # on the study's scale, like p50
            )

    def strong(self, kind: str) -> StrongBaseline:
        """Returns the study's strong baseline for this device."""
        self.find_strong([kind])
        return StrongBaseline.from_dict(self._record(self._strong_file(kind)))

    def _record(self, name: str) -> dict[str, Any]:
        """Reads a record of the uncompressed model.

        A damaged one is not found again by itself: it is the unit of the speeds that the study has measured already.
        """
        try:
            return dict(json.loads(self.bench.storage.read(name)))
        except (ValueError, TypeError) as error:
            raise StorageFault(
                f"{self.bench.storage.url}/{name} is damaged: {error}; put back what it held (the baseline's row has it), or "
                "remove it: the uncompressed model is then measured again, and later speeds are multiples of that"
            ) from error

    def _strong_file(self, kind: str) -> str:
        device = device_name(self.bench.device)
        return strong_baseline.file_name(self.spec.study, self.bench.context.digest, device, kind)

    def find_strong(self, kinds: Sequence[str]) -> list[Measurement]:
        """Finds the strong baselines that the study has not yet on this device; returns the A/A records of that."""
        bench = self.bench
        missing = [kind for kind in kinds if not bench.storage.exists(self._strong_file(kind))]
        if not missing:
            return []
        with bench.deadline.paused():  # done once a device, for all trials
            records, runs = self._find(missing)
        for record in records:
            bench.storage.put_if_absent(self._strong_file(record.kind), record.to_json())
        return runs

    def _find(self, kinds: Sequence[str]) -> tuple[list[StrongBaseline], list[Measurement]]:
        bench, info = self.bench, self.bench.task.info
        model, inputs = bench.load(bench.baseline_key), partial(make_inputs, info, bench.device)
        with threads(int(self.settings["threads"])):
            records = [
                strong_baseline.find(kind, model, self.settings, inputs, device_name(bench.device)) for kind in kinds
            ]
        with _local_folder(bench, bench.baseline_key) as folder:
            ask = partial(strong_baseline.measure_itself, folder=folder, settings=self.settings, task=asdict(info))
            return strong_baseline.settled(
                records, partial(ask, device=str(bench.device)), int(self.settings["noise_runs"])
            )

    # --- memory -------------------------------------------------------------------------------------------------------

    def _peak(self, found: Found) -> None:
        """Compares peak memory at the largest batch that both models ran."""
        record = self._strong_peak()
        own = next((int(m.conditions["largest_batch"]) for m in found.measurements if m.kind == "throughput"), None)
        batch = record["batch"] if own is None else min(own, record["batch"])
        if self.is_baseline:
            peak, ratio = PeakMemory(**record["peak"]), 1.0
        else:
            peak = self._peak_of(self.key, batch)
            beside = record["peak"]["bytes"]
            if batch != record["batch"]:
                beside = self._peak_of(self.bench.baseline_key, batch).bytes
            ratio = peak.bytes / beside
        value = ratio * record["peak"]["bytes"]
        relative = peak.resolution_bytes / peak.bytes
        found.metrics |= {PEAK: value, f"{PEAK}_ratio": ratio}
        if relative and not self.is_baseline:
            found.metrics |= {f"{PEAK}_low": value * (1 - relative), f"{PEAK}_high": value * (1 + relative)}
        found.measurements.append(
            Measurement(
                kind="peak_memory",
                artefact=self.key,
                device=self.bench.device.type,
                batch=batch,
                resolution=self.bench.task.info.image_size,
                protocol=str(self.settings["protocol"]),
                value=float(peak.bytes),
                unit="bytes",
                ratio=ratio,
                conditions=device_conditions(self.bench.device)
                | {"method": peak.method, "resolution_bytes": peak.resolution_bytes},
            )
        )

    def _strong_peak(self) -> dict[str, Any]:
        """Returns ``{"batch", "peak"}`` of the uncompressed model, stored once a study and device."""
        device = device_name(self.bench.device)
        name = strong_baseline.file_name(self.spec.study, self.bench.context.digest, device, "peak_memory")
        storage = self.bench.storage
        if not storage.exists(name):
            batch = self.strong("throughput").largest_batch
            with self.bench.deadline.paused():
                peak = self._peak_of(self.bench.baseline_key, batch)
            storage.put_if_absent(name, json.dumps({"batch": batch, "peak": asdict(peak)}).encode())
        return self._record(name)

    def _peak_of(self, key: str, batch: int) -> PeakMemory:
        folder, info = self.bench.folder(key), self.bench.task.info
        return peak_memory(folder, batch, info, self.bench.device, int(self.settings["threads"]))

    # --- the baseline's row -------------------------------------------------------------------------------------------

    def _record_for_row(self, found: Found) -> dict[str, Any]:
        shown: dict[str, Any] = {"device_name": device_name(self.bench.device), "noise": {}}
        for kind, objective in SPEEDS.items():
            if objective in found.metrics:
                strong = self.strong(kind)
                shown[kind] = {
                    "way": strong.way,
                    "value": strong.value,
                    "unit": METRICS[objective].unit,
                    "batch": strong.batch,
                    "ways": dict(strong.ways),
                }
                shown["noise"][kind] = {
                    "sigma": strong.noise_sigma,
                    "dof": strong.noise_dof,
                    "ratios": list(strong.noise_ratios),
                }
        if PEAK in found.metrics:
            record = self._strong_peak()
            shown["peak_memory"] = {"batch": record["batch"], "value": record["peak"]["bytes"]}
        return shown


@contextmanager
def _local_folder(bench: Workbench, key: str) -> Iterator[Path]:
    """Gives a stage's artefact as a folder that another process can open; from an object store it is a copy."""
    path = bench.storage.local(prefix(key))
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="vitpareto-artefact-") as folder:
        for name, data in artefact.files(bench.folder(key)).items():
            (Path(folder) / name).write_bytes(data)
        yield Path(folder)


__all__ = ["Found", "NotTellable", "Quantities"]
