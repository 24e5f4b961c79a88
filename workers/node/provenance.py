"""Where a row comes from: which code ran on which machine, from which data and seeds. Never raises: it belongs to failures too."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from workers.node.conditions import cpu_flags, device_name, driver
from workers.trial import TrialSpec

PACKAGES = ("vitpareto", "torch", "torchvision", "timm", "transformers", "torchao", "numpy", "safetensors")
"""Packages that a number may depend on."""

GIT_TIMEOUT_S = 10.0


def provenance(spec: TrialSpec, attempt_id: str) -> dict[str, Any]:
    """Returns where the numbers of a trial that runs here and now come from, as plain values.

    ``git_commit`` and ``git_dirty`` are None where the code does not lie in a repository; ``driver`` and ``cuda`` where none
    is installed; ``device_name`` where the device cannot be asked.
    """
    context = spec.context
    return {
        "attempt": attempt_id,
        "versions": dict(_versions()),
        **_git(),
        **_machine(context.device),
        "threads": torch.get_num_threads(),
        "seeds": {
            "trial": spec.seed,
            "baseline": context.training.get("baseline", {}).get("seed", 0),
            "split": context.data.get("split_seed", 0),
        },
        "data_digest": context.data.get("digest"),
        "checkpoint_digest": context.model.get("checkpoint_digest"),
        "context": context.digest,
        "protocol": context.measurement.get("protocol"),
    }


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"torch": str(torch.__version__)}  # with its build, which the package index leaves out


@cache
def _machine(device: str) -> dict[str, Any]:
    try:
        name: str | None = device_name(torch.device(device))
    except (RuntimeError, AssertionError):  # a CUDA trial on a machine without CUDA
        name = None
    return {
        "device_name": name,
        "driver": driver(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": " ".join(cpu_flags()),
        "host": socket.gethostname(),
        "platform": platform.platform(),
    }


@cache
def _git() -> dict[str, Any]:
    """Returns the commit of the code as the process found it first, and whether the tree differed from it."""
    folder = Path(__file__).parents[2]
    found: dict[str, Any] = {"git_commit": None, "git_dirty": None}
    if (folder / ".git").exists():
        found["git_commit"] = (_ask_git(folder, "rev-parse", "HEAD") or "").strip() or None
    if found["git_commit"] is not None:
        changes = _ask_git(folder, "status", "--porcelain")
        found["git_dirty"] = None if changes is None else bool(changes.strip())
    return found


def _ask_git(folder: Path, *arguments: str) -> str | None:
    """Returns what git says; None where there is no git, or it refuses or hangs."""
    # Workers ask at once: without this each would refresh, and lock, the index.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=GIT_TIMEOUT_S, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
