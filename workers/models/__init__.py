"""Models by family: build one, load its weights, describe its structure, and build that structure without weights.

A model is given by the ``model`` section of a study: ``family``, ``name`` (None: built from ``create``),
``pretrained``, ``checkpoint``, ``create``. Class count, channels and image size come from the data, and for
vision-language models the task and the vocabulary. A family is imported when it is asked for: those of vision-language
models import transformers, which takes seconds.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from workers.model_info import ModelInfo
from workers.models import hf_vit, local_weights, misfits, releases, timm_weights, vision_language
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
    "loading_notes",
    "model_info",
    "skeleton",
]

log = logging.getLogger("vitpareto")

FAMILIES = {"timm": "timm_vit", "vilt": "vilt", "meter": "meter"}
"""Family to its module here. Modules of a family other than timm name it in a class attribute ``family``."""

_RELEASES = {"vilt": "vilt_release", "meter": "meter_release"}
"""Families whose published weights have other names than ours: the module that reads both."""


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
    """Builds the structure that :func:`describe` described on the meta device: shapes without weights, eval mode.

    Raises:
        ModelError: settings other than those of :mod:`workers.model_settings`, or that make no model.
    """
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
    family, checkpoint = description["family"], model.get("checkpoint")
    pretrained, release = bool(model.get("pretrained")) and not checkpoint, _release(family)
    module: nn.Module
    if release is None:
        module = _family(family).create(description, pretrained=pretrained)
    else:
        module = _family(family).create(description)
        checkpoint = release.fetch(data.task, train=bool(model.get("train"))) if pretrained else checkpoint
    if checkpoint:
        for note in _load_(module, model, checkpoint, counted_answers=counted_answers):
            log.warning("checkpoint %s: %s", checkpoint, note)
    return module.to(device)


def loading_notes(model: Mapping[str, Any], data: TaskInfo, *, counted_answers: bool = False) -> list[str]:
    """Returns what loading the model's checkpoint would change or choose, a sentence each, and makes sure that it fits.

    The numbers are looked at and not kept: the model is one without weights.

    Raises:
        ModelError: see :func:`load_checkpoint_`.
    """
    checkpoint = model.get("checkpoint")
    if not checkpoint:
        return []
    module = skeleton(describe(model, data))
    return _load_(module, model, checkpoint, counted_answers=counted_answers)


def _load_(module: nn.Module, model: Mapping[str, Any], checkpoint: str | Path, *, counted_answers: bool) -> list[str]:
    return load_checkpoint_(
        module,
        checkpoint,
        key=model.get("checkpoint_key"),
        key_map=model.get("key_map"),
        naming=model.get("naming"),
        head_rows=model.get("head_rows"),
        fresh_head=bool(model.get("train")),
        counted_answers=counted_answers,
    )


def family_of(module: nn.Module) -> str:
    """Returns the family of a model, a key of :data:`FAMILIES`."""
    return str(getattr(module, "family", "timm"))


def model_info(module: nn.Module, device: str = "cpu") -> ModelInfo:
    """Returns the facts that techniques judge by, read from the module itself, so that they hold after pruning."""
    return _family(family_of(module)).model_info(module, device)  # type: ignore[no-any-return]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_digest(path: str | Path) -> str:
    """Returns the SHA-256 of the checkpoint's bytes in hexadecimal; of a folder's files of weights with their names.

    A repository of the hub is downloaded, as :func:`workers.models.local_weights.located` says.

    Raises:
        ModelError: if a file cannot be read.
    """
    path = local_weights.located(path)
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
    module: nn.Module,
    path: str | Path,
    *,
    key: str | None = None,
    key_map: Mapping[str, str | None] | None = None,
    naming: str | None = None,
    head_rows: Sequence[int] | None = None,
    fresh_head: bool = False,
    counted_answers: bool = False,
) -> list[str]:
    """Loads weights into ``module`` in place: see :func:`workers.models.local_weights.read`. Every key must match.

    Those of a vision-language family may have its release's names. Those of a timm ViT are brought to its names and sizes
    by :mod:`workers.models.timm_weights`.

    Args:
        key: which of several state dicts in the file.
        key_map: other names to timm's, see :mod:`workers.weight_names`.
        naming: other names that are known: ``hf_vit``, transformers'.
        head_rows: for each class of the data the row of the checkpoint's head.
        fresh_head: the weights are to be fine-tuned. A release's get a new head, as
            :func:`workers.models.releases.start_task_` says; all others keep theirs where it fits the classes.
        counted_answers: the classes of VQA are the most frequent answers of the data, so a release's head, whose answers
            have another order, is refused.

    Returns:
        What was done to the weights that changes what the model computes, and what was chosen: a sentence each.

    Raises:
        ModelError: the file is unreadable, holds pickled code, or its names or shapes are not those of the model. The
            module is then unchanged.
    """
    weights, notes = local_weights.read(path, key)
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        weights = {name: tensor.to("meta") for name, tensor in weights.items()}
    where = f"checkpoint {path}"
    release = _release(family_of(module))
    if release is None:
        if naming == hf_vit.NAMING:
            key_map = hf_vit.key_map(weights, teacher=hasattr(module, "dist_token"))
        weights, more = timm_weights.bring(weights, module, key_map=key_map, fresh_head=fresh_head, where=where)
        if head_rows is not None:
            weights = timm_weights.in_order(weights, head_rows, more)
        try:
            local_weights.fit_(module, weights, where)
        except ModelError as error:
            raise ModelError(misfits.refusal(weights, module, str(error))) from None
        return notes + more
    if any(name.startswith(release.PREFIX) for name in weights):
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
        weights = _of_next_task(weights, module, notes)
    local_weights.fit_(module, weights, where)
    return notes


def _of_next_task(weights: dict[str, Tensor], module: nn.Module, notes: list[str]) -> dict[str, Tensor]:
    """Returns our own weights with the module's heads where theirs, of other classes or another task, do not fit."""
    weights = timm_weights.with_own_head(weights, module.state_dict(), notes)
    releases.second_image_(weights, module)
    return weights
