"""What types cannot say of objectives, model, files and device, each fault with its path.

Every function takes a part of the file as it stands, skips what has the wrong type (the schema reports that), and goes
on after a fault, so that one reading finds them all.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

from orchestrator.study_yaml import ABSENT, Fault, nearest
from workers.protocol import OBJECTIVES

# --- objectives -------------------------------------------------------------------------------------------------------


def objective_faults(objectives: object, reference_point: object) -> list[Fault]:
    """Judges the names and directions of objectives, given as a list or mapping, and the reference point's names."""
    faults: list[Fault] = []
    places: list[tuple[str, str, object]] = []
    if isinstance(objectives, list):
        places = [(f"objectives[{i}]", name, None) for i, name in enumerate(objectives) if isinstance(name, str)]
    elif isinstance(objectives, Mapping):
        places = [(f"objectives.{name}", name, direction) for name, direction in objectives.items()]
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


# --- model, files, device ---------------------------------------------------------------------------------------------


def model_name_faults(name: object) -> list[Fault]:
    """Judges a timm name."""
    if not isinstance(name, str) or name.startswith(("hf-hub:", "hf_hub:")):
        return []
    import timm

    if timm.is_model(name):
        return []
    known = [*timm.list_models("*vit_*"), *timm.list_models("deit*")]
    return [Fault("model.name", "must be a timm model", name, nearest(name, known) if known else "")]


def checkpoint_faults(checkpoint: object) -> list[Fault]:
    """Judges a checkpoint by its first bytes; reading its tensors, without running any code, is the model's matter."""
    if not isinstance(checkpoint, str):
        return []
    path, where = Path(checkpoint), "model.checkpoint"
    remedy = "paths are relative to the study file, then to the working directory"
    if not path.is_file():
        return [Fault(where, "must be a file that exists", checkpoint, remedy)]
    try:
        sound = _has_safetensors_header(path) if path.suffix == ".safetensors" else zipfile.is_zipfile(path)
    except OSError as error:
        return [Fault(where, f"must be readable: {error.strerror}", checkpoint, "check its permissions")]
    if sound:
        return []
    rule = "must be .safetensors, or a .pth that torch.save wrote and that holds tensors only"
    return [Fault(where, rule, checkpoint, "save it again with safetensors.torch.save_file(model.state_dict(), ...)")]


def _has_safetensors_header(path: Path) -> bool:
    """Whether a file starts with a little-endian 8-byte length and a JSON object of that length."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 2 <= length <= path.stat().st_size - 8 and file.read(1) == b"{"


def data_faults(data: object) -> list[Fault]:
    """Judges where the data lies."""
    if not isinstance(data, Mapping):
        return []
    kind, path = data.get("kind"), data.get("path")
    if kind in ("imagefolder", "parquet") and path is None:
        return [Fault("data.path", f"must be given for kind {kind}", ABSENT, "name the folder or file with the images")]
    if isinstance(path, str) and "://" not in path and not Path(path).exists() and not str(kind).startswith("cifar"):
        remedy = "paths are relative to the study file, then to the working directory"
        return [Fault("data.path", "must exist", path, remedy)]
    return []


def resource_faults(device: object, resources: object) -> list[Fault]:
    """A study for CUDA needs a share of a GPU."""
    gpus = resources.get("gpus", 0) if isinstance(resources, Mapping) else 0
    if device == "cuda" and gpus == 0:
        return [Fault("resources.gpus", "must be above 0 for device cuda", gpus, "gpus: 1, or device: cpu")]
    return []
