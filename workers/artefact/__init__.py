"""The artefact: what ships, written and loaded; whether a reload computes the same; exports.

To use a model: ``from workers import artefact; model = artefact.load(folder)``. Names are loaded on first use, so that what
only asks which formats there are (:mod:`workers.artefact.export_formats`) imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.artefact.folder import (
        MANIFEST,
        SCHEMA,
        TENSORS,
        ArtefactDamaged,
        ArtefactError,
        contents,
        files,
        load,
        manifest,
        manifest_bytes,
        pack,
        save,
        save_to,
        size_bytes,
        tensors_name,
        verify,
    )

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "TENSORS",
    "ArtefactDamaged",
    "ArtefactError",
    "contents",
    "files",
    "load",
    "manifest",
    "manifest_bytes",
    "pack",
    "save",
    "save_to",
    "size_bytes",
    "tensors_name",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from workers.artefact import folder  # imports torch

    return getattr(folder, name)
