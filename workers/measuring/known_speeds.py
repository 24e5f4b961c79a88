"""Speeds that were measured already: of a model that runs the same kernels on the same shapes, on such a device, in this study.

They lie beside the uncompressed model, ``stages/<baseline>/speeds/<digest>.json``, under a digest of all that they depend on. What is
taken over is the first one's number, not a second sample of it: the row says ``speed_of``, and has no record of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from workers.metrics import DEVICE_BOUND
from workers.node.conditions import device_conditions
from workers.stages.graph import prefix
from workers.stages.workbench import Workbench
from workers.trial import TrialSpec, digest

RUNTIME = "pytorch"
"""What executes the timed models."""


@dataclass(frozen=True)
class KnownSpeed:
    """What the trial ``trial_id`` measured of such a model: metrics with their intervals."""

    trial_id: str
    metrics: Mapping[str, float]


def question(bench: Workbench, spec: TrialSpec, structure: str, unit: Sequence[object]) -> str:
    """Returns the storage name under which the speeds lie that answer a trial.

    Args:
        structure: of the timed model, see :mod:`workers.measuring.structure`.
        unit: the strong baselines that the speeds are multiples of.
    """
    around = {name: value for name, value in device_conditions(bench.device).items() if name != "clock_mhz"}
    asked = [
        [
            spec.study,
            spec.storage_token,
            spec.context.digest,
        ],  # protocol, threads, compiling, resolution are in the context
        sorted(DEVICE_BOUND & set(spec.objectives)),
        [around, torch.backends.cpu.get_cpu_capability(), RUNTIME],
        list(unit),
        structure,
    ]
    return f"{prefix(bench.baseline_key)}/speeds/{digest(asked)}.json"


def known_speed(bench: Workbench, spec: TrialSpec, name: str) -> KnownSpeed | None:
    """Returns what another trial measured, None where none has. A trial that is run again is measured again."""
    try:
        found = KnownSpeed(**json.loads(bench.storage.read(name)))
    except (FileNotFoundError, ValueError, TypeError):  # absent, or damaged
        return None
    return None if found.trial_id == spec.trial_id else found


def keep_speed(bench: Workbench, spec: TrialSpec, name: str, metrics: Mapping[str, Any]) -> None:
    """Keeps what a trial measured, unless another one was first."""
    found = KnownSpeed(spec.trial_id, dict(metrics))
    bench.storage.put_if_absent(name, json.dumps(asdict(found)).encode())
