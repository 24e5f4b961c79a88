"""A driver of trials that take next to no time: ``python -m tests.short_trials STUDY_FILE STORAGE``, in a process to be killed."""

from __future__ import annotations

import secrets
import sys
import time

from workers.trial import TrialResult, TrialSpec


def trial(spec: TrialSpec) -> TrialResult:
    """Ends after a hundredth of a second, with numbers that follow from the recipe."""
    time.sleep(0.01)
    value = int(spec.recipe.hash[:4], 16) / 700.0
    metrics = {"top1_pct": value, "size_bytes": 1000.0 + value}
    return TrialResult(spec.trial_id, secrets.token_hex(6), "ok", None, metrics, time.time(), 0.01)


def main() -> None:
    """Runs the study to its end."""
    from orchestrator.study.load import load_study
    from orchestrator.sweep.driver import run_study

    file, storage = sys.argv[1:]
    run_study(load_study(file), storage=storage, quiet=True, runner="tests.short_trials:trial")


if __name__ == "__main__":
    main()
