"""What every storage answers: yes, no, or that it cannot tell."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class StorageFault(OSError):
    """The storage gave no answer, or answered that it cannot: whether a file is there, or was written, is not known.

    That a file is absent is an answer, and another error: FileNotFoundError.
    """

    def __str__(self) -> str:
        return str(self.strerror or super().__str__())


class Storage(Protocol):
    """What the rest of the project may ask of a storage.

    Every call raises :class:`StorageFault` where the truth cannot be had, after its own retries: a storage that is not
    mounted, full, refuses access or does not answer is never an empty one.
    """

    url: str

    def put_atomic(self, name: str, data: bytes) -> None:
        """Writes ``name`` so that no reader ever sees part of it; replaces what was there."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Writes ``name`` unless it exists; True for the one writer that created it.

        Exactly once in meaning: where an answer was lost, or a client sent its request twice and was told that the file
        exists, who wrote it is looked up before this returns.
        """

    def read(self, name: str) -> bytes:
        """Returns the bytes of ``name``; raises FileNotFoundError."""

    def files(self, prefix: str) -> list[str]:
        """Returns the names of the files directly in the folder ``prefix``, sorted; [] where there is none."""

    def folders(self, prefix: str) -> list[str]:
        """Returns the names of the folders directly in the folder ``prefix`` ("" for the root), sorted."""

    def exists(self, name: str) -> bool:
        """Says whether the file ``name`` is there."""

    def delete(self, name: str) -> None:
        """Removes ``name``; no error where it is already gone."""

    def local(self, name: str) -> Path | None:
        """Returns the path of ``name`` on this machine's disk, or None where the storage has no such thing."""


def check_name(name: str) -> str:
    """Returns ``name``; raises ValueError where it leads out of the storage."""
    if ".." in name.split("/") or name.startswith("/"):
        raise ValueError(f"storage name {name!r} leaves the storage; use a relative name without '..'")
    return name
