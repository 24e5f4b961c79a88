"""Models by family: build one, load its weights, describe its structure, and build that structure without weights.

A model is given by the ``model`` section of a study: ``family``, ``name`` (None: built from ``create``),
``pretrained``, ``checkpoint``, ``create``. Class count, channels and image size come from the data, and for
vision-language models the task and the vocabulary. A family is imported when it is asked for: those of vision-language
models import transformers, which takes seconds.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from workers.model_info import ModelInfo
from workers.models import local_weights, releases, vision_language
from workers.models.timm_vit import ModelError

if TYPE_CHECKING:
    from workers.tasks import TaskInfo

__all__ = [
    "FAMILIES",
    "ModelError",
    "build",
    "checkpoint_digest",
    "describe",
    "family_of",
    "load_checkpoint_",
    "model_info",
    "skeleton",
]

log = logging.getLogger("vitpareto")

FAMILIES = {"timm": "timm_vit", "vilt": "vilt", "meter": "meter"}
"""Family to its module here. Modules of a family other than timm name it in a class attribute ``family``."""

_RELEASES = {"vilt": "vilt_release", "meter": "meter_release"}
"""Families whose published weights have other names than ours: the module that reads both."""

_HEADS = ("head.", "head_dist.")
"""Prefixes of the classifiers' tensors, in every family."""


def _family(name: object) -> Any:
    if name not in FAMILIES:
        raise ModelError(f"model.family must be one of {', '.join(FAMILIES)}, got {name!r}")
    return import_module(f"workers.models.{FAMILIES[str(name)]}")


def _release(family: str) -> Any:
    """Returns the module that reads the weights of a family's release; None for timm, which reads its own."""
    return import_module(f"workers.models.{_RELEASES[family]}") if family in _RELEASES else None


def describe(model: Mapping[str, Any], data: TaskInfo) -> dict[str, Any]:
    """Returns the plain values that say what the model's structure is: ``family``, ``name`` and complete ``create``.

    No weights, no locations, nothing of the data besides class count, channels and image size, task and vocabulary.

    Raises:
        ModelError: for a family that is not known, is not for this task, or ``create`` values that contradict the data.
    """
    family = model.get("family", "timm")
    module = _family(family)
    if (family == "timm") != (data.text is None):
        fitting = "timm" if data.text is None else ", ".join(_RELEASES)
        raise ModelError(f"model.family {family} is not for {data.task}: use {fitting}, or other data")
    if family != "timm":
        model = vision_language.with_facts(model, data, module.describe)
        return module.describe(model)  # type: ignore[no-any-return]
    return module.describe(model, data)  # type: ignore[no-any-return]


def skeleton(description: Mapping[str, Any]) -> nn.Module:
    """Builds the structure that :func:`describe` described on the meta device: shapes without weights, eval mode."""
    module: nn.Module = _family(description.get("family")).create(description, device="meta")
    return module.eval()


def build(model: Mapping[str, Any], data: TaskInfo, *, device: str = "cpu", counted_answers: bool = False) -> nn.Module:
    """Builds the model: weights of its checkpoint, pretrained ones, or random ones.

    Random ones come from torch's global generator: seed it first.

    Args:
        model: model section of the study.
        data: class count, channels and image size; task and vocabulary.
        device: where the module lies; ``meta`` gives the structure alone.
        counted_answers: see :func:`load_checkpoint_`.

    Raises:
        ModelError: for a description that makes no model, or weights that cannot be had or do not fit.
    """
    description = describe(model, data)
    if device == "meta":
        return skeleton(description)
    family, checkpoint, train = description["family"], model.get("checkpoint"), bool(model.get("train"))
    pretrained, release = bool(model.get("pretrained")) and not checkpoint, _release(family)
    module: nn.Module
    if release is None:
        module = _family(family).create(description, pretrained=pretrained)
    else:
        module = _family(family).create(description)
        checkpoint = release.fetch(data.task, train=train) if pretrained else checkpoint
    if checkpoint:
        load_checkpoint_(module, checkpoint, fresh_head=train, counted_answers=counted_answers)
    return module.to(device)


def family_of(module: nn.Module) -> str:
    """Returns the family of a model, a key of :data:`FAMILIES`."""
    return str(getattr(module, "family", "timm"))


def model_info(module: nn.Module, device: str = "cpu") -> ModelInfo:
    """Returns the facts that techniques judge by, read from the module itself, so that they hold after pruning."""
    return _family(family_of(module)).model_info(module, device)  # type: ignore[no-any-return]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_digest(path: str | Path) -> str:
    """Returns the SHA-256 of the checkpoint's bytes in hexadecimal; of a folder's files of weights with their names.

    Raises:
        ModelError: if a file cannot be read.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            files = local_weights.files(path)
            found = [[file.name, checkpoint_digest(file)] for file in files]
            return hashlib.sha256(repr(found).encode()).hexdigest()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"checkpoint {path}: cannot be read: {error.strerror or error}") from error


def load_checkpoint_(
    module: nn.Module, path: str | Path, *, fresh_head: bool = False, counted_answers: bool = False
) -> None:
    """Loads weights into ``module`` in place: see :func:`workers.models.local_weights.read_tensors`. Every key must match.

    Those of a vision-language family may have its release's names.

    Args:
        fresh_head: the weights are to be fine-tuned. A release's get a new head, as
            :func:`workers.models.releases.start_task_` says; all others keep theirs where it fits the classes.
        counted_answers: the classes of VQA are the most frequent answers of the data, so a release's head, whose answers
            have another order, is refused.

    Raises:
        ModelError: the file is unreadable, holds pickled code, or its names or shapes are not those of the model. The
            module is then unchanged.
    """
    weights = local_weights.read_tensors(path)
    release = _release(family_of(module))
    if release is not None and any(name.startswith(release.PREFIX) for name in weights):
        task = module.task
        if counted_answers and task == "vqa" and not fresh_head:
            raise ModelError(
                f"checkpoint {path}: the rows of its head are answers in the release's order, which the answers counted from "
                "the data do not have; set data.answers to a file that lists the release's answers in that order (id2label of "
                "a published ViLT), or model.train: true for a new head"
            )
        weights = release.from_release_state_dict(weights, module, fresh_head=fresh_head)
        if not any(name.startswith("head.") for name in weights):
            raise ModelError(
                f"checkpoint {path}: has no head for {task}: it is from before fine-tuning, or for another task; "
                "set model.train: true for a new head"
            )
    elif fresh_head:
        weights = _of_next_task(weights, module, path)
    local_weights.fit_(module, weights, f"checkpoint {path}")


def _of_next_task(weights: dict[str, Tensor], module: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """Returns our own weights with the module's heads where theirs, of other classes or another task, do not fit."""
    weights, own = dict(weights), module.state_dict()
    heads, theirs = ({n: t for n, t in found.items() if n.startswith(_HEADS)} for found in (own, weights))
    if {n: t.shape for n, t in heads.items()} != {n: t.shape for n, t in theirs.items()}:
        log.warning("checkpoint %s: its head is not one of these classes; a new one is trained", path)
        weights = {n: t for n, t in weights.items() if n not in theirs} | heads
    releases.second_image_(weights, module)
    return weights
