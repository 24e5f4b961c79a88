"""Where a model section says less than a worker needs because a folder says it: transformers' folders, timm's, the hub's.

``family: hf_vit`` with a checkpoint, and names that begin with ``hf-hub:`` or ``local-dir:`` as timm writes them, are
resolved once, by who starts a study: to a timm name, complete settings and a checkpoint. A repository is pinned to
the commit that was found. ``config.json`` comes from anyone, so its settings are judged like a study's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers import model_settings
from workers.models import hf_vit, local_weights
from workers.models.timm_vit import ModelError

LOCAL = "local-dir:"
SOURCES = (local_weights.HUB, LOCAL)

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_OF_DATA = ("img_size", "in_chans", "num_classes")


@dataclass(frozen=True)
class Origin:
    """What a folder says of its model besides the structure.

    Attributes:
        labels: names of the classes, in the order of the head's rows; empty where they have none.
        mean, std: of the normalisation that the model was trained with.
    """

    labels: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)


def head_rows(labels: Sequence[str], class_names: Sequence[str]) -> list[int] | None:
    """Returns for each class of the data the row that has its name, None where the order is the same or names differ."""
    theirs, ours = ([name.strip().lower() for name in names] for names in (labels, class_names))
    if theirs == ours or len(set(theirs)) < len(theirs) or set(theirs) != set(ours):
        return None
    return [theirs.index(name) for name in ours]


def resolve(model: Mapping[str, Any]) -> tuple[dict[str, Any], Origin]:
    """Returns the section that a worker builds from, and what is known of the model besides.

    Raises:
        ModelError: a folder is not there, cannot be fetched, or holds another kind of model.
    """
    section = {**model, "create": dict(model.get("create") or {})}
    name, checkpoint = model.get("name"), model.get("checkpoint")
    if model.get("family") == hf_vit.NAMING:
        return _of_transformers(section, str(checkpoint))
    if isinstance(name, str) and name.startswith(SOURCES):
        return _of_timm(section, name)
    folder = None if checkpoint is None or str(checkpoint).startswith(local_weights.HUB) else Path(checkpoint)
    config = _read(folder / _CONFIG) if folder and (folder / _CONFIG).is_file() else {}
    return section, _timm_origin(config)


def _of_transformers(section: dict[str, Any], checkpoint: str) -> tuple[dict[str, Any], Origin]:
    folder = local_weights.located(checkpoint)
    config = _read(folder / _CONFIG)
    name, settings = hf_vit.structure(config, str(folder / _CONFIG))
    create = {**settings, **section["create"]}
    _judge(create, folder / _CONFIG)
    section |= {"family": "timm", "naming": hf_vit.NAMING, "name": name, "create": create}
    section["checkpoint"] = _pinned(checkpoint, folder)
    shown = _read(folder / _PREPROCESSOR) if (folder / _PREPROCESSOR).is_file() else {}
    labels = config.get("id2label")
    ordered = _by_number(labels) if isinstance(labels, Mapping) else ()
    dropout = [key for key in ("hidden_dropout_prob", "attention_probs_dropout_prob") if config.get(key)]
    notes = [f"{key} of config.json is not taken: set drop rates in model.options" for key in dropout]
    return section, Origin(ordered, _numbers(shown.get("image_mean")), _numbers(shown.get("image_std")), tuple(notes))


def _by_number(labels: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        found = [str(labels[key]) for key in sorted(labels, key=int)]
    except ValueError:
        return ()
    return () if all(label.startswith("LABEL_") for label in found) else tuple(found)


def _of_timm(section: dict[str, Any], name: str) -> tuple[dict[str, Any], Origin]:
    place = name if name.startswith(local_weights.HUB) else name.removeprefix(LOCAL)
    folder = local_weights.located(place)
    if not folder.is_dir():
        raise ModelError(f"model.name {name}: there is no such folder")
    config = _read(folder / _CONFIG)
    architecture, kwargs = config.get("architecture"), config.get("model_args") or {}
    if not isinstance(architecture, str) or not isinstance(kwargs, Mapping):
        remedy = (
            "; for transformers' folders use model.family: hf_vit with model.checkpoint"
            if "model_type" in config
            else ""
        )
        raise ModelError(
            f"{folder / _CONFIG}: must have the architecture of a timm model, as timm's save_for_hf writes it{remedy}"
        )
    given = {key: value for key, value in kwargs.items() if key not in _OF_DATA}
    _judge(given, folder / _CONFIG)
    section |= {"name": architecture, "create": {**given, **section["create"]}}
    if section.get("pretrained"):
        section |= {"pretrained": False, "checkpoint": _pinned(place, folder)}
    return section, _timm_origin(config)


def _timm_origin(config: Mapping[str, Any]) -> Origin:
    cfg = config.get("pretrained_cfg")
    cfg = cfg if isinstance(cfg, Mapping) else config
    labels = config.get("label_names") or cfg.get("label_names")
    names = tuple(map(str, labels)) if isinstance(labels, list) else ()
    return Origin(names, _numbers(cfg.get("mean")), _numbers(cfg.get("std")))


def _pinned(checkpoint: str, folder: Path) -> str:
    """Returns a repository with the commit that its folder in the cache is named by; a path as it is."""
    if not checkpoint.startswith(local_weights.HUB):
        return checkpoint
    return f"{checkpoint.partition('@')[0]}@{folder.name}"


def _judge(settings: Mapping[str, Any], where: Path) -> None:
    if faults := model_settings.faults("timm", settings):
        raise ModelError(f"{where}: " + "; ".join(fault.replace("model.create.", "") for fault in faults))


def _numbers(value: object) -> tuple[float, ...] | None:
    if not isinstance(value, list) or not all(isinstance(n, int | float) for n in value):
        return None
    return tuple(float(n) for n in value)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: must be JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: must be a mapping")
    return found
