"""Where a study lives: one small interface over a local folder or any fsspec URL.

Four calls carry everything: ``put_atomic`` (a reader sees the old bytes or the new, never a part), ``put_if_absent`` (exactly
one of several writers wins: leases), ``read`` and ``files``. Names are relative, ``/``-separated paths.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol


class Storage(Protocol):
    """What the rest of the project may ask of a storage."""

    url: str

    def put_atomic(self, name: str, data: bytes) -> None:
        """Writes ``name`` so that no reader ever sees part of it; replaces what was there."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Writes ``name`` unless it exists; True for the one writer that created it."""

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


class LocalStorage:
    """A folder, on one machine or on a file system that all nodes share."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)

    def _path(self, name: str) -> Path:
        path = self.root / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"storage name {name!r} leaves the storage; use a relative name without '..'")
        return path

    def _write_temporary(self, name: str, data: bytes) -> tuple[Path, Path]:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return path, temporary

    def put_atomic(self, name: str, data: bytes) -> None:
        path, temporary = self._write_temporary(name, data)
        os.replace(temporary, path)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        path, temporary = self._write_temporary(name, data)
        try:
            os.link(temporary, path)  # atomic and fails if the name exists, on NFS too
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def files(self, prefix: str) -> list[str]:
        try:
            with os.scandir(self._path(prefix)) as entries:
                names = [e.name for e in entries if not e.name.startswith(".") and e.is_file()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(names)

    def folders(self, prefix: str) -> list[str]:
        try:
            with os.scandir(self._path(prefix)) as entries:
                return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def local(self, name: str) -> Path | None:
        return self._path(name)


class FsspecStorage:
    """Any fsspec file system (s3://, gs://, memory://).

    Object stores write whole objects atomically; ``put_if_absent`` uses fsspec's exclusive ``create`` mode, which s3fs and
    the in-memory file system implement with a conditional write.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        self._fs: Any
        self._fs, self._root = fsspec.core.url_to_fs(self.url)

    def _path(self, name: str) -> str:
        if ".." in name.split("/") or name.startswith("/"):
            raise ValueError(f"storage name {name!r} leaves the storage; use a relative name without '..'")
        return f"{self._root}/{name}"

    def put_atomic(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(name), data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        try:
            self._fs.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def read(self, name: str) -> bytes:
        return bytes(self._fs.cat_file(self._path(name)))

    def files(self, prefix: str) -> list[str]:
        return sorted(self._names(prefix, "file"))

    def folders(self, prefix: str) -> list[str]:
        return sorted(self._names(prefix, "directory"))

    def _names(self, prefix: str, kind: str) -> Iterator[str]:
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._path(prefix), detail=True)
        except FileNotFoundError:
            return
        for entry in entries:
            name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
            if entry["type"] == kind and not name.startswith("."):
                yield name

    def exists(self, name: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.isfile(self._path(name)))

    def delete(self, name: str) -> None:
        if self.exists(name):
            self._fs.rm_file(self._path(name))

    def local(self, name: str) -> Path | None:
        return None


def open_storage(url: str | Path) -> Storage:
    """Returns the storage at a path or URL (``results``, ``/shared/sweeps``, ``s3://bucket/sweeps``)."""
    text = str(url)
    if "://" in text and not text.startswith("file://"):
        return FsspecStorage(text)
    return LocalStorage(text.removeprefix("file://"))
