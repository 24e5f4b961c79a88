"""What says of an error that the storage is at fault and not the recipe, and whether this node sees a study's storage at all."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from workers.node.storage import Storage, StorageFault, open_storage

EXIT_STATUS = 74
"""Of a process started by a trial that ended because the storage is at fault (EX_IOERR of sysexits.h)."""

_NAMES = """
    ENOSPC EDQUOT
    EIO EREMOTEIO EBADMSG EUCLEAN EROFS
    ENODEV ENXIO ENOMEDIUM ENOTCONN ESHUTDOWN ESTALE ENOLINK ENOLCK
    ETIMEDOUT ECONNREFUSED ECONNRESET ECONNABORTED EHOSTDOWN EHOSTUNREACH ENETDOWN ENETRESET ENETUNREACH
    EACCES EPERM EISDIR ENOTDIR ELOOP
"""
ERRNOS = frozenset(getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name))
"""What a file system answers when it is full, broken, gone, unreachable, closed or in disorder: nothing that a recipe changes."""


class StorageNotSeen(Exception):
    """This node does not see the study's storage."""


def storage_fault(error: BaseException) -> bool:
    """Says whether ``error``, or what it was raised from, is a fault of the storage."""
    return any(
        isinstance(one, StorageFault | ConnectionError) or (isinstance(one, OSError) and one.errno in ERRNOS)
        for one in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__


def in_a_line(error: BaseException) -> str:
    """Returns what happened as one line for a person: the file and the system's words, or the error's own first line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def check_seen(storage: Storage, study: str, token: str) -> None:
    """Checks that ``storage``, opened on this node, is the one of the study; nothing is written. "" as a token asks nothing.

    Raises:
        StorageNotSeen: the study's token is absent here, closed to this process, or another one.
        StorageFault, OSError: the storage does not answer.
    """
    if not token:
        return
    try:
        seen = json.loads(storage.read(f"{study}/study.json"))["token"]
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError, KeyError, TypeError):
        seen = ""
    if seen != token:
        raise StorageNotSeen(
            f"{socket.gethostname()} does not see the study's storage {storage.url!r}: use a path that every node "
            "mounts, or an object store URL"
        )


def why_not_seen(url: str, study: str, token: str) -> str | None:
    """Returns why this node does not see a study's storage; None where it does, or where that cannot be told now."""
    try:
        check_seen(open_storage(url), study, token)
    except StorageNotSeen as error:
        return str(error)
    except OSError:
        return None  # trials that run here will meet it
    return None


# --- processes that a trial starts ------------------------------------------------------------------------------------


@contextmanager
def fault_as_exit_status() -> Iterator[None]:
    """Ends this process with :data:`EXIT_STATUS` where the storage is at fault; the reason goes to stderr."""
    try:
        yield
    except Exception as error:
        if not storage_fault(error):
            raise
        print(f"{type(error).__name__}: {in_a_line(error)}", file=sys.stderr)
        raise SystemExit(EXIT_STATUS) from None


def check_child(done: subprocess.CompletedProcess[str]) -> None:
    """Raises StorageFault where a process of :func:`fault_as_exit_status` says that the storage is at fault."""
    if done.returncode == EXIT_STATUS:
        raise StorageFault((done.stderr.strip().splitlines() or ["a process could not read the storage"])[-1])
