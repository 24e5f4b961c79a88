"""Recipes that cut a model to the same structure are one recipe from there on: the first one's stages stand for all.

What a surgery makes of trained weights is known once it has run, so its stage is named by its config, as every stage is. It is
cheap beside the training that follows. Each leaves a note beside its parent's artefact, under a digest of what it made and of what the
rest of the recipe would do with its config; who finds a note there goes on with the stages of the recipe that wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from workers import artefact
from workers.stages.graph import Stage, prefix, resolve
from workers.stages.workbench import DamagedStage, Workbench
from workers.techniques.record import Technique
from workers.trial import Recipe, Step, canonical_json, digest


def standing_for(bench: Workbench, recipe: Recipe, stages: Sequence[Stage]) -> Recipe:
    """Returns the recipe whose stages stand for those of ``recipe``: its own, or those of an earlier one with an equal surgery.

    Args:
        stages: of ``recipe``; its surgery's artefact is in the storage. Where a stage behind it is there too, made before the note of
            the other recipe was, it stays the recipe's own.

    Raises:
        DamagedStage: the surgery's manifest is damaged.
    """
    number = next((i for i, stage in enumerate(stages) if stage.kind == "surgery"), None)
    if number is None:
        return recipe
    surgery = stages[number]
    note = f"{prefix(str(surgery.parent))}/equal/{_made(bench, surgery)}.json"
    own = canonical_json([asdict(step) for step in surgery.steps]).encode()
    if bench.storage.put_if_absent(note, own) or any(bench.is_done(stage.key) for stage in stages[number + 1 :]):
        return recipe
    try:
        first = tuple(Step(**step) for step in json.loads(bench.storage.read(note)))
    except (ValueError, TypeError):  # damaged: this recipe is the first now
        bench.storage.put_atomic(note, own)
        return recipe
    return Recipe(first + recipe.steps[len(surgery.steps) :])


def _made(bench: Workbench, surgery: Stage) -> str:
    try:
        found = artefact.manifest(bench.folder(surgery.key))
    except artefact.ArtefactDamaged as error:
        raise DamagedStage(surgery.key, error) from error
    tensors = found["tensors"]["sha256"]
    rest = [_afterwards(technique, config, bench.device.type) for technique, config in resolve(surgery.steps)]
    return digest([bench.seed, found["model"], found["steps"], found["aliases"], tensors, rest])


def _afterwards(technique: Technique, config: Any, device: str) -> list[object]:
    """Returns what later stages and the measurement ask of a surgery's config: all of it where the training may look at it."""
    looks = (technique.loss, technique.parameter_groups, technique.on_progress, technique.finalise)
    if any(function is not None for function in looks):
        return [technique.name, asdict(config)]
    asks = (technique.trains, technique.needs_teacher, technique.needs_teacher_model)
    return [technique.name, *(bool(ask(config)) for ask in asks), technique.simulated(config, device)]
