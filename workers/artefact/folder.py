"""The artefact, what a user would ship: a folder with ``model.safetensors`` and, written last, ``manifest.json``.

The manifest names the structure (the model's description and each step's *resolved* values) and the safetensors file, which
holds every tensor once. Where a stage was started several times (a lease that went to a successor, decision 0021) that file has
the number of the start in its name, so that no two runners write the same one; what ships is always ``model.safetensors``. Loading builds that structure on the meta device, lets each technique rebuild its part, and
assigns the tensors: no training, no calibration, no full-precision copy of a packed weight, no pickle.

Rules for modules that techniques put into a model: what they need afterwards is in the state dict (or in a
non-persistent buffer, which is stored too); what can be derived from it, as a kernel's packing, is a plain attribute.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from workers import models
from workers.node.storage import Storage, StorageFault, open_storage
from workers.techniques import registry, unknown
from workers.techniques.record import Technique
from workers.trial import canonical_json

SCHEMA = 1
"""Of the manifest; raised when a reader of an older version would read it wrongly."""

TENSORS = "model.safetensors"
MANIFEST = "manifest.json"

_TENSORS_NAME = re.compile(r"model(\.[0-9]{6,})?\.safetensors")

_SHOWN = 80
"""Characters of a manifest's value that a message repeats."""

_ROOM = 65_536
"""No resolved number is larger than this and than the tensors have elements: tokens, widths, ranks and groups are counts of them."""


class ArtefactError(ValueError):
    """An artefact that is absent, damaged, or made by versions that this one does not know."""


class ArtefactDamaged(ArtefactError, StorageFault):
    """What lies there is not what was saved: a file is absent, truncated or altered. Making it again helps."""


def tensors_name(start: int) -> str:
    """Returns the name of the tensors' file that the ``start``-th runner of a stage writes; the first one's is what ships."""
    return TENSORS if start == 1 else f"model.{start:06d}.safetensors"


# --- writing ----------------------------------------------------------------------------------------------------------


def pack(
    model: nn.Module,
    *,
    model_description: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    extra: Mapping[str, Any] | None = None,
    tensors: str = TENSORS,
) -> dict[str, bytes]:
    """Returns the files of the artefact in the order in which they must be written, the manifest last.

    Args:
        model: the compressed model.
        model_description: what :func:`workers.models.describe` gave for the model before compression.
        steps: in recipe order ``{"technique", "version", "resolved"}``.
        extra: more plain values for the manifest: preprocessing, class names.
        tensors: name of the file with the tensors, as :func:`tensors_name` gives it.

    Raises:
        ArtefactError: the model holds a meta tensor.
        ValueError, TypeError: ``steps`` or ``extra`` are not plain JSON values.
    """
    stored, aliases = contents(model)
    for name, tensor in stored.items():
        if tensor.is_meta:
            raise ArtefactError(f"artefact: tensor {name} is on the meta device and has no values to store")
    data = safetensors.torch.save({name: tensor.cpu() for name, tensor in stored.items()})
    file = {"file": tensors, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    return {tensors: data, MANIFEST: manifest_bytes(model_description, steps, file, aliases, extra)}


def manifest_bytes(
    model: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, Any],
    aliases: Mapping[str, str],
    extra: Mapping[str, Any] | None,
) -> bytes:
    """Returns the manifest as it is written; ``tensors`` has ``file``, ``sha256`` and ``bytes``, for the others see :func:`pack`."""
    manifest = {
        "schema": SCHEMA,
        "model": dict(model),
        "steps": [dict(step) for step in steps],
        "tensors": dict(tensors),
        "aliases": dict(aliases),
        "extra": dict(extra or {}),
    }
    return canonical_json(manifest).encode()


def save_to(storage: Storage, prefix: str, files: Mapping[str, bytes]) -> None:
    """Writes the files of :func:`pack` under ``prefix``; the manifest comes last and commits the artefact."""
    for name, data in files.items():
        storage.put_atomic(f"{prefix}/{name}" if prefix else name, data)


def save(
    model: nn.Module,
    path: str | Path,
    *,
    model_description: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Packs ``model`` and writes it into the folder ``path`` (a path or the URL of an object store). See :func:`pack`."""
    files = pack(model, model_description=model_description, steps=steps, extra=extra)
    save_to(open_storage(path), "", files)


def _non_persistent(model: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that the state dict leaves out, by name."""
    persistent = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name not in persistent}


def contents(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors to store, where they lie, and {name: name of the stored one} for those that share its memory."""
    return _unique(_tensors(model))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns every tensor that makes the model: state dict and non-persistent buffers, where they lie."""
    tensors = {**model.state_dict(), **_non_persistent(model)}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _unique(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Splits into tensors to store and {name: name of the stored one} for those that share its memory."""
    first: dict[tuple[Any, ...], str] = {}
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        # The storage itself: on the meta device it has no address.
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape))
        owner = first.setdefault(place, name) if tensor.numel() else name
        if owner != name:
            aliases[name] = owner
        else:  # a view of a larger storage is copied: safetensors stores no overlapping tensors
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            stored[name] = tensor if whole else tensor.clone()
    return stored, aliases


# --- reading ----------------------------------------------------------------------------------------------------------


def manifest(path: str | Path) -> dict[str, Any]:
    """Returns the manifest of the artefact at ``path`` (a folder or the URL of an object store).

    Raises:
        ArtefactDamaged: there is none, it is damaged, or names another file than its own.
        ArtefactError: that, or its schema is newer than this version knows.
    """
    where = f"artefact {path}"
    try:
        found = json.loads(open_storage(path).read(MANIFEST))
        schema = found["schema"]
    except FileNotFoundError as error:
        raise ArtefactDamaged(f"{where}: no {MANIFEST}; it is no artefact, or its writing did not finish") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtefactDamaged(f"{where}: {MANIFEST} is damaged: {error}") from error
    if type(schema) is not int or schema != SCHEMA:
        raise ArtefactError(
            f"{where}: {MANIFEST} has schema {_shown(schema)}, this version reads {SCHEMA}; update vitpareto"
        )
    missing = _FORM.keys() - found.keys()
    if missing:
        raise ArtefactDamaged(f"{where}: {MANIFEST} is damaged: it lacks {', '.join(sorted(missing))}")
    if faults := _form_faults(found):
        raise ArtefactDamaged(f"{where}: {MANIFEST} is damaged: {'; '.join(faults)}")
    return found  # type: ignore[no-any-return]


_FORM: Mapping[str, type] = {"model": dict, "steps": list, "tensors": dict, "aliases": dict}
"""Of a manifest: key to the type of its value."""


def _form_faults(found: Mapping[str, Any]) -> list[str]:
    """Returns what has another type than :func:`pack` writes, or names another file."""
    faults = _type_faults("", found, _FORM)
    if faults:
        return faults
    faults += _type_faults("tensors.", found["tensors"], {"sha256": str, "bytes": int})
    file = found["tensors"].get("file", TENSORS)
    if not isinstance(file, str) or not _TENSORS_NAME.fullmatch(file):
        faults.append(f"tensors.file must be {TENSORS}, got {_shown(file)}")
    for i, step in enumerate(found["steps"]):
        if isinstance(step, dict):
            faults += _type_faults(f"steps[{i}].", step, {"technique": str, "version": int, "resolved": dict})
        else:
            faults.append(f"steps[{i}] must be a mapping, got {_shown(step)}")
    faults += [
        f"aliases.{name} must name a tensor, got {_shown(owner)}"
        for name, owner in found["aliases"].items()
        if not isinstance(owner, str)
    ]
    return faults


def _type_faults(where: str, values: Mapping[str, Any], form: Mapping[str, Any]) -> list[str]:
    return [
        f"{where}{key} must be {getattr(kind, '__name__', kind)}, got {_shown(values.get(key))}"
        for key, kind in form.items()
        if not isinstance(values.get(key), kind) or isinstance(values.get(key), bool)
    ]


def _shown(value: object) -> str:
    return repr(value) if len(repr(value)) <= _SHOWN else repr(value)[: _SHOWN - 1] + "…"


def _tensors_file(found: Mapping[str, Any]) -> str:
    return str(found["tensors"].get("file", TENSORS))


def files(path: str | Path) -> dict[str, bytes]:
    """Returns the files of the artefact at ``path`` by the names under which they ship, the manifest last. See :func:`manifest`.

    Raises:
        ArtefactDamaged: one is absent.
    """
    found = manifest(path)
    storage = open_storage(path)
    try:
        data = storage.read(_tensors_file(found))
        if _tensors_file(found) == TENSORS:
            return {TENSORS: data, MANIFEST: storage.read(MANIFEST)}
    except FileNotFoundError as error:
        raise ArtefactDamaged(f"artefact {path}: a file is absent: {error}") from error
    shipped = {**found, "tensors": {**found["tensors"], "file": TENSORS}}
    return {TENSORS: data, MANIFEST: canonical_json(shipped).encode()}


def verify(path: str | Path) -> None:
    """Reads the artefact at ``path`` and compares its tensors with the digest in its manifest.

    Raises:
        ArtefactDamaged: a file is absent, truncated or altered.
    """
    _read_tensors(path, manifest(path))


def size_bytes(path: str | Path) -> int:
    """Returns the bytes of the artefact's files as they ship: tensors and manifest."""
    return sum(len(data) for data in files(path).values())


def load(
    path: str | Path, device: str | torch.device = "cpu", *, techniques: Mapping[str, Technique] | None = None
) -> nn.Module:
    """Loads the artefact at ``path`` (a folder or the URL of an object store) onto ``device``, in eval mode.

    Args:
        techniques: by name, those that its steps may be of; None for all that are installed.

    Returns:
        a model that takes float32 normalised images (B, C, H, W) and returns float32 logits (B, classes).

    Raises:
        ArtefactDamaged: a file is absent, truncated or altered.
        ArtefactError: that, a technique is not known here in that version, or the manifest, which may come from anyone,
            makes no model of these tensors.
    """
    found = manifest(path)
    tensors = _read_tensors(path, found)
    _check_sizes(path, found, tensors)
    model = _structure(path, found, registry() if techniques is None else techniques)
    placed = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
    placed |= {name: placed[owner] for name, owner in found["aliases"].items()}
    _assign(path, model, placed)
    return model.eval()


def _read_tensors(path: str | Path, found: Mapping[str, Any]) -> dict[str, Tensor]:
    name = _tensors_file(found)
    where = f"artefact {path}: {name}"
    try:
        data = open_storage(path).read(name)
    except FileNotFoundError as error:
        raise ArtefactDamaged(f"{where} is absent") from error
    expected = found["tensors"]
    if len(data) != expected["bytes"]:
        raise ArtefactDamaged(f"{where} has {len(data)} bytes, the manifest says {expected['bytes']}; it is truncated")
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise ArtefactDamaged(f"{where} is not what was saved: its SHA-256 differs from the manifest's")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ArtefactError(f"{where} is damaged: {error}") from error
    return tensors


def _check_sizes(path: str | Path, found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuses what the tensors contradict before anything of that size is made.

    Raises:
        ArtefactError: an alias of no tensor, or a number that nothing stored is as large as.
    """
    loose = [name for name, owner in found["aliases"].items() if owner not in tensors]
    if loose:
        raise ArtefactError(f"artefact {path}: {MANIFEST} is damaged: aliases.{loose[0]} names no tensor of {TENSORS}")
    largest = max(_ROOM, sum(tensor.numel() for tensor in tensors.values()))
    for i, step in enumerate(found["steps"]):
        for number in _numbers(step["resolved"]):
            if not abs(number) <= largest:  # nor NaN
                raise ArtefactError(
                    f"artefact {path}: {MANIFEST} is damaged: steps[{i}].resolved has {_shown(number)}, but {TENSORS} has "
                    f"{largest:,} elements or fewer"
                )


def _numbers(values: Any) -> Iterator[float]:
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _numbers(value)
    elif isinstance(values, int | float):
        yield values


def _structure(path: str | Path, found: Mapping[str, Any], known: Mapping[str, Technique]) -> nn.Module:
    """Builds the compressed structure on the meta device."""
    try:
        model = models.skeleton(found["model"])
        for step in found["steps"]:
            technique = known.get(step["technique"])
            if technique is None:
                raise ArtefactError(f"artefact {path}: technique {step['technique']!r} {unknown(step['technique'])}")
            if technique.version != step["version"]:
                raise ArtefactError(
                    f"artefact {path}: made with version {step['version']} of {technique.name}, this is version "
                    f"{technique.version}, whose results differ; load it with the vitpareto that made it, or redo it"
                )
            model = technique.rebuild(model, step["resolved"])
    except ArtefactError:
        raise
    except Exception as error:  # a technique takes what it has resolved for granted; other values raise anything in it
        raise ArtefactError(f"artefact {path}: {MANIFEST} makes no model: {_shown(error)}") from error
    return model


def _assign(path: str | Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts ``tensors`` into ``model``, in place, and makes sure that nothing is left on the meta device."""
    expected = _non_persistent(model)
    loose = {name: tensors.pop(name) for name in expected if name in tensors}
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ArtefactError(f"artefact {path}: {TENSORS} does not fit the manifest: {error}") from error
    for name, tensor in loose.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, tensor)
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise ArtefactError(f"artefact {path}: no values for {', '.join(left)}")
