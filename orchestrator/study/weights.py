"""What loading a study's weights changes or takes for granted, told before anything is trained. Imports torch when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.study.schema import StudyConfig
    from workers.models.sources import Origin
    from workers.tasks import TaskInfo
    from workers.trial import Context

_SHOWN = 3


def weights_notes(config: StudyConfig, context: Context) -> list[str]:
    """Returns a sentence for all that changes results and that weights or a folder decide, or do not say.

    Raises:
        ModelError: the checkpoint does not fit the model, or the pretrained weights have no head for these classes.
        TaskError: the data cannot be read.
    """
    if context.model.get("checkpoint") is None and not context.model.get("pretrained"):
        return []
    from workers import models, tasks  # these import torch
    from workers.models import taken_for_granted as facts

    info = tasks.info(context.data)
    if info.text is not None:
        counted = isinstance(context.data.get("answers", 0), int)
        return models.loading_notes(context.model, info, counted_answers=counted)
    origin = config.model.resolved()[1]
    module = models.skeleton(models.describe(context.model, info))
    found = [*origin.notes, *models.loading_notes(context.model, info)]
    if context.model.get("pretrained"):
        found += facts.pretrained_notes(module, context.model, info)
        origin = facts.pretrained_origin(module)
    if context.model.get("checkpoint") is not None:
        found.append(facts.assumed(module))
    found += _normalisation(config, origin)
    return found + _labels(origin, info)


def _normalisation(config: StudyConfig, origin: Origin) -> list[str]:
    mean, std = config.data.mean, config.data.std
    theirs = origin.mean and origin.std and f"mean {_list(origin.mean)}, std {_list(origin.std)}"
    if mean is None or std is None:
        taken = "images are normalised by the mean and std of the training images"
        if theirs:
            return [f"{taken}, the model was trained with {theirs}: data.mean and data.std set them"]
        return [f"{taken}; if the model was trained with others, data.mean and data.std set them"]
    same = origin.mean is None or origin.std is None or _close((*mean, *std), (*origin.mean, *origin.std))
    return [] if same else [f"images are normalised by data.mean and data.std, the model was trained with {theirs}"]


def _close(one: tuple[float, ...], two: tuple[float, ...]) -> bool:
    return len(one) == len(two) and all(abs(a - b) < 1e-3 for a, b in zip(one, two, strict=True))


def _list(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"


def _labels(origin: Origin, info: TaskInfo) -> list[str]:
    """Says where names of classes differ: a head whose rows mean something else is wrong about everything, in silence."""
    from workers.models.sources import head_rows  # imports torch

    pairs = list(zip(origin.labels, info.class_names, strict=False))
    other = [(i, a, b) for i, (a, b) in enumerate(pairs) if a.strip().lower() != b.strip().lower()]
    if not other or len(origin.labels) != len(info.class_names) or head_rows(origin.labels, info.class_names):
        return []  # as many rows and the same names: put in order while they are loaded
    shown = "; ".join(f"{i} is {a!r} there and {b!r} here" for i, a, b in other[:_SHOWN])
    return [
        f"classes: {len(other)} of {len(pairs)} have other names in the checkpoint ({shown}); rows of its head are taken by number"
    ]
