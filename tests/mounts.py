"""File systems that a test mounts, fills, makes read-only and takes away."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Mount:
    """A file system in memory, mounted over a folder."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder, self.size = folder, size
        folder.mkdir(parents=True, exist_ok=True)

    def mount(self) -> bool:
        """Mounts it empty; False where this process may not."""
        done = _run("mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", str(self.folder))
        return done.returncode == 0

    def remount(self, *options: str) -> None:
        """Changes options of the mount, such as ``ro`` or ``size=1m``."""
        _run("mount", "-o", ",".join(("remount", *options)), str(self.folder)).check_returncode()

    def unmount(self) -> None:
        """Takes it away, from under whoever has files open in it."""
        _run("umount", "--lazy", str(self.folder))

    def fill(self) -> Path:
        """Fills it to the last byte and returns the file that does."""
        filler = self.folder / "filler"
        with filler.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                return filler


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


@contextmanager
def mounted(folder: Path, size: str = "1m") -> Iterator[Mount]:
    """Gives a mounted file system; the test is skipped where mounting needs rights that it lacks."""
    made = Mount(folder, size)
    if not made.mount():
        pytest.skip("mounting a file system needs the rights of root")
    try:
        yield made
    finally:
        made.unmount()
