"""What a node remembers of data: decoded images, and digests of files that are read once as long as none is touched."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from workers.node.private_folder import private_folder
from workers.tasks.task_info import TaskError

Result = TypeVar("Result")


def threads() -> int:
    """Returns how many threads read and decode files at once: as many as this process has cores, at most 32."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(32, cores)


@contextmanager
def locked(key: str) -> Iterator[None]:
    """One process of this node at a time; the kernel releases it for a process that dies."""
    with (cache_folder() / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def in_threads(work: Callable[..., Result], calls: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
    """Yields ``work(*call)`` of each call in their order, a bounded number ahead; what one raises ends the others."""
    count = threads()
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(count, "images")
    try:
        for call in calls:
            waiting.append(pool.submit(work, *call))
            if len(waiting) > 4 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def file_digest(file: Path) -> str:
    """Returns the SHA-256 of a file, remembered in the node's cache by path, size and modification time."""
    return remembered([stamp(file, file.resolve())], lambda: _sha256(file))


def folder_digest(root: Path, files: list[Path]) -> str:
    """Returns 16 digits that name the files' content and places below ``root``; read once as long as none is touched."""

    def read() -> str:
        with ThreadPoolExecutor(threads()) as pool:
            content = pool.map(_sha256, files)
            listing = [[str(f.relative_to(root)), digest] for f, digest in zip(files, content, strict=True)]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]

    return remembered([str(root.resolve()), *(stamp(f, f.relative_to(root)) for f in files)], read)


def stamp(file: Path, name: Path) -> str:
    found = file.stat()
    return f"{name} {found.st_size} {found.st_mtime_ns}"


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise TaskError(f"{file}: must be readable: {error.strerror or error}") from error


def remembered(stamps: Iterable[str], calculate: Callable[[], str]) -> str:
    """Returns what was calculated for these stamps before, on this node, or calculates it."""
    key = hashlib.sha256()
    for stamp in stamps:
        key.update(os.fsencode(f"{stamp}\n"))  # names of files may be in any encoding
    note = cache_folder() / f"{key.hexdigest()[:32]}.sha256"
    if note.is_file():
        return note.read_text()
    value = calculate()
    write_atomic(note, lambda temporary: temporary.write_text(value))
    return value


def cache_folder() -> Path:
    """The node-local folder of decoded images: ``VITPARETO_CACHE``, or a private one in the temporary folder."""
    return private_folder("cache", "VITPARETO_CACHE")


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
