"""What each kind of stage does, and the teacher's logits that trainings share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from workers import artefact, evaluation, models
from workers.node.lease import acquire
from workers.node.storage import Storage, StorageFault
from workers.stages.graph import Infeasible, Stage, prefix, resolve
from workers.stages.workbench import Workbench
from workers.techniques.record import Applied, Technique
from workers.training import loop
from workers.training.loop import TrainingReport
from workers.training.settings import TrainingSettings
from workers.trial import Recipe, StageRun


class RecoveryPaused(Exception):
    """A recovery training stands at a rung. No failure: it is raised past what would follow the end of the training.

    Attributes:
        stage: whose training it is.
        model: as the training would hand it over if it ended there, finalised; description: of the model before compression;
            records: of its steps.
        report: of the training.
        run: what this attempt did of the stage, once its lease is given back; recipe, plan: what the stages belong to, and all of
            them, as of :func:`workers.stages.cache.ensure_recipe`.
    """

    run: StageRun
    recipe: Recipe
    plan: tuple[Stage, ...]

    def __init__(
        self,
        stage: Stage,
        model: nn.Module,
        description: Mapping[str, Any],
        records: list[dict[str, Any]],
        report: TrainingReport,
    ) -> None:
        self.stage, self.model, self.description, self.records = stage, model, description, records
        self.report = report
        super().__init__(f"paused after {report.progress:.1%} of the recovery training")


def _run_baseline(bench: Workbench, stage: Stage) -> TrainingReport | None:
    context = bench.context
    info = bench.task.info
    settings = context.training["baseline"]
    torch.manual_seed(settings.get("seed", 0))
    counted = isinstance(context.data.get("answers", 0), int)  # not a file of answers
    model = models.build(context.model, info, counted_answers=counted).to(bench.device)
    checkpoints, report = bench.checkpoints(stage), None
    if context.model.get("train"):
        with bench.timed("train"), bench.lane.shared():
            report = loop.train(
                model,
                bench.task.train,
                settings,
                seed=settings.get("seed", 0),
                device=bench.device,
                validation=bench.task.search,
                checkpoints=checkpoints,
                tick=bench.tick,
            )
    bench.save(stage, model, models.describe(context.model, info), [])
    checkpoints.clear()
    return report


def _run_surgery(bench: Workbench, stage: Stage) -> None:
    model, manifest = _parent(bench, stage)
    with bench.timed("train"), bench.lane.shared():
        model, resolved = _apply(bench, model, stage)
    bench.save(stage, model, manifest["model"], [*manifest["steps"], *resolved])


def _run_recovery(bench: Workbench, stage: Stage) -> TrainingReport:
    """Trains to the end, or to the bench's ``until``.

    Raises:
        RecoveryPaused: it stands there; its state is kept.
    """
    model, manifest = _parent(bench, stage)
    steps = resolve(stage.steps)
    settings = bench.context.training["recovery"]
    logits, teacher = _teacher(bench, steps, settings)
    checkpoints = bench.checkpoints(stage)
    with bench.timed("train"), bench.lane.shared():
        report = loop.train(
            model,
            bench.task.train,
            settings,
            seed=bench.seed,
            device=bench.device,
            steps=steps,
            teacher_logits=logits,
            teacher=teacher,
            validation=bench.task.search,
            checkpoints=checkpoints,
            tick=bench.tick,
            until=bench.until,
        )
    records = [dict(r) for r in manifest["steps"]]
    for record, (technique, config) in zip(records[-len(steps) :], steps, strict=True):
        if technique.finalise is not None:
            record["resolved"] = {**record["resolved"], **technique.finalise(model, config)}
    if report.paused:
        raise RecoveryPaused(stage, model, manifest["model"], records, report)
    bench.save(stage, model, manifest["model"], records)
    checkpoints.clear()
    return report


def _run_conversion(bench: Workbench, stage: Stage) -> None:
    model, manifest = _parent(bench, stage)
    model, resolved = convert(bench, model, stage)
    bench.save(stage, model, manifest["model"], [*manifest["steps"], *resolved])


def convert(bench: Workbench, model: nn.Module, stage: Stage) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Applies a stage of conversions to a model, in place where they can; returns the model and the records of the steps.

    Raises:
        Infeasible: a conversion cannot be had on this model and device.
    """
    with bench.timed("train"), bench.lane.shared():
        model, resolved = _apply(bench, model, stage)
        for technique, config in resolve(stage.steps):
            if technique.calibrate is not None:
                technique.calibrate(model, config, bench.surroundings())
    return model, resolved


def _parent(bench: Workbench, stage: Stage) -> tuple[nn.Module, Mapping[str, Any]]:
    if stage.parent is None:
        raise ValueError(f"stage {stage.kind} needs a parent")
    return bench.load(stage.parent), artefact.manifest(bench.folder(stage.parent))


def _apply(bench: Workbench, model: nn.Module, stage: Stage) -> tuple[nn.Module, list[dict[str, Any]]]:
    records = []
    for technique, config in resolve(stage.steps):
        info = models.model_info(model, bench.context.device)
        if info.family not in technique.models:
            raise Infeasible(f"{technique.name} works on {', '.join(technique.models)} models, not on {info.family}")
        reason = technique.check(info, config)
        if reason:
            raise Infeasible(f"{technique.name}: {reason}")
        applied: Applied = technique.apply(model, config, bench.surroundings())
        if not applied.changed:
            raise Infeasible(f"{technique.name}: changed nothing in this model with {config}")
        model = applied.model
        records.append({"technique": technique.name, "version": technique.version, "resolved": applied.resolved})
    return model, records


def _teacher(
    bench: Workbench, steps: list[tuple[Technique, Any]], settings: Mapping[str, Any]
) -> tuple[Tensor | None, nn.Module | None]:
    """Returns the teacher's logits, or the teacher itself where it must see what the student sees (DeiT's way).

    Logits are calculated once for the images as they are; images that are changed, or looking inside the teacher, need it in
    the training.
    """
    wanted = any(t.needs_teacher(c) for t, c in steps)
    inside = any(t.needs_teacher_model(c) for t, c in steps)
    if inside or (wanted and TrainingSettings.read(settings).changes_images):
        return None, bench.load(bench.baseline_key)
    return (_teacher_logits(bench), None) if wanted else (None, None)


def _teacher_logits(bench: Workbench) -> Tensor:
    """Logits of the baseline over the training images, computed once a study and shared: (N, classes) float32.

    The wait for the lease stands outside the lane: its holder may be waiting for a measurement, which waits for the lane.
    Where the storage is a folder they are mapped from their file: trials of one node hold them once, as far as they look at
    them (of VQAv2 they are 5.6 GB).
    """
    name = f"{prefix(bench.baseline_key)}/teacher_logits.safetensors"
    _make_logits(bench, name)
    try:
        return _read_logits(bench.storage, name)
    except (SafetensorError, FileNotFoundError):  # damaged, or removed because it was
        bench.storage.delete(name)
    _make_logits(bench, name)
    try:
        return _read_logits(bench.storage, name)
    except (SafetensorError, FileNotFoundError) as error:
        raise StorageFault(f"{bench.storage.url}/{name} is damaged, newly made as it is: {error}") from error


def _make_logits(bench: Workbench, name: str) -> None:
    with bench.deadline.paused():
        lease = acquire(
            bench.storage, f"{prefix(bench.baseline_key)}/teacher_leases", wait=lambda: bench.storage.exists(name)
        )
    if lease is None:
        return
    with lease, bench.timed("train"), bench.lane.shared():
        if not bench.storage.exists(name):
            teacher = bench.load(bench.baseline_key)
            logits = evaluation.predict_logits(teacher, bench.task.train, device=bench.device, tick=bench.tick)
            content = save_tensors({"logits": logits})
            del logits  # the content is as large
            bench.storage.put_atomic(name, content)


def _read_logits(storage: Storage, name: str) -> Tensor:
    path = storage.local(name)
    if path is None:
        return load_tensors(storage.read(name))["logits"]
    with safe_open(path, "pt") as file:
        found: Tensor = file.get_tensor("logits")
    return found


RUNNERS: dict[str, Callable[[Workbench, Stage], TrainingReport | None]] = {
    "baseline": _run_baseline,
    "surgery": _run_surgery,
    "recovery": _run_recovery,
    "conversion": _run_conversion,
}
"""What makes the artefact of each kind of stage; returns what it trained."""
