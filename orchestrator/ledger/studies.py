"""Opens what is stored: the storage that a person named, the studies in it, and the ledger of one. Imports no torch, no ray."""

from __future__ import annotations

from pathlib import Path

from orchestrator.ledger.ledger import Ledger
from workers.node.storage import Storage, open_storage


class StorageError(Exception):
    """The storage cannot be one; the message says why and what to do."""


class StudyNotFound(LookupError):
    """The storage holds no study of that name."""


def find_storage(storage: str | Path) -> Storage:
    """Returns the storage at a path or URL; a folder that does not exist yet is an empty one.

    Raises:
        StorageError: the path is a file, or leads through one.
    """
    try:
        store = open_storage(storage)
    except ValueError as error:
        raise StorageError(str(error)) from None
    root = store.local("")
    file = next((p for p in (root, *root.parents) if p.exists() and not p.is_dir()), None) if root is not None else None
    if file is not None:
        raise StorageError(
            f"storage {storage}: must be a folder, but {file} is a file; name another one with --storage"
        )
    return store


def study_names(storage: Storage) -> list[str]:
    """Returns the names of the studies in a storage, sorted."""
    return [n for n in storage.folders("") if storage.exists(f"{n}/study.json")]


def find_damaged(name: str, storage: str | Path) -> Storage:
    """Returns the storage that holds a study, whatever state its files are in.

    Raises:
        StudyNotFound, StorageError: as :func:`open_ledger` does.
    """
    store = find_storage(storage)
    try:
        there = any(store.files(f"{name}/{folder}".rstrip("/")) for folder in ("", "ledger", "attempts"))
    except ValueError:  # a name that leaves the storage
        there = False
    if not there or not name:
        raise _not_found(name, store)
    return store


def _not_found(name: str, store: Storage) -> StudyNotFound:
    known = ", ".join(study_names(store)[:10]) or "none"
    return StudyNotFound(f"there is no study {name!r} in {store.url}; studies there: {known}")


def open_ledger(name: str, storage: str | Path = "results") -> Ledger:
    """Opens the ledger of a study for reading, with the study's own constraints and context.

    Args:
        name: of the study.
        storage: folder or URL of an object store of the results.

    Raises:
        StudyNotFound: there is no such study.
        StorageError: ``storage`` is a file.
        LedgerError: the study's record is damaged.
    """
    store = find_storage(storage)
    try:
        stored = Ledger(store, name).study_record()
    except ValueError:  # a name that leaves the storage
        stored = None
    if stored is None:
        raise _not_found(name, store)
    return Ledger(store, name, stored["config"]["constraints"], stored["context"])
