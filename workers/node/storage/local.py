"""A storage in a folder."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from workers.node.storage.contract import StorageFault, check_name

_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


class LocalStorage:
    """A folder, on one machine or on a file system that all nodes share.

    The folder is remembered by device and inode once it was seen. One that is gone or another one later (a lost mount shows
    the empty folder below it) answers nothing: every call then raises StorageFault.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)
        self._seen: tuple[int, int] | None = None

    def put_atomic(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with self._answers(name), self._temporary(path, data) as temporary:
            os.replace(temporary, path)
            _sync_folder(path.parent)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        with self._answers(name), self._temporary(path, data) as temporary:
            try:
                os.link(temporary, path)  # atomic and fails if the name exists, on NFS too
            except OSError as error:
                # NFS sends a request again whose answer was lost, and is told that the name exists: the file that was linked
                # knows how many names it has (open(2), O_EXCL).
                if temporary.stat().st_nlink != 2:
                    if isinstance(error, FileExistsError):
                        return False
                    if error.errno in _NO_LINKS:
                        raise StorageFault(
                            f"{self.root}: its file system has no hard links; use another folder"
                        ) from None
                    raise
            _sync_folder(path.parent)
            return True

    def read(self, name: str) -> bytes:
        path = self._path(name)
        with self._answers(name):
            return path.read_bytes()

    def files(self, prefix: str) -> list[str]:
        return self._names(prefix, os.DirEntry.is_file)

    def folders(self, prefix: str) -> list[str]:
        return self._names(prefix, os.DirEntry.is_dir)

    def exists(self, name: str) -> bool:
        path = self._path(name)
        try:
            with self._answers(name):
                return stat.S_ISREG(path.stat().st_mode)
        except FileNotFoundError:
            return False

    def delete(self, name: str) -> None:
        path = self._path(name)
        with self._answers(name), suppress(FileNotFoundError):
            path.unlink()

    def local(self, name: str) -> Path | None:
        return self._path(name)

    def _path(self, name: str) -> Path:
        return self.root / check_name(name)

    def _names(self, prefix: str, kind: Callable[[os.DirEntry[str]], bool]) -> list[str]:
        path = self._path(prefix)
        try:
            with self._answers(prefix), os.scandir(path) as entries:
                return sorted(entry.name for entry in entries if not entry.name.startswith(".") and kind(entry))
        except FileNotFoundError:
            return []

    @contextmanager
    def _temporary(self, path: Path, data: bytes) -> Iterator[Path]:
        """Gives a file of ``data`` beside ``path``, which is gone after the block, whatever happens."""
        self._check_root()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _answers(self, name: str) -> Iterator[None]:
        """Lets FileNotFoundError through where the folder of the storage is there; every other error is a StorageFault."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            raise FileNotFoundError(f"{self.root / name} does not exist") from None
        except StorageFault:
            raise
        except OSError as error:
            raise StorageFault(error.errno, f"{self.root / name}: {error.strerror or error}") from error
        if self._seen is None:
            self._check_root()

    def _check_root(self) -> None:
        """Raises StorageFault where the folder was there once and now is gone or another one."""
        try:
            found = self.root.stat()
        except (FileNotFoundError, NotADirectoryError):
            now = None
        except OSError as error:
            raise StorageFault(error.errno, f"{self.root}: {error.strerror or error}") from error
        else:
            now = (found.st_dev, found.st_ino)
        if self._seen is None:
            self._seen = now
        elif now != self._seen:
            what = "is gone" if now is None else "is another folder than before"
            raise StorageFault(f"{self.root} {what}: was its file system unmounted, or the folder replaced?")


def _sync_folder(folder: Path) -> None:
    """Makes a name in ``folder`` survive a power failure, where the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
