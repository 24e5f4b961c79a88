"""Exports a trial's model into a folder of its own: the files, ``export.json``, and a model card ``README.md``.

The folder appears whole or not at all. What is written, by which format, and how it is checked: :mod:`workers.artefact.export`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.export.model_card import model_card
from orchestrator.ledger.show import find_trial
from orchestrator.ledger.studies import open_ledger
from workers.artefact.export_formats import ExportFailed, ExportFormat, ExportRefused

if TYPE_CHECKING:
    from orchestrator.ledger import Ledger
    from workers.artefact.export import Images, Parity

SCHEMA = 1
"""Of ``export.json``; raised when a key changes its meaning."""

RECORD, CARD = "export.json", "README.md"

_PACKAGES = {
    ExportFormat.artefact: ("vitpareto", "torch", "timm"),
    ExportFormat.torch_export: ("vitpareto", "torch", "timm"),
    ExportFormat.onnx: ("vitpareto", "torch", "timm", "onnx", "onnxscript", "onnxruntime"),
}
"""Packages whose versions the record states."""


_PREPROCESSING = frozenset({"image_size", "in_chans", "mean", "std"})
"""What an export needs to know of an artefact's inputs."""


@dataclass(frozen=True)
class Exported:
    """An export that is in place.

    Attributes:
        record: what ``export.json`` holds.
        data_fault: why the study's data could not be read; the export was then compared on noise.
    """

    folder: Path
    record: Mapping[str, Any]
    data_fault: str | None


def export_trial(
    name: str,
    trial: str,
    out: str | Path,
    *,
    format: ExportFormat | str = ExportFormat.artefact,
    storage: str | Path = "results",
    overwrite: bool = False,
) -> Exported:
    """Exports the model of a trial, checked against its artefact, with a model card beside it.

    Args:
        name: of the study.
        trial: id of the trial, or the start of it.
        out: folder to make; it may exist if it is empty.
        format: ``artefact``, ``torch-export`` or ``onnx``.
        storage: folder or URL of an object store of the results.
        overwrite: replaces an earlier export in ``out``; a folder that is none is never replaced.

    Raises:
        ExportRefused: the trial has no model, ``out`` is in the way, a package is missing, or the format cannot carry the
            model; the message says what to do.
        ExportFailed: the file cannot be made, or does not compute what the artefact does. Nothing is left behind.
        LookupError: there is no such study or trial.
    """
    kind, target = ExportFormat(format), _target(out, overwrite)
    ledger = open_ledger(name, storage)
    row = find_trial(ledger, trial)
    if row["artefact"] is None:
        raise ExportRefused(
            f"trial {row['trial_id']} of {name} has no model: its status is {row['status']}, must be ok; "
            f"vitpareto show {name} {row['trial_id']} says why"
        )
    from workers import artefact  # these import torch, which a refusal need not wait for
    from workers.artefact import export

    source = f"{ledger.storage.url}/{row['artefact']}"
    try:
        manifest = artefact.manifest(source)
        preprocessing = (manifest.get("extra") or {}).get("preprocessing")
        if not isinstance(preprocessing, Mapping) or not preprocessing.keys() >= _PREPROCESSING:
            raise artefact.ArtefactError(
                f"{source}: {artefact.MANIFEST} is damaged: it does not say how images are prepared"
            )
        images = export.search_images(row["spec"]["context"]["data"], preprocessing)
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        made.mkdir()
        try:
            parity = export.write(source, kind, made, images)
            record = _record(row, kind, made, manifest, images, parity)
            _describe(made, record, row, ledger)
            _replace(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except artefact.ArtefactError as error:
        raise ExportFailed(f"trial {row['trial_id']} of {name}: {error}") from error
    return Exported(target, record, images.fault)


# --- the folder -------------------------------------------------------------------------------------------------------


def _target(out: str | Path, overwrite: bool) -> Path:
    """Returns the folder to make, after refusing what is in the way."""
    if "://" in str(out):
        raise ExportRefused(f"OUT {out}: must be a folder on this machine; copy it from there")
    target = Path(out).expanduser().resolve()
    if not target.exists():
        return target
    if not target.is_dir():
        raise ExportRefused(f"OUT {out}: must be a folder, it is a file; name another one")
    if any(target.iterdir()):
        if not (target / RECORD).is_file():
            raise ExportRefused(
                f"OUT {out}: must be a new or an empty folder, or an earlier export; it holds no {RECORD}, so it is "
                "something else; name another one"
            )
        if not overwrite:
            raise ExportRefused(
                f"OUT {out}: holds an export already; name another folder, or replace it with --overwrite"
            )
    return target


def _replace(made: Path, target: Path) -> None:
    """Puts the finished folder in place; an earlier export steps aside first and comes back if that fails."""
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(made, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


# --- what is written beside the model ---------------------------------------------------------------------------------


def _record(
    row: Mapping[str, Any],
    kind: ExportFormat,
    folder: Path,
    manifest: Mapping[str, Any],
    images: Images,
    parity: Parity,
) -> dict[str, Any]:
    """Returns what ``export.json`` holds: plain values, sizes in bytes, time in UTC."""
    preprocessing = manifest["extra"]["preprocessing"]
    side, channels = preprocessing["image_size"], preprocessing["in_chans"]
    return {
        "schema": SCHEMA,
        "format": kind.value,
        "study": row["study"],
        "trial_id": row["trial_id"],
        "attempt_id": row["attempt_id"],
        "label": row["label"],
        "files": {file.name: _file(file) for file in sorted(folder.iterdir())},
        "input": {
            "name": "pixel_values" if "text" in preprocessing else "images",
            "shape": ["batch", *([2] if preprocessing.get("task") == "nlvr2" else []), channels, side, side],
            "dtype": "float32",
            "preprocessing": preprocessing,
        },
        "output": {
            "name": "logits",
            "shape": ["batch", manifest["model"]["create"]["num_classes"]],
            "dtype": "float32",
        },
        "class_names": None if images.class_names is None else list(images.class_names),
        "parity": parity.to_dict(),
        "versions": {
            p: _version(p) for p in (*_PACKAGES[kind], *(["transformers"] if "text" in preprocessing else []))
        },
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _describe(folder: Path, record: Mapping[str, Any], row: dict[str, Any], ledger: Ledger) -> None:
    """Writes the record and the model card."""
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    measured = [
        {**m, "conditions": json.loads(m["conditions"] or "{}")}
        for m in ledger.measurements().to_pylist()
        if m["trial_id"] == row["trial_id"] and m["attempt_id"] in (row["attempt_id"], None, "")
    ]
    (folder / CARD).write_text(model_card(row, record, measured, _strong_baseline(ledger, row["context"])))


def _strong_baseline(ledger: Ledger, context: str) -> dict[str, Any]:
    """Returns what the context's baseline row says of the strong baseline; empty where no speed was measured."""
    for row in ledger.trials(["is_baseline", "status", "context", "conditions"]).to_pylist():
        if row["is_baseline"] and row["status"] == "ok" and row["context"] == context:
            return dict(json.loads(row["conditions"] or "{}").get("strong_baseline") or {})
    return {}
