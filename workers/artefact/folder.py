"""The artefact, what a user would ship: a folder with ``model.safetensors`` and, written last, ``manifest.json``.

The manifest names the structure (the model's description and each step's *resolved* values), the safetensors file
holds every tensor once. Loading builds that structure on the meta device, lets each technique rebuild its part, and
assigns the tensors: no training, no calibration, no full-precision copy of a packed weight, no pickle.

Rules for modules that techniques put into a model: what they need afterwards is in the state dict (or in a
non-persistent buffer, which is stored too); what can be derived from it, as a kernel's packing, is a plain attribute.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from workers import models
from workers.node.storage import Storage, open_storage
from workers.techniques import registry, unknown
from workers.techniques.record import Technique
from workers.trial import canonical_json

SCHEMA = 1
"""Of the manifest; raised when a reader of an older version would read it wrongly."""

TENSORS = "model.safetensors"
MANIFEST = "manifest.json"


class ArtefactError(ValueError):
    """An artefact that is absent, damaged, or made by versions that this one does not know."""


# --- writing ----------------------------------------------------------------------------------------------------------


def pack(
    model: nn.Module,
    *,
    model_description: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Returns the files of the artefact in the order in which they must be written, the manifest last.

    Args:
        model: the compressed model.
        model_description: what :func:`workers.models.describe` gave for the model before compression.
        steps: in recipe order ``{"technique", "version", "resolved"}``.
        extra: more plain values for the manifest: preprocessing, class names.

    Raises:
        ArtefactError: the model holds a meta tensor.
        ValueError, TypeError: ``steps`` or ``extra`` are not plain JSON values.
    """
    stored, aliases = _unique(_tensors(model))
    data = safetensors.torch.save(stored)
    manifest = {
        "schema": SCHEMA,
        "model": dict(model_description),
        "steps": [dict(step) for step in steps],
        "tensors": {"file": TENSORS, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)},
        "aliases": aliases,
        "extra": dict(extra or {}),
    }
    return {TENSORS: data, MANIFEST: canonical_json(manifest).encode()}


def save_to(storage: Storage, prefix: str, files: Mapping[str, bytes]) -> None:
    """Writes the files of :func:`pack` under ``prefix``; the manifest comes last and commits the artefact."""
    for name in (TENSORS, MANIFEST):
        storage.put_atomic(f"{prefix}/{name}" if prefix else name, files[name])


def save(
    model: nn.Module,
    path: str | Path,
    *,
    model_description: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Packs ``model`` and writes it into the folder ``path`` (a path or an fsspec URL). See :func:`pack`."""
    files = pack(model, model_description=model_description, steps=steps, extra=extra)
    save_to(open_storage(path), "", files)


def _non_persistent(model: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that the state dict leaves out, by name."""
    persistent = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name not in persistent}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns every tensor that makes the model: state dict and non-persistent buffers, on the CPU."""
    tensors = {**model.state_dict(), **_non_persistent(model)}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ArtefactError(f"artefact: tensor {name} is on the meta device and has no values to store")
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def _unique(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Splits into tensors to store and {name: name of the stored one} for those that share its memory."""
    first: dict[tuple[Any, ...], str] = {}
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape))
        owner = first.setdefault(place, name) if tensor.numel() else name
        if owner != name:
            aliases[name] = owner
        else:  # a view of a larger storage is copied: safetensors stores no overlapping tensors
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            stored[name] = tensor if whole else tensor.clone()
    return stored, aliases


# --- reading ----------------------------------------------------------------------------------------------------------


def manifest(path: str | Path) -> dict[str, Any]:
    """Returns the manifest of the artefact at ``path`` (a folder or an fsspec URL).

    Raises:
        ArtefactError: there is none, it is damaged, or its schema is newer than this version knows.
    """
    where = f"artefact {path}"
    try:
        found = json.loads(open_storage(path).read(MANIFEST))
        schema = found["schema"]
    except FileNotFoundError as error:
        raise ArtefactError(f"{where}: no {MANIFEST}; it is no artefact, or its writing did not finish") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtefactError(f"{where}: {MANIFEST} is damaged: {error}") from error
    if schema != SCHEMA:
        raise ArtefactError(f"{where}: {MANIFEST} has schema {schema!r}, this version reads {SCHEMA}; update vitpareto")
    missing = {"model", "steps", "tensors", "aliases"} - set(found)
    if missing:
        raise ArtefactError(f"{where}: {MANIFEST} is damaged: it lacks {', '.join(sorted(missing))}")
    return found  # type: ignore[no-any-return]


def size_bytes(path: str | Path) -> int:
    """Returns the bytes of the artefact's files: tensors and manifest."""
    storage = open_storage(path)
    return sum(len(storage.read(name)) for name in (TENSORS, MANIFEST))


def load(
    path: str | Path, device: str | torch.device = "cpu", *, techniques: Mapping[str, Technique] | None = None
) -> nn.Module:
    """Loads the artefact at ``path`` (a folder or an fsspec URL) onto ``device``, in eval mode.

    Args:
        techniques: by name, those that its steps may be of; None for all that are installed.

    Returns:
        a model that takes float32 normalised images (B, C, H, W) and returns float32 logits (B, classes).

    Raises:
        ArtefactError: a file is absent, truncated or altered, or a technique is not known here in that version.
    """
    found = manifest(path)
    tensors = _read_tensors(path, found)
    model = _structure(path, found, registry() if techniques is None else techniques)
    placed = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
    placed |= {name: placed[owner] for name, owner in found["aliases"].items()}
    _assign(path, model, placed)
    return model.eval()


def _read_tensors(path: str | Path, found: Mapping[str, Any]) -> dict[str, Tensor]:
    where = f"artefact {path}: {TENSORS}"
    try:
        data = open_storage(path).read(TENSORS)
    except FileNotFoundError as error:
        raise ArtefactError(f"{where} is absent") from error
    expected = found["tensors"]
    if len(data) != expected["bytes"]:
        raise ArtefactError(f"{where} has {len(data)} bytes, the manifest says {expected['bytes']}; it is truncated")
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise ArtefactError(f"{where} is not what was saved: its SHA-256 differs from the manifest's")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ArtefactError(f"{where} is damaged: {error}") from error
    return tensors


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
    except (KeyError, models.ModelError, AttributeError, TypeError) as error:
        raise ArtefactError(f"artefact {path}: {MANIFEST} makes no model: {error!r}") from error
    return model


def _assign(path: str | Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts ``tensors`` into ``model``, in place, and makes sure that nothing is left on the meta device."""
    loose = {name: tensors.pop(name) for name in _non_persistent(model) if name in tensors}
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ArtefactError(f"artefact {path}: {TENSORS} does not fit the manifest: {error}") from error
    for name, tensor in loose.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, tensor)
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise ArtefactError(f"artefact {path}: no values for {', '.join(left)}")
