"""What types cannot say of objectives, model, files and device, each fault with its path.

Every function takes a part of the file as it stands, skips what has the wrong type (the schema reports that), and goes
on after a fault, so that one reading finds them all.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from orchestrator.study.data import kind_of
from orchestrator.study.yaml_lines import ABSENT, Fault, nearest
from workers.measuring.protocols import SEEDS
from workers.metrics import OBJECTIVES

_PLAIN_VITS = ("vision_transformer", "deit", "eva", "beit")
"""Modules of timm that hold them."""

HUB, LOCAL = "hf-hub:", "local-dir:"
SOURCES = (HUB, LOCAL)
"""Begin the names of models that timm takes from elsewhere than its own list."""

_REPOSITORY = re.compile(r"hf-hub:[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)

_RELATIVE = "paths are relative to the study file, then to the working directory"

# --- objectives -------------------------------------------------------------------------------------------------------


def objective_faults(objectives: object, reference_point: object) -> list[Fault]:
    """Judges the names and directions of objectives, given as a list or mapping, and the reference point's names."""
    faults: list[Fault] = []
    places = objective_places(objectives)
    for where, name, direction in places:
        if name not in OBJECTIVES:
            faults.append(Fault(where, "must be a known objective", name, nearest(name, OBJECTIVES)))
        elif direction in ("minimize", "maximize") and direction != OBJECTIVES[name]:
            faults.append(
                Fault(where, f"must be {OBJECTIVES[name]}", direction, "leave the direction out: better is one-sided")
            )
    names = [name for _, name, _ in places]
    for i, name in enumerate(names):
        if name in names[:i]:
            faults.append(Fault(places[i][0], "must stand once", name, "remove one of the two"))
    for name in reference_point if isinstance(reference_point, Mapping) else ():
        if name not in names:
            faults.append(
                Fault(f"reference_point.{name}", "must be one of the study's objectives", name, nearest(name, names))
            )
    return faults


def objective_places(objectives: object) -> list[tuple[str, str, object]]:
    """Returns path, name and direction of each objective, None for the direction of one in a list."""
    if isinstance(objectives, list):
        return [(f"objectives[{i}]", name, None) for i, name in enumerate(objectives) if isinstance(name, str)]
    given = objectives.items() if isinstance(objectives, Mapping) else ()
    return [(f"objectives.{name}", name, direction) for name, direction in given if isinstance(name, str)]


# --- model, files, device ---------------------------------------------------------------------------------------------


def model_name_faults(model: object) -> list[Fault]:
    """Judges a timm name: what is compressed here is a plain vision transformer."""
    name = model.get("name") if isinstance(model, Mapping) and model.get("family", "timm") == "timm" else None
    if not isinstance(name, str) or name.startswith(SOURCES):
        return []
    import timm

    known = [model for module in _PLAIN_VITS for model in timm.list_models(module=module)]
    if name.partition(".")[0] in known:  # a tag of weights may follow the model's name
        return []
    rule = "must be a plain vision transformer" if timm.is_model(name) else "must be a timm model"
    near = get_close_matches(name, known, n=1)
    return [
        Fault("model.name", rule, name, f"did you mean {near[0]}?" if near else "vit_*, deit_*, eva* or beit* of timm")
    ]


def folder_faults(model: object) -> list[Fault]:
    """Judges whether a folder that says what the model is can be read and is one of its kind."""
    if not isinstance(model, Mapping):
        return []
    name, checkpoint = model.get("name"), model.get("checkpoint")
    named = isinstance(name, str) and name.startswith(SOURCES)
    if isinstance(name, str) and name.startswith(HUB) and not _REPOSITORY.fullmatch(name):
        return [Fault("model.name", "must be hf-hub:owner/name, with @revision where one is meant", name, "")]
    place = name if named else checkpoint if model.get("family") == "hf_vit" else None
    if not isinstance(place, str) or place.startswith(HUB):
        return []  # fetched when the study's context is made
    where = "model.name" if named else "model.checkpoint"
    if not os.path.isdir(place.removeprefix(LOCAL)):
        return [Fault(where, "must be a folder that exists", place, _RELATIVE)]
    from workers.models import ModelError, sources  # import torch

    try:
        sources.resolve({**model, "create": {}})
    except ModelError as error:
        return [Fault(where, f"must be a folder of a model that can be read: {error}", place, "see docs/your-model.md")]
    return []


def checkpoint_faults(checkpoint: object) -> list[Fault]:
    """Judges whether a checkpoint can be read without running code; whether it fits the model is the model's matter."""
    if not isinstance(checkpoint, str):
        return []
    where = "model.checkpoint"
    if checkpoint.startswith(HUB):
        return []  # fetched when the study's context is made
    path = Path(checkpoint)
    if not os.path.exists(path):  # which takes names that no file can have, as Path.exists does not
        return [Fault(where, "must be a file or folder that exists", checkpoint, _RELATIVE)]
    from workers.models import ModelError, local_weights  # import torch

    try:
        for file in local_weights.files(path):
            _open_checkpoint(file)
    except ModelError as error:
        return [
            Fault(where, f"must hold weights: {error}", checkpoint, "name the file, or a downloaded model's folder")
        ]
    except OSError as error:
        return [Fault(where, f"must be readable: {error.strerror or error}", checkpoint, "check its permissions")]
    except Exception:  # noqa: BLE001 - a damaged or hostile file raises anything
        rule = "must be .safetensors, or a .pth that torch.save wrote and that holds tensors only"
        remedy = "save it again with safetensors.torch.save_file(model.state_dict(), ...)"
        return [Fault(where, rule, checkpoint, remedy)]
    return []


def _open_checkpoint(path: Path) -> None:
    """Reads the names of a checkpoint, not its numbers; raises where it cannot be loaded safely."""
    with path.open("rb"):
        pass
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "numpy"):
            return
    import torch

    torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def data_faults(data: object, *, must_exist: bool = True) -> list[Fault]:
    """Judges where the data lies; unless ``must_exist``, only whether the study says where."""
    if not isinstance(data, Mapping):
        return []
    kind, path = kind_of(data), data.get("path")
    if kind is not None and kind.needs_path and path is None:
        return [Fault("data.path", f"must be given for kind {kind.name}", ABSENT, kind.path_remedy)]
    if kind is not None and kind.path == "forbidden" and path is not None:
        return [Fault("data.path", f"must be left out for kind {kind.name}", path, kind.path_remedy)]
    if isinstance(path, str) and "://" in path:
        return [Fault("data.path", "must be a path, not a URL", path, "mount it, or copy it to the nodes")]
    fetched = kind is not None and (kind.path == "fetched" or kind.is_name(path))
    if must_exist and isinstance(path, str) and not fetched and not os.path.exists(path):
        return [Fault("data.path", "must exist", path, _RELATIVE)]
    return []


def training_faults(training: object, data: object) -> list[Fault]:
    """RandAugment is made of operations on pictures, which not all data has."""
    kind = kind_of(data)
    if kind is None or kind.randaugment or not isinstance(training, Mapping):
        return []
    parts = {name: training.get(name) for name in ("baseline", "recovery")}
    return [
        Fault(
            f"training.{name}.augment", f"must not be randaugment for {kind.name}", "randaugment", "flip_crop or none"
        )
        for name, part in parts.items()
        if isinstance(part, Mapping) and part.get("augment") == "randaugment"
    ]


def resource_faults(device: object, resources: object) -> list[Fault]:
    """A study for CUDA needs a share of a GPU."""
    gpus = resources.get("gpus", 0) if isinstance(resources, Mapping) else 0
    if device == "cuda" and gpus == 0:
        return [Fault("resources.gpus", "must be above 0 for device cuda", gpus, "gpus: 1, or device: cpu")]
    return []


def seed_faults(seeds: list[int], protocol: str) -> list[Fault]:
    """A protocol that takes its accuracy over several seeds needs them."""
    needed = SEEDS[protocol]
    if len(seeds) >= len(needed):
        return []
    rule = f"must be at least {len(needed)} with measurement.protocol {protocol}"
    return [Fault("seeds", rule, seeds, f"seeds: {list(needed)}, or another protocol")]
