"""What was measured of an artefact in a study, kept beside it: the answer to another recipe that proves to ship the same one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from workers.node.conditions import device_name
from workers.stages.graph import prefix
from workers.stages.workbench import Workbench
from workers.trial import Measurement, TrialSpec, digest


@dataclass(frozen=True)
class Answer:
    """Metrics, conditions and measurements of the trial ``trial_id``."""

    trial_id: str
    metrics: Mapping[str, float]
    conditions: Mapping[str, Any]
    measurements: Sequence[Measurement]


def known_answer(bench: Workbench, spec: TrialSpec, key: str) -> Answer | None:
    """Returns what another trial of the same study found of the artefact ``key`` on such a device, None where none has.

    A trial that is run again is measured again.
    """
    try:
        found = json.loads(bench.storage.read(_name(bench, spec, key)))
        answer = Answer(**{**found, "measurements": [Measurement.from_dict(m) for m in found["measurements"]]})
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # absent, or damaged
        return None
    return None if answer.trial_id == spec.trial_id else answer


def keep_answer(bench: Workbench, spec: TrialSpec, key: str, answer: Answer) -> None:
    """Keeps what a trial found, unless another one was first."""
    bench.storage.put_if_absent(_name(bench, spec, key), json.dumps(asdict(answer)).encode())


def _name(bench: Workbench, spec: TrialSpec, key: str) -> str:
    """Speeds are in units of the study's own baseline, so the study is part of the question."""
    asked = [spec.study, spec.storage_token, spec.context.digest, sorted(spec.objectives), device_name(bench.device)]
    return f"{prefix(key)}/answers/{digest(asked)}.json"
