"""Node-local folders that belong to one user: locks, decoded images."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def private_folder(purpose: str, variable: str) -> Path:
    """Returns ``<temporary folder>/vitpareto-<purpose>-<user id>``, or the folder named by the environment variable.

    Raises:
        PermissionError: the default folder belongs to somebody else, is a link, or others may enter it: in a shared
            temporary folder anybody could have put it there. A folder named by the variable is the user's own choice.
    """
    chosen = os.environ.get(variable)
    if chosen:
        folder = Path(chosen)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder
    folder = Path(tempfile.gettempdir()) / f"vitpareto-{purpose}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(
            f"{folder}: must be a folder of user {os.getuid()} with mode 0700, found user {found.st_uid} with mode "
            f"{stat.S_IMODE(found.st_mode):04o}; remove it, or set {variable} to a folder of your own"
        )
    return folder
