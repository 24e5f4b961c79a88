"""Runs one trial: stages, then everything measured from the reloaded artefact. Total: it returns a status, it does not raise."""

from __future__ import annotations

import json
import math
import socket
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from workers import artefact, evaluation, stages
from workers.measuring import counting
from workers.measuring.made_inputs import make_inputs
from workers.measuring.peak_memory import NotTellable
from workers.measuring.quantities import Quantities
from workers.metrics import DEVICE_BOUND, SPEEDS
from workers.node.deadline import Deadline, DeadlineExceeded, guard
from workers.node.lane import Lane
from workers.node.provenance import provenance
from workers.node.storage import open_storage
from workers.techniques.quantisation.shared_affine import NotQuantisable, unquantised
from workers.training.loop import TrainingDiverged
from workers.trial import Measurement, Recipe, StageRun, TrialResult, TrialSpec

Attempt = Callable[[TrialSpec], TrialResult]

_REFUSALS = (stages.Infeasible, NotQuantisable, TrainingDiverged, evaluation.NotFiniteOutput, NotTellable)
"""What says that this recipe cannot be had on this model and device, whoever tries it."""


class StorageNotSeen(Exception):
    """This node does not see the study's storage."""


def run_trial(spec: TrialSpec) -> TrialResult:
    """Runs ``spec`` and returns how it ended.

    Everything is taken from the artefact after reloading it: accuracy on the search split, bytes, speed against the
    interleaved baseline. MACs and params are counted on the unquantised twin, because opaque kernels hide them.
    """
    started, clock = time.time(), time.monotonic()
    attempt = uuid.uuid4().hex[:12]
    deadline = Deadline(spec.timeout_s)
    outcome = _Outcome()
    status, failure = "ok", None
    try:
        with guard(deadline):
            _run(spec, deadline, outcome)
    except Exception as error:  # noqa: BLE001 - the boundary: whatever happens becomes a status
        status = classify(error)
        failure = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    duration = time.monotonic() - clock
    seconds = dict(outcome.seconds)
    seconds["other"] = duration - sum(seconds.values())
    return TrialResult(
        trial_id=spec.trial_id,
        attempt_id=attempt,
        status=status,
        failure=failure,
        metrics=outcome.metrics,
        started_at=started,
        duration_s=duration,
        conditions=outcome.conditions,
        stages=tuple(outcome.stages),
        measurements=tuple(outcome.measurements),
        artefact=outcome.artefact if status == "ok" else None,
        provenance=provenance(spec, attempt),
        seconds=seconds,
    )


def classify(error: BaseException) -> str:
    """Returns the failure class of an exception raised inside a trial."""
    if isinstance(error, DeadlineExceeded):
        return "timeout"
    if isinstance(error, _REFUSALS):
        return "infeasible"
    if isinstance(error, torch.OutOfMemoryError):
        return "cuda_oom"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "host_oom"
    return "error"


class _Outcome:
    """What a trial has found so far; kept when it fails."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.conditions: dict[str, Any] = {}
        self.stages: list[StageRun] = []
        self.measurements: list[Measurement] = []
        self.artefact: str | None = None
        self.seconds: dict[str, float] = {}


def workbench(spec: TrialSpec, deadline: Deadline, seconds: dict[str, float]) -> stages.Workbench:
    """Returns what the trial works with, after proving that this node sees the study's storage.

    Raises:
        StorageNotSeen: the study's token cannot be read here or is another one.
    """
    storage = open_storage(spec.storage)
    if spec.storage_token:
        try:
            seen = json.loads(storage.read(f"{spec.study}/study.json"))["token"]
        except (OSError, ValueError, KeyError):
            seen = ""
        if seen != spec.storage_token:
            raise StorageNotSeen(
                f"{socket.gethostname()} does not see the study's storage {spec.storage!r}: use a path that every node "
                "mounts, or an object store URL"
            )
    device = torch.device(spec.context.device)
    if device.type == "cpu":
        torch.set_num_threads(max(1, spec.cpus))
    lane = Lane(device_key(device), deadline=deadline)
    return stages.Workbench(spec.context, spec.seed, storage, device, lane, deadline, seconds)


def device_key(device: torch.device) -> str:
    """The name of the lane: ``cpu``, or the CUDA device's own identity."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


def _run(spec: TrialSpec, deadline: Deadline, outcome: _Outcome) -> None:
    bench = workbench(spec, deadline, outcome.seconds)
    try:
        _stages_and_numbers(spec, bench, outcome)
    finally:
        outcome.seconds["lane_wait"] = bench.lane.waited_s


def _stages_and_numbers(spec: TrialSpec, bench: stages.Workbench, outcome: _Outcome) -> None:
    plan = stages.compile_recipe(spec.recipe, spec.seed, spec.context)
    for stage in plan:
        outcome.stages.append(bench.ensure(stage))
    last = plan[-1]
    twin = plan[-2] if last.kind == "conversion" else last
    model = bench.load(last.key)
    outcome.conditions |= _conditions(bench, last.key)
    outcome.conditions |= bench.check_parity(last, model).for_row()
    counted = unquantised(model if twin is last else bench.load(twin.key))
    outcome.metrics["size_bytes"] = float(artefact.size_bytes(bench.folder(last.key)))
    outcome.metrics["params"] = float(counting.count_params(counted))
    outcome.metrics["macs"] = float(counting.count_macs(counted, make_inputs(bench.task.info, "cpu", 1)))
    _evaluate(bench, spec, model, last.key, outcome)
    simulated, timed = timed_as(spec, bench.device.type)
    outcome.conditions["simulated"] = simulated
    if DEVICE_BOUND & set(spec.objectives):
        if simulated and timed.key == twin.key:
            model = counted
        elif simulated:
            model, run = _twin(bench, plan, timed)
            outcome.stages += run
        # A simulated quantiser of the uncompressed model runs at that model's own speed, by definition.
        _measure(bench, spec, model, last.key, timed.key == bench.baseline_key, outcome)
    _check_finite(outcome.metrics)
    missing = sorted(set(spec.objectives) - outcome.metrics.keys())
    if missing:
        raise NotTellable(f"no value for {', '.join(missing)} on {bench.device.type}")
    outcome.artefact = stages.prefix(last.key)


def timed_as(spec: TrialSpec, device: str) -> tuple[bool, stages.Stage]:
    """Returns whether a quantiser is simulated on a device of that kind, and the stage whose model is timed.

    That is the trial's last stage; with a simulated quantiser the last of the recipe without it, so that ``precision`` beside
    it still counts. One that takes part in the training stays: another training would make another model, and
    :func:`workers.techniques.quantisation.shared_affine.unquantised` takes it out of this one.
    """
    steps = stages.resolve(spec.recipe.steps)
    marks = [technique.simulated(config, device) for technique, config in steps]
    kept = tuple(
        step
        for step, (technique, _), mark in zip(spec.recipe.steps, steps, marks, strict=True)
        if technique.stage == "surgery" or not mark
    )
    return any(marks), stages.compile_recipe(Recipe(kept), spec.seed, spec.context)[-1]


def _twin(
    bench: stages.Workbench, plan: tuple[stages.Stage, ...], timed: stages.Stage
) -> tuple[nn.Module, list[StageRun]]:
    """Loads the unquantised model of a stage, which is run first where it is none of the trial's own."""
    run = [] if timed.key in {stage.key for stage in plan} else [bench.ensure(timed)]
    return unquantised(bench.load(timed.key)), run


def _evaluate(bench: stages.Workbench, spec: TrialSpec, model: nn.Module, key: str, outcome: _Outcome) -> None:
    with bench.lane.shared(), bench.timed("evaluate"):
        found = evaluation.evaluate(model, bench.task.search, device=bench.device, tick=bench.tick)
    for accuracy in found.accuracies:
        outcome.metrics[accuracy.metric] = accuracy.pct
        outcome.metrics[f"{accuracy.metric}_low"] = accuracy.low_pct
        outcome.metrics[f"{accuracy.metric}_high"] = accuracy.high_pct
    outcome.metrics |= found.more
    outcome.measurements += accuracy_measurements("accuracy_search", bench, key, found)


def accuracy_measurements(
    kind: str, bench: stages.Workbench, key: str, found: evaluation.Evaluation
) -> list[Measurement]:
    """Returns each accuracy as a measurement record, its interval in the conditions."""
    return [
        Measurement(
            kind=kind,
            artefact=key,
            device=bench.device.type,
            batch=evaluation.BATCH_SIZE,
            resolution=bench.task.info.image_size,
            protocol=str(bench.context.measurement.get("protocol", "quick")),
            value=accuracy.pct,
            unit="percent",
            conditions={
                "metric": accuracy.metric,
                "correct": accuracy.correct,
                "images": accuracy.total,
                "wilson_low_pct": accuracy.low_pct,
                "wilson_high_pct": accuracy.high_pct,
                "logits_digest": found.logits_digest,
                **({"levels": accuracy.levels} if accuracy.levels else {"correct_bits": accuracy.correct_bits}),
            },
        )
        for accuracy in found.accuracies
    ]


def _measure(
    bench: stages.Workbench, spec: TrialSpec, model: nn.Module, key: str, is_baseline: bool, outcome: _Outcome
) -> None:
    """Measures speed and memory against the strong baseline, alone on the device."""
    with bench.lane.exclusive(), bench.timed("measure"):
        found = Quantities(bench, spec, model, key, is_baseline).measure()
    outcome.metrics |= found.metrics
    outcome.measurements.extend(found.measurements)
    outcome.conditions |= found.conditions


def _check_finite(metrics: dict[str, float]) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    for name in bad:
        del metrics[name]
    if bad:
        raise evaluation.NotFiniteOutput(f"not a finite number: {', '.join(bad)}")


def _conditions(bench: stages.Workbench, key: str) -> dict[str, Any]:
    info = bench.task.info
    return {
        "device": bench.device.type,
        "search_images": len(bench.task.search),
        "resolution": info.image_size,
        "train_threads": torch.get_num_threads(),
        "stage": key,
        "protocol": bench.context.measurement.get("protocol", "quick"),
    }


def run_report(spec: TrialSpec) -> tuple[Measurement, ...]:
    """Evaluates the finished trial's artefact on the report split (the test set), which the search never sees.

    Raises:
        ArtefactError: the trial has no artefact in the storage.
    """
    bench = workbench(replace(spec, timeout_s=None), Deadline(None), {})
    last = stages.compile_recipe(spec.recipe, spec.seed, spec.context)[-1]
    with bench.lane.shared():
        found = evaluation.evaluate(bench.load(last.key), bench.task.report, device=bench.device, tick=bench.tick)
    return tuple(accuracy_measurements("accuracy_report", bench, last.key, found))


def run_remeasure(spec: TrialSpec) -> tuple[Measurement, ...]:
    """Measures the speeds of a finished trial's artefact once more, alone on the device.

    Raises:
        ArtefactError: the trial has no artefact in the storage.
    """
    bench = workbench(replace(spec, timeout_s=None), Deadline(None), {})
    plan = stages.compile_recipe(spec.recipe, spec.seed, spec.context)
    simulated, timed = timed_as(spec, bench.device.type)
    if timed.key == bench.baseline_key:
        return ()
    model = _twin(bench, plan, timed)[0] if simulated else bench.load(timed.key)
    with bench.lane.exclusive():
        quantities = Quantities(bench, spec, model, plan[-1].key, is_baseline=False)
        return tuple(quantities.speed(kind) for kind, objective in SPEEDS.items() if objective in spec.objectives)
