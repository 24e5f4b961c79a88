"""What the report says of a study as a whole: what it searched, how its frontier grew, what techniques add, what failed or
was stopped early."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.frontier.dominance import default_reference, hypervolume
from orchestrator.ledger import Ledger
from orchestrator.ledger.stopped import STOPPED, stopped_trials
from orchestrator.report.data import Candidate, Report
from orchestrator.words.interval_text import metric_text
from orchestrator.words.labels import short_label
from orchestrator.words.units import format_seconds
from workers.metrics import METRICS, OBJECTIVES
from workers.trial import Recipe

REASONS = 3
"""Distinct reasons of a failure class that are shown, the most frequent first."""


def searched_numbers(searched: Mapping[str, Any]) -> dict[str, list[float]]:
    """Returns the numeric parameters that a study searches, ``technique.name`` to its values or both ends of its range.

    Args:
        searched: ``techniques`` of the study.
    """
    found = {}
    for technique, domains in searched.items():
        for name, domain in domains.items():
            values = [domain["low"], domain["high"]] if isinstance(domain, Mapping) else list(domain)
            numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
            if len(numbers) == len(values) and len(set(numbers)) > 1:
                found[f"{technique}.{name}"] = sorted(numbers)
    return found


def history(ledger: Ledger) -> list[tuple[int, int, float | None]]:
    """Returns (trials, microseconds since the epoch, hypervolume) of each stored frontier of the study's context."""
    table = ledger.frontier().select(["snapshot", "taken_at", "trials", "hypervolume", "context"])
    found = {}
    for row in table.to_pylist():
        if row["context"] == ledger.context:
            found[row["snapshot"]] = (row["trials"], round(row["taken_at"].timestamp() * 1e6), row["hypervolume"])
    return [found[number] for number in sorted(found)]


def failure_classes(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the failure classes, the most frequent first, with the first lines of their most frequent reasons."""
    found = []
    counts = Counter(t["status"] for t in trials if t["status"] not in ("ok", STOPPED))
    for status, count in counts.most_common():
        lines = [(_first_line(t["failure"]), t) for t in trials if t["status"] == status]
        example = {text: t["trial_id"] for text, t in lines}
        reasons = Counter(text for text, _ in lines).most_common(REASONS)
        shown = [{"text": text, "count": n, "trial": example[text]} for text, n in reasons]
        found.append({"status": status, "count": count, "reasons": shown})
    return found


def stopped_early(ledger: Ledger, searched: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the trials that stand at a rung as rows of texts, those that came furthest first.

    Args:
        searched: ``techniques`` of the study.

    Returns:
        ``trial``, ``label``, ``rung``, ``found`` (title of a metric to its text; accuracies are those at the rung), ``cost``.
    """
    rows = sorted(stopped_trials(ledger), key=lambda row: -row["rung"])
    return [
        {
            "trial": row["trial_id"],
            "label": short_label(Recipe.from_json(row["recipe"]), searched),
            "rung": f"{row['rung']:.1%}",
            "found": {
                METRICS[name].title: metric_text(name, row["metrics"]) for name in OBJECTIVES if name in row["metrics"]
            },
            "cost": f"{format_seconds(row['seconds'])}, epochs: {row['epochs']:.3g}",
        }
        for row in rows
    ]


def _first_line(failure: str | None) -> str:
    return next((line.strip() for line in (failure or "").splitlines() if line.strip()), "no reason given")


def contributions(report: Report) -> tuple[float | None, list[dict[str, Any]]]:
    """Returns the hypervolume of all feasible candidates, and of those without each technique, in multiples of the
    baseline's values."""
    base, names = report.baseline, report.objectives
    unit = [base.value[k] for k in range(len(names))] if base is not None else []
    if not unit or any(value is None or value <= 0 for value in unit):
        return None, []
    scale = np.array(unit, dtype=np.float64)
    directions = [OBJECTIVES[name] for name in names]
    stated = report.config.get("reference_point") or {}
    default = default_reference(scale, directions)
    reference = np.array([stated.get(n, float(v)) for n, v in zip(names, default, strict=True)]) / scale

    def volume(candidates: Sequence[Candidate]) -> float:
        values = np.array([c.value[: len(names)] for c in candidates], dtype=np.float64).reshape(-1, len(names))
        return hypervolume(values / scale, directions, reference)

    feasible = [c for c in report.candidates if c.standing != "broken"]
    used = {c.id: {technique for technique, _ in c.steps} for c in report.candidates}
    found = []
    for technique in sorted(set().union(*used.values(), report.config.get("techniques", {}))):
        users = [c for c in feasible if technique in used[c.id]]
        found.append(
            {
                "technique": technique,
                "recipes": len(users),
                "certain": sum(c.standing == "certain" for c in users),
                "volume": volume([c for c in feasible if technique not in used[c.id]]),
            }
        )
    return volume(feasible), sorted(found, key=lambda f: f["volume"])
