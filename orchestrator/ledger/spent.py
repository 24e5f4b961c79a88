"""What trials took: seconds of recovery training, and of all their work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.ledger.ledger import Ledger

WAITS = ("lane_wait", "stage_wait")
"""Parts of a trial's time in which it does nothing."""

Spent = dict[str, float]
"""Seconds: ``train``, of recovery trainings that were run and not found, and ``all``, of all work; waiting is in neither."""

NOTHING: Spent = {"train": 0.0, "all": 0.0}


def spent(attempt: Mapping[str, Any]) -> Spent:
    """Returns what one attempt took, from its row or result as plain values."""
    stages, seconds = attempt.get("stages") or (), attempt.get("seconds") or {}
    train = sum(s.get("duration_s", 0.0) for s in stages if s.get("kind") == "recovery" and not s.get("cached"))
    waited = sum(seconds.get(name, 0.0) for name in WAITS)
    return {"train": float(train), "all": max(float(attempt.get("duration_s") or 0.0) - waited, float(train))}


def spent_by_trial(ledger: Ledger, context: str) -> dict[str, Spent]:
    """Returns trial id to what its attempts took together, those that failed included."""
    found: dict[str, Spent] = {}
    for row in ledger.attempts(["trial_id", "context", "duration_s", "stages", "seconds"]).to_pylist():
        if row["context"] == context:
            parsed = {name: json.loads(row[name] or "null") for name in ("stages", "seconds")}
            add(found, row["trial_id"], spent({**row, **parsed}))
    return found


def add(found: dict[str, Spent], trial: str, more: Mapping[str, float]) -> None:
    """Adds seconds to those of a trial."""
    before = found.get(trial, NOTHING)
    found[trial] = {name: before[name] + more[name] for name in NOTHING}
