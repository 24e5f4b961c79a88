"""Runs one trial: stages, then everything measured from the reloaded artefact. Total: it returns a status, it does not raise."""

from __future__ import annotations

import math
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from workers import artefact, evaluation
from workers.measuring import counting
from workers.measuring.known_speeds import keep_speed, known_speed, question
from workers.measuring.made_inputs import make_inputs
from workers.measuring.peak_memory import NotTellable
from workers.measuring.quantities import Found, Quantities
from workers.metrics import DEVICE_BOUND, SPEED_OBJECTIVES, SPEEDS
from workers.node.deadline import Deadline, DeadlineExceeded, guard
from workers.node.lane import Lane
from workers.node.provenance import provenance
from workers.node.storage import open_storage
from workers.node.storage_faults import StorageNotSeen, check_seen, storage_fault
from workers.rung import accuracy_metrics, numbers_at_rung
from workers.stages.answers import Answer, keep_answer, known_answer
from workers.stages.cache import discard, ensure, ensure_recipe
from workers.stages.graph import Infeasible, Stage, compile_recipe, prefix, resolve
from workers.stages.runners import RecoveryPaused
from workers.stages.workbench import DamagedStage, Workbench
from workers.techniques.quantisation.shared_affine import NotQuantisable, unquantised
from workers.training.loop import TrainingDiverged
from workers.trial import Measurement, Recipe, StageRun, TrialResult, TrialSpec

Attempt = Callable[[TrialSpec], TrialResult]
T = TypeVar("T")

_REFUSALS = (Infeasible, NotQuantisable, TrainingDiverged, evaluation.NotFiniteOutput, NotTellable)
"""What says that this recipe cannot be had on this model and device, whoever tries it."""


def run_trial(spec: TrialSpec) -> TrialResult:
    """Runs ``spec`` and returns how it ended: at its end, or where its recovery training pauses (``until``).

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
        status = "ok" if outcome.rung is None else "stopped"
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
        rung=outcome.rung if status == "stopped" else None,
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
    return "storage_fault" if isinstance(error, StorageNotSeen) or storage_fault(error) else "error"


class _Outcome:
    """What a trial has found so far; kept when it fails."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets what was found, but not the time it took."""
        self.metrics: dict[str, float] = {}
        self.conditions: dict[str, Any] = {}
        self.stages: list[StageRun] = []
        self.measurements: list[Measurement] = []
        self.artefact: str | None = None
        self.rung: float | None = None


def with_sound_stages(spec: TrialSpec, bench: Workbench, use: Callable[[], T]) -> tuple[T, tuple[str, ...]]:
    """Calls ``use``, and again after each stage that proved damaged and was removed; once a stage.

    Returns:
        what ``use`` returned, and the keys of the stages that were removed.

    Raises:
        DamagedStage: a stage is damaged that was removed before.
        StorageNotSeen: what looks like damage is that the storage is gone from this node.
    """
    removed: list[str] = []
    while True:
        try:
            return use(), tuple(removed)
        except DamagedStage as error:
            if error.key in removed:
                raise
            check_seen(bench.storage, spec.study, spec.storage_token)
            discard(bench, error.key)
            removed.append(error.key)


def workbench(spec: TrialSpec, deadline: Deadline, seconds: dict[str, float]) -> Workbench:
    """Returns what the trial works with, after proving that this node sees the study's storage.

    Raises:
        StorageNotSeen: the study's token is absent here or another one.
    """
    storage = open_storage(spec.storage)
    check_seen(storage, spec.study, spec.storage_token)
    device = torch.device(spec.context.device)
    if device.type == "cpu":
        torch.set_num_threads(max(1, spec.cpus))
    lane = Lane(device_key(device), deadline=deadline)
    return Workbench(spec.context, spec.seed, storage, device, lane, deadline, seconds, until=spec.until)


def device_key(device: torch.device) -> str:
    """The name of the lane: ``cpu``, or the CUDA device's own identity."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


def _run(spec: TrialSpec, deadline: Deadline, outcome: _Outcome) -> None:
    bench = workbench(spec, deadline, outcome.seconds)

    def use() -> None:
        outcome.clear()
        _stages_and_numbers(spec, bench, outcome)

    try:
        _, removed = with_sound_stages(spec, bench, use)
        if removed:
            outcome.conditions["made_again"] = list(removed)
    finally:
        outcome.seconds["lane_wait"] = bench.lane.waited_s


def _stages_and_numbers(spec: TrialSpec, bench: Workbench, outcome: _Outcome) -> None:
    try:
        recipe, plan = ensure_recipe(bench, spec.recipe, outcome.stages.append)
    except RecoveryPaused as paused:
        _at_rung(spec, bench, paused, outcome)
        return
    last = plan[-1]
    answer = known_answer(bench, spec, last.key) if spec.recipe.steps else None
    if answer is not None:
        outcome.metrics |= answer.metrics
        outcome.conditions |= {**answer.conditions, "same_as": answer.trial_id}
        if SPEED_OBJECTIVES & outcome.metrics.keys():
            outcome.conditions.setdefault("speed_of", answer.trial_id)
        outcome.measurements += answer.measurements
    else:
        _numbers(replace(spec, recipe=recipe), bench, plan, outcome)
    if recipe != spec.recipe:
        outcome.conditions["stages_of"] = recipe.to_json()
    outcome.artefact = prefix(last.key)


def _at_rung(spec: TrialSpec, bench: Workbench, paused: RecoveryPaused, outcome: _Outcome) -> None:
    outcome.metrics |= numbers_at_rung(bench, paused)
    outcome.conditions |= _conditions(bench, paused.stage.key)
    if paused.recipe != spec.recipe:
        outcome.conditions["stages_of"] = paused.recipe.to_json()
    _check_finite(outcome.metrics)
    outcome.rung = paused.report.progress


def _numbers(spec: TrialSpec, bench: Workbench, plan: tuple[Stage, ...], outcome: _Outcome) -> None:
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
    if spec.recipe.steps:
        found = Answer(spec.trial_id, outcome.metrics, outcome.conditions, outcome.measurements)
        keep_answer(bench, spec, last.key, found)


def timed_as(spec: TrialSpec, device: str) -> tuple[bool, Stage]:
    """Returns whether a quantiser is simulated on a device of that kind, and the stage whose model is timed.

    That is the trial's last stage; with a simulated quantiser the last of the recipe without it, so that ``precision`` beside
    it still counts. One that takes part in the training stays: another training would make another model, and
    :func:`workers.techniques.quantisation.shared_affine.unquantised` takes it out of this one.
    """
    steps = resolve(spec.recipe.steps)
    marks = [technique.simulated(config, device) for technique, config in steps]
    kept = tuple(
        step
        for step, (technique, _), mark in zip(spec.recipe.steps, steps, marks, strict=True)
        if technique.stage == "surgery" or not mark
    )
    return any(marks), compile_recipe(Recipe(kept), spec.seed, spec.context)[-1]


def _twin(bench: Workbench, plan: tuple[Stage, ...], timed: Stage) -> tuple[nn.Module, list[StageRun]]:
    """Loads the unquantised model of a stage, which is run first where it is none of the trial's own."""
    run = [] if timed.key in {stage.key for stage in plan} else [ensure(bench, timed)]
    return unquantised(bench.load(timed.key)), run


def _evaluate(bench: Workbench, spec: TrialSpec, model: nn.Module, key: str, outcome: _Outcome) -> None:
    with bench.lane.shared(), bench.timed("evaluate"):
        found = evaluation.evaluate(model, bench.task.search, device=bench.device, tick=bench.tick)
    outcome.metrics |= accuracy_metrics(found)
    outcome.measurements += accuracy_measurements("accuracy_search", bench, key, found)


def accuracy_measurements(kind: str, bench: Workbench, key: str, found: evaluation.Evaluation) -> list[Measurement]:
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
    bench: Workbench, spec: TrialSpec, model: nn.Module, key: str, is_baseline: bool, outcome: _Outcome
) -> None:
    """Measures speed and memory against the strong baseline, alone on the device, or takes over what is known of such a model."""
    quantities = Quantities(bench, spec, model, key, is_baseline)
    name = None if is_baseline else _speed_question(bench, spec, quantities)
    known = known_speed(bench, spec, name) if name else None
    if known is None:
        quantities.prepare()
        with bench.lane.exclusive(), bench.timed("measure"):
            known = known_speed(bench, spec, name) if name else None  # measured by another trial while this one waited
            found = Found() if known else quantities.measure()
        outcome.metrics |= found.metrics
        outcome.measurements.extend(found.measurements)
        outcome.conditions |= found.conditions
        if name and known is None:
            keep_speed(bench, spec, name, found.metrics)
    if known is not None:
        outcome.metrics |= known.metrics
        outcome.conditions["speed_of"] = known.trial_id


def _speed_question(bench: Workbench, spec: TrialSpec, quantities: Quantities) -> str | None:
    """Returns under which name the speeds of such a model lie, None where no other trial's can be taken over."""
    with bench.lane.shared(), bench.timed("measure"):
        unit = quantities.unit()
        structure = None if unit is None else quantities.structure()
    return None if unit is None or structure is None else question(bench, spec, structure, unit)


def _check_finite(metrics: dict[str, float]) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    for name in bad:
        del metrics[name]
    if bad:
        raise evaluation.NotFiniteOutput(f"not a finite number: {', '.join(bad)}")


def _conditions(bench: Workbench, key: str) -> dict[str, Any]:
    info, notes = bench.task.info, bench.context.model.get("weights_notes")
    return {
        "device": bench.device.type,
        "search_images": len(bench.task.search),
        "resolution": info.image_size,
        "train_threads": torch.get_num_threads(),
        "stage": key,
        "protocol": bench.context.measurement.get("protocol", "quick"),
        **({"weights": list(notes)} if notes else {}),
    }


def run_report(spec: TrialSpec) -> tuple[Measurement, ...]:
    """Evaluates the finished trial's artefact on the report split (the test set), which the search never sees.

    Raises:
        ArtefactError: the trial's artefact cannot be loaded here.
    """
    bench = workbench(replace(spec, timeout_s=None, until=None), Deadline(None), {})

    def use() -> tuple[Measurement, ...]:
        last = ensure_recipe(bench, spec.recipe)[1][-1]
        with bench.lane.shared():
            model = bench.load(last.key)
            found = evaluation.evaluate(model, bench.task.report, device=bench.device, tick=bench.tick)
        return tuple(accuracy_measurements("accuracy_report", bench, last.key, found))

    return with_sound_stages(spec, bench, use)[0]


def run_remeasure(spec: TrialSpec) -> tuple[Measurement, ...]:
    """Measures the speeds of a finished trial's artefact once more, alone on the device.

    Raises:
        ArtefactError: the trial's artefact cannot be loaded here.
    """
    bench = workbench(replace(spec, timeout_s=None, until=None), Deadline(None), {})
    if timed_as(spec, bench.device.type)[1].key == bench.baseline_key:
        return ()

    def use() -> tuple[Measurement, ...]:
        recipe, plan = ensure_recipe(bench, spec.recipe)
        simulated, timed = timed_as(replace(spec, recipe=recipe), bench.device.type)
        model = _twin(bench, plan, timed)[0] if simulated else bench.load(timed.key)
        quantities = Quantities(bench, spec, model, plan[-1].key, is_baseline=False)
        quantities.prepare()
        with bench.lane.exclusive():
            return tuple(quantities.speed(kind) for kind, objective in SPEEDS.items() if objective in spec.objectives)

    return with_sound_stages(spec, bench, use)[0]
