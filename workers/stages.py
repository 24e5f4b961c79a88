"""The stage graph of a recipe and its content-addressed cache.

A recipe compiles to ``baseline -> surgery -> recovery -> conversion``. Each stage is named by the hash of what it does and of
its parent's key; its artefact lies in ``stages/<key>/`` of the storage, so recipes that share a prefix run it once, on any
node. A lease per stage makes two trials that want it at the same time run it once; its generation files count the executions.
A stage that fails leaves no manifest, so failures are never cached.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from workers import artefact, evaluation, models, tasks
from workers.artefact import parity
from workers.inputs import Inputs
from workers.node.deadline import Deadline
from workers.node.lane import Lane
from workers.node.lease import acquire
from workers.node.once import OnceAStudy
from workers.node.storage import Storage
from workers.tasks.batches import TaskData
from workers.techniques import registry, versions
from workers.techniques.record import Applied, Surroundings, Technique, make_config
from workers.training import loop
from workers.training.checkpoint import Checkpoints
from workers.training.settings import TrainingSettings
from workers.trial import Context, Recipe, StageRun, Step, canonical_json, digest, without_locations

PROBE = "probe.safetensors"
"""Beside an artefact: logits of a few images, which every later load is checked against."""


class Infeasible(Exception):
    """The recipe cannot be built on this model and device; the message says why."""


@dataclass(frozen=True)
class Stage:
    """One stage: ``steps`` are what it applies, ``parent`` the key of the artefact it starts from."""

    kind: str
    key: str
    parent: str | None
    steps: tuple[Step, ...] = ()


def compile_recipe(recipe: Recipe, seed: int, context: Context) -> tuple[Stage, ...]:
    """Returns the stages of ``recipe`` in order; the last one's artefact is what ships.

    Raises:
        Infeasible: a conversion step stands before a surgery step.
    """
    known = registry()
    plain = without_locations({"model": context.model, "data": context.data, "training": context.training["baseline"]})
    stages = [Stage("baseline", digest(["baseline", plain]), None)]
    by_kind: dict[str, list[Step]] = {"surgery": [], "conversion": []}
    for step in recipe.steps:
        kind = known[step.technique].stage
        if kind == "surgery" and by_kind["conversion"]:
            raise Infeasible(
                f"{step.technique} changes the structure and must come before {by_kind['conversion'][0].technique}"
            )
        by_kind[kind].append(step)

    def add(kind: str, steps: list[Step], *more: object) -> None:
        parent = stages[-1].key
        parts = [[s.technique, dict(s.config), versions()[s.technique]] for s in steps]
        stages.append(Stage(kind, digest([kind, parent, parts, seed, *more]), parent, tuple(steps)))

    surgery = by_kind["surgery"]
    if surgery:
        add("surgery", surgery)
        if any(t.trains(c) for t, c in resolve(surgery)):
            add("recovery", surgery, without_locations(context.training["recovery"]), stages[0].key)
    if by_kind["conversion"]:
        add("conversion", by_kind["conversion"])
    return tuple(stages)


def resolve(steps: tuple[Step, ...] | list[Step]) -> list[tuple[Technique, Any]]:
    """Returns (technique, config object) for every step."""
    known = registry()
    return [(known[s.technique], make_config(known[s.technique].Config, s.config)) for s in steps]


def prefix(key: str) -> str:
    """The storage folder of a stage's artefact."""
    return f"stages/{key}"


@lru_cache(maxsize=2)
def _load_task(data: str) -> TaskData:
    return tasks.load(json.loads(data))


@dataclass
class Workbench:
    """What one trial works with: its storage, device, lane and deadline, and where its time went."""

    context: Context
    seed: int
    storage: Storage
    device: torch.device
    lane: Lane
    deadline: Deadline
    seconds: dict[str, float]

    @property
    def task(self) -> TaskData:
        """The data, loaded once a process. Decoding, or waiting for who decodes, is work for the node, not the trial's."""
        with self.deadline.paused():
            return _load_task(canonical_json(dict(self.context.data)))

    def tick(self) -> None:
        """Between chunks of work: honours the deadline and lets a waiting measurement go first."""
        self.deadline.check()
        self.lane.tick()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to ``seconds[name]``, waiting for the lane excluded."""
        start, waited = time.monotonic(), self.lane.waited_s
        try:
            yield
        finally:
            spent = time.monotonic() - start - (self.lane.waited_s - waited)
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def ensure(self, stage: Stage) -> StageRun:
        """Makes sure that the artefact of ``stage`` is in the storage, running it here if nobody else does."""
        start = time.monotonic()
        manifest = f"{prefix(stage.key)}/{artefact.MANIFEST}"

        def done() -> bool:
            return self.storage.exists(manifest)

        with self.deadline.paused():
            lease = acquire(self.storage, f"{prefix(stage.key)}/leases", wait=done, note={"stage": stage.kind})
        self.seconds["stage_wait"] = self.seconds.get("stage_wait", 0.0) + time.monotonic() - start
        if lease is None:
            return StageRun(stage.kind, stage.key, True, time.monotonic() - start)
        with lease:
            if not done():
                _RUNNERS[stage.kind](self, stage)
        return StageRun(stage.kind, stage.key, False, time.monotonic() - start)

    def folder(self, key: str) -> str:
        """The path or URL of a stage's artefact."""
        return f"{self.storage.url}/{prefix(key)}"

    def load(self, key: str) -> nn.Module:
        """Loads the artefact of a stage in eval mode on the trial's device."""
        return artefact.load(self.folder(key), device=self.device)

    def surroundings(self) -> Surroundings:
        """What a technique may use: training images, the teacher, a seeded generator."""

        def batches(count: int, seed: int) -> Iterator[tuple[Tensor | Inputs, Tensor]]:
            for _, inputs, targets in self.task.train.batches(count, shuffle_seed=seed, device=self.device):
                yield inputs, targets

        generator = torch.Generator().manual_seed(self.seed)
        of_study, of_trial = partial(batches, 32, 0), partial(batches, 64, self.seed)
        once = OnceAStudy(self.storage, prefix(self.baseline_key), of_study, self.lane, self.deadline)
        teacher = partial(self.load, self.baseline_key)
        return Surroundings(self.device, self.seed, generator, of_trial, teacher, self.tick, once)

    def checkpoints(self, stage: Stage) -> Checkpoints:
        """The states of a stage's training, which whoever runs the stage again goes on from."""
        return Checkpoints(self.storage, f"{prefix(stage.key)}/training", stage.key)

    @property
    def baseline_key(self) -> str:
        """Stage key of the uncompressed baseline, which is also the teacher."""
        return compile_recipe(Recipe(), self.seed, self.context)[0].key

    # --- the artefact and the check of what it computes ---------------------------------------------------------------

    def _logits(self, model: nn.Module, count: int) -> Tensor:
        """Returns the logits of the first ``count`` search examples in one call: (B, classes) float32 on the CPU."""
        _, inputs, _ = next(self.task.search.batches(count, device=self.device))
        with torch.inference_mode(), self.lane.shared():
            logits: Tensor = model.eval()(inputs)
            return logits.float().cpu()

    def save(self, stage: Stage, model: nn.Module, description: Mapping[str, Any], steps: list[dict[str, Any]]) -> None:
        """Writes the artefact and, before it, the logits that every load of it is checked against."""
        model.eval()
        counts = sorted({min(count, len(self.task.search)) for count in parity.BATCHES})
        kept = parity.probe([self._logits(model, count) for count in counts], self.device)
        self.storage.put_atomic(f"{prefix(stage.key)}/{PROBE}", kept)
        files = artefact.pack(
            model, model_description=description, steps=steps, extra={"preprocessing": self.task.preprocessing()}
        )
        artefact.save_to(self.storage, prefix(stage.key), files)

    def check_parity(self, stage: Stage, model: nn.Module) -> parity.Parity:
        """Compares a reloaded model with the one that was packed.

        Raises:
            ArtefactMismatch: it computes something else.
            NotFiniteOutput: a logit is NaN or infinite.
        """

        def finite(count: int) -> Tensor:
            logits = self._logits(model, count)
            if not torch.isfinite(logits).all():
                raise evaluation.NotFiniteOutput("the model's logits hold NaN or infinity")
            return logits

        kept = self.storage.read(f"{prefix(stage.key)}/{PROBE}")
        try:
            return parity.compare(kept, model, finite, self.device)
        except parity.ArtefactMismatch as error:
            raise parity.ArtefactMismatch(f"artefact {stage.key}: {error}") from None


# --- what each kind of stage does -------------------------------------------------------------------------------------


def _run_baseline(bench: Workbench, stage: Stage) -> None:
    context = bench.context
    info = bench.task.info
    settings = context.training["baseline"]
    torch.manual_seed(settings.get("seed", 0))
    counted = isinstance(context.data.get("answers", 0), int)  # not a file of answers
    model = models.build(context.model, info, counted_answers=counted).to(bench.device)
    checkpoints = bench.checkpoints(stage)
    if context.model.get("train"):
        with bench.timed("train"), bench.lane.shared():
            loop.train(
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


def _run_surgery(bench: Workbench, stage: Stage) -> None:
    model, manifest = _parent(bench, stage)
    with bench.timed("train"), bench.lane.shared():
        model, resolved = _apply(bench, model, stage)
    bench.save(stage, model, manifest["model"], [*manifest["steps"], *resolved])


def _run_recovery(bench: Workbench, stage: Stage) -> None:
    model, manifest = _parent(bench, stage)
    steps = resolve(stage.steps)
    settings = bench.context.training["recovery"]
    logits, teacher = _teacher(bench, steps, settings)
    checkpoints = bench.checkpoints(stage)
    with bench.timed("train"), bench.lane.shared():
        loop.train(
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
        )
    records = [dict(r) for r in manifest["steps"]]
    for record, (technique, config) in zip(records[-len(steps) :], steps, strict=True):
        if technique.finalise is not None:
            record["resolved"] = {**record["resolved"], **technique.finalise(model, config)}
    bench.save(stage, model, manifest["model"], records)
    checkpoints.clear()


def _run_conversion(bench: Workbench, stage: Stage) -> None:
    model, manifest = _parent(bench, stage)
    with bench.timed("train"), bench.lane.shared():
        model, resolved = _apply(bench, model, stage)
        for technique, config in resolve(stage.steps):
            if technique.calibrate is not None:
                technique.calibrate(model, config, bench.surroundings())
    bench.save(stage, model, manifest["model"], [*manifest["steps"], *resolved])


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
    with bench.deadline.paused():
        lease = acquire(
            bench.storage, f"{prefix(bench.baseline_key)}/teacher_leases", wait=lambda: bench.storage.exists(name)
        )
    if lease is not None:
        with lease, bench.timed("train"), bench.lane.shared():
            if not bench.storage.exists(name):
                teacher = bench.load(bench.baseline_key)
                logits = evaluation.predict_logits(teacher, bench.task.train, device=bench.device, tick=bench.tick)
                content = save_tensors({"logits": logits})
                del logits  # the content is as large
                bench.storage.put_atomic(name, content)
                del content
    path = bench.storage.local(name)
    if path is None:
        return load_tensors(bench.storage.read(name))["logits"]
    with safe_open(path, "pt") as file:
        found: Tensor = file.get_tensor("logits")
    return found


_RUNNERS = {
    "baseline": _run_baseline,
    "surgery": _run_surgery,
    "recovery": _run_recovery,
    "conversion": _run_conversion,
}
