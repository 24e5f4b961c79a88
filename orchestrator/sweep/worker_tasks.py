"""What workers are asked after the search. By itself, so that they import neither Optuna nor DuckDB for it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from workers.run import run_remeasure, run_report
from workers.trial import TrialSpec


def measure_again(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures a finished trial once more: a spec and measurements as dicts, see :func:`workers.run.run_remeasure`."""
    return [asdict(found) for found in run_remeasure(TrialSpec.from_dict(values))]


def report(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Evaluates a finished trial on the report split: a spec and measurements as dicts, see :func:`workers.run.run_report`."""
    return [asdict(found) for found in run_report(TrialSpec.from_dict(values))]
