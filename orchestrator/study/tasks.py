"""What a study's data asks of the rest of it: a family of models, accuracies, settings of training; each fault with its path.

As in :mod:`orchestrator.study.faults`, every function takes parts of the file as they stand and skips what has the wrong type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from orchestrator.study.constraints import DROPS, ConstraintError, parse
from orchestrator.study.data import VISION_LANGUAGE_KEYS, DataSection, kind_of
from orchestrator.study.faults import objective_places
from orchestrator.study.yaml_lines import Fault, nearest
from workers import model_settings
from workers.metrics import ACCURACIES, METRICS
from workers.tasks import IMAGES, TaskError

_KEYS_OF_TASK = {"answers": "vqa", "candidates": "retrieval"}
"""Keys of the data section that only one task has."""

_SHAPES = {"vilt": "ViltShape", "meter": "MeterShape"}
"""Family of vision-language models to the class of its settings, in the module of its name."""

_FETCHED = ("vilt_b32",)
"""Names whose published weights a hub has."""

_OF_DATA = {
    "task": "data.kind",
    "num_classes": "data.answers",
    "img_size": "data.image_size",
    "in_chans": "data.kind",
    "pad_id": "data.tokenizer",
}
"""Settings that a model takes from the data, and where a study says them."""


def task_of(data: object) -> str | None:
    """Returns the task of a data section; None where it names no known kind."""
    kind = kind_of(data)
    return None if kind is None else kind.task


def family_of(model: object) -> str:
    """Returns the family of a model section; hf_vit, which names weights, is a model of timm's."""
    family = model.get("family") if isinstance(model, Mapping) else None
    return family if isinstance(family, str) and family != "hf_vit" else "timm"


def accuracies_of(task: str) -> tuple[str, ...]:
    """Returns the accuracies that are measured of a task."""
    return tuple(name for name in ACCURACIES if task in METRICS[name].tasks)


# --- the data's own keys ----------------------------------------------------------------------------------------------


def data_key_faults(data: object) -> list[Fault]:
    """Judges keys of the data section that say nothing to its task; one with its default is left alone."""
    task = task_of(data)
    if task is None or not isinstance(data, Mapping):
        return []
    faults = []
    for key in VISION_LANGUAGE_KEYS:
        standing = DataSection.model_fields[key].default
        wanted = _KEYS_OF_TASK.get(key)
        fits = task != IMAGES and wanted in (None, task)
        if data.get(key, standing) != standing and not fits:
            what = "images with texts" if wanted is None else wanted
            faults.append(
                Fault(f"data.{key}", f"must be left out: it is for {what}", data[key], f"the kind is {data['kind']}")
            )
    return faults


def channel_faults(data: object) -> list[Fault]:
    """Judges keys that say something of each channel: how many there are, and in which units mean and deviation are."""
    kind = kind_of(data)
    if kind is None or not isinstance(data, Mapping):
        return []
    faults = []
    if kind.task != IMAGES and data.get("channels") is not None:
        rule = "must be left out: pictures with texts have 3"
        faults.append(Fault("data.channels", rule, data["channels"], f"the kind is {kind.name}"))
    for key in ("mean", "std"):
        values = data.get(key)
        numbers = isinstance(values, list) and all(isinstance(one, int | float) for one in values)
        if values is None or not isinstance(values, list) or not numbers:
            continue
        if not values or min(values) < 0 or max(values) > kind.white:
            rule = f"must be from 0 (black) to {kind.white:g} (white), a value for each channel"
            remedy = "leave it out: it is taken from the training images"
            if kind.white == 1 and values and min(values) >= 0 and max(values) <= 255:
                remedy = f"divided by 255: [{', '.join(f'{one / 255:.4f}' for one in values)}]"
            faults.append(Fault(f"data.{key}", rule, values, remedy))
        elif data.get("channels") in (1, 3) and len(values) != data["channels"]:
            faults.append(Fault(f"data.{key}", f"must have {data['channels']} values, as data.channels says", values))
    return faults


def answers_faults(data: object) -> list[Fault]:
    """Judges a file of answers by reading it."""
    path = data.get("answers") if isinstance(data, Mapping) else None
    if task_of(data) != "vqa" or not isinstance(path, str) or not path:
        return []
    from workers.tasks.answers import read_vocabulary  # imports numpy, which other studies do without

    try:
        read_vocabulary(Path(path))
    except TaskError as error:
        rule, _, remedy = str(error).removeprefix(f"data.answers {path}: ").rpartition("; ")
        return [Fault("data.answers", rule, path, remedy)]
    return []


# --- objectives and constraints ---------------------------------------------------------------------------------------


def metric_faults(objectives: object, constraints: object, data: object) -> list[Fault]:
    """Judges whether the accuracies that objectives and constraints name are those of the task."""
    task = task_of(data)
    if task is None:
        return []
    own, faults = accuracies_of(task), []
    named = [(where, name) for where, name, _ in objective_places(objectives)]
    for where, metric in [*named, *_constraints(constraints)]:
        accuracy = DROPS.get(metric, metric.removesuffix("_ratio"))
        if accuracy in ACCURACIES and accuracy not in own:
            ending = metric.removeprefix(accuracy)
            rule = f"must be an accuracy of the task {task}"
            faults.append(Fault(where, rule, metric, f"use {' or '.join(f'{name}{ending}' for name in own)}"))
    return faults


def _constraints(constraints: object) -> Iterable[tuple[str, str]]:
    for i, text in enumerate(constraints if isinstance(constraints, list) else ()):
        try:
            yield f"constraints[{i}]", parse(text).metric
        except (ConstraintError, TypeError):  # the schema says what is wrong with it
            continue


# --- model ------------------------------------------------------------------------------------------------------------


def family_faults(model: object, data: object) -> list[Fault]:
    """Judges whether the model is for the data: timm's see images alone, the others images with texts."""
    family, task = family_of(model), task_of(data)
    known = ("timm", *_SHAPES)
    if task is None or family not in known or (task == IMAGES) == (family == "timm"):
        return []
    fitting = "timm" if task == IMAGES else " or ".join(_SHAPES)
    assert isinstance(data, Mapping)
    return [Fault("model.family", f"must be {fitting} for data kind {data['kind']}", family, "or use other data")]


def shape_faults(model: object, data: object) -> list[Fault]:
    """Judges name and settings of a vision-language model by the class of its settings. Imports transformers for one."""
    family = family_of(model)
    if family not in _SHAPES or not isinstance(model, Mapping):
        return []
    module = import_module(f"workers.models.{family}")
    shape, named = getattr(module, _SHAPES[family]), module.NAMED
    name, create = model.get("name"), model.get("create")
    create = create if isinstance(create, Mapping) else {}
    faults = [*_name_faults(family, name, named, model), *_setting_faults(family, create, shape)]
    task = task_of(data)
    if not faults and task in (None, IMAGES):
        return []
    standing = named.get(name, {}) if isinstance(name, str) else {}
    return faults or _contradictions(shape, {**standing, **create}, task, data, create or name)


def _name_faults(family: str, name: object, named: Mapping[str, Any], model: Mapping[str, Any]) -> list[Fault]:
    if not isinstance(name, str):
        return []
    if name not in named:
        return [Fault("model.name", f"must be a known model of family {family}", name, nearest(name, named))]
    if model.get("pretrained") is True and name not in _FETCHED:
        rule = f"must be false for {name}: only weights of {', '.join(_FETCHED)} are fetched by name"
        return [Fault("model.pretrained", rule, True, "give model.checkpoint a file, or train it")]
    return []


def _setting_faults(family: str, create: Mapping[str, Any], shape: type) -> list[Fault]:
    settings = model_settings.SETTINGS[family]
    faults = []
    for key, value in create.items():
        where = f"model.create.{key}"
        if key in _OF_DATA:
            faults.append(Fault(where, "must be left out: the data says it", value, f"see {_OF_DATA[key]}"))
        elif key not in settings:
            known = [name for name in settings if name not in _OF_DATA]
            faults.append(Fault(where, f"must be a setting of {family}", key, nearest(key, known)))
        elif rule := settings[key].rule(value):
            faults.append(Fault(where, rule, value, f"the default is {_default(shape, key)!r}"))
    return faults


def _default(shape: type, key: str) -> Any:
    return next(field.default for field in dataclasses.fields(shape) if field.name == key)


def _contradictions(
    shape: Any, settings: Mapping[str, Any], task: str | None, data: object, given: object
) -> list[Fault]:
    """Judges settings that are each allowed, by making the shape with what the study says of the data."""
    assert isinstance(data, Mapping)
    patch = settings.get("patch_size", shape.patch_size)
    side = data.get("image_size")
    standing = DataSection.model_fields["answers"].default
    answers = data.get("answers", standing) if task == "vqa" else None
    if task == "vqa" and not isinstance(answers, int):  # how many a file lists contradicts no other setting
        answers = standing
    facts = {"task": task, "num_classes": answers, "img_size": side if isinstance(side, int) else patch}
    try:
        shape(**{**settings, **facts})
    except ValueError as error:
        rule = str(error).replace("model.create.", "").replace("img_size", "data.image_size")
        return [Fault("model.create", rule, given, "change one of the two")]
    return []


# --- training ---------------------------------------------------------------------------------------------------------


def augmentation_faults(training: object, data: object) -> list[Fault]:
    """Judges augmentation: mirrored or mixed pictures would no longer be what the texts say of them."""
    task = task_of(data)
    if task in (None, IMAGES) or not isinstance(training, Mapping):
        return []
    plain: Mapping[str, object] = {"augment": "none", "mixup": 0.0, "cutmix": 0.0}
    return [
        Fault(
            f"training.{name}.{key}",
            f"must be {none} for {task}: texts speak of the pictures",
            part[key],
            "leave it out",
        )
        for name, part in training.items()
        if isinstance(part, Mapping)
        for key, none in plain.items()
        if part.get(key, none) != none
    ]
