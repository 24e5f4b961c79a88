"""The result of a trial whose worker is gone, written in its name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from workers.trial import TrialResult, TrialSpec


def lost_trial(spec: TrialSpec, status: str, reason: str, seen: Mapping[str, Any]) -> TrialResult:
    """Returns how a lost trial ended.

    Args:
        status: one of the failure classes.
        seen: where it ran, as far as it had started.
    """
    started = float(seen.get("started_at", time.time()))
    return TrialResult(
        trial_id=spec.trial_id,
        attempt_id=f"{status}-{time.time_ns():x}",
        status=status,
        failure=reason,
        metrics={},
        started_at=started,
        duration_s=max(0.0, time.time() - started),
        provenance={"host": seen.get("host"), "pid": seen.get("pid"), "context": spec.context.digest},
    )
