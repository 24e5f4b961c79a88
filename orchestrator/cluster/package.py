"""What a submitted job's working directory holds, and whether the cluster would take it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

EXCLUDES = (".git", ".venv", "venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", "results")
"""Never sent, besides what .gitignore and .rayignore name."""


class SubmitError(Exception):
    """A job that could not be sent or asked after; one line that names the place and the remedy."""


class SubmitRefused(SubmitError):
    """The request itself is wrong; nothing was asked of the cluster."""


def shipped_files(working_dir: Path, excludes: Sequence[str] = EXCLUDES) -> dict[str, int]:
    """Returns the files that Ray would send, relative path to size in bytes.

    It is Ray's own walk (.gitignore and .rayignore of every folder included): another one would count other files.
    """
    from ray._private.runtime_env import packaging

    sizes: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(working_dir))] = path.stat().st_size

    ignore_git = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    matcher = packaging._get_excludes(working_dir, list(excludes))
    packaging._dir_travel(
        working_dir, [matcher], note, include_gitignore=ignore_git, logger=logging.getLogger(__name__)
    )
    return sizes


def zip_bytes(sizes: Mapping[str, int]) -> int:
    """Returns the size of Ray's archive of these files: stored, not compressed; 76 bytes and the name twice a file."""
    return sum(size + 76 + 2 * len(name.encode()) for name, size in sizes.items()) + 22


def check_package(working_dir: Path, study: str, *, limit: int | None = None) -> None:
    """Refuses a working directory that the cluster would refuse, or one whose package would lack the study.

    Args:
        study: path of the study file relative to ``working_dir``.
        limit: bytes that the head accepts; None takes Ray's constant.

    Raises:
        SubmitError: it is too large (with the largest files), or the study is excluded.
    """
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    limit = limit or int(DASHBOARD_CLIENT_MAX_SIZE)
    sizes = shipped_files(working_dir)
    if study not in sizes:
        raise SubmitError(f"{working_dir}: {study} would not be sent; .gitignore, .rayignore or EXCLUDES names it")
    total = zip_bytes(sizes)
    if total >= limit:
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
        listed = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in largest)
        raise SubmitError(
            f"{working_dir}: {total / 2**20:.1f} MiB to send, the cluster takes less than {limit / 2**20:.0f} MiB; "
            f"largest: {listed}; name what the job does not need in .rayignore, and put data on the shared storage"
        )
