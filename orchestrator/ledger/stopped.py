"""Trials whose recovery training was paused: what was seen of them at each rung, where they stand, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.ledger.ledger import Ledger

STOPPED = "stopped"
"""Status of an attempt that ended at a rung."""

Rungs = dict[float, dict[str, float]]
"""Share of the recovery training to the metrics that were found there."""


def rungs(ledger: Ledger, context: str, trials: Collection[str] | None = None) -> dict[str, Rungs]:
    """Returns what was seen of trials of a context at their rungs, whatever became of them later.

    Args:
        trials: those wanted, None for all.
    """
    table = ledger.attempts(["trial_id", "status", "rung", "metrics", "context"])
    keep = pc.and_(pc.equal(table["status"], STOPPED), pc.equal(table["context"], context))
    if trials is not None:
        keep = pc.and_(keep, pc.is_in(table["trial_id"], value_set=pa.array(list(trials), pa.string())))
    found: dict[str, Rungs] = {}
    for row in table.filter(keep).to_pylist():
        if row["rung"] is not None:
            metrics = {k: v for k, v in json.loads(row["metrics"]).items() if v is not None}
            found.setdefault(row["trial_id"], {})[row["rung"]] = metrics
    return found


def stopped_trials(ledger: Ledger) -> list[dict[str, Any]]:
    """Returns the trials of the study's context that stand at a rung, by number.

    Each has ``trial_id``, ``number``, ``label``, ``recipe``, ``rung``, ``metrics`` found there, ``seconds`` that its attempts took and
    ``epochs`` of recovery that they trained; what was trained for another trial with the same recovery is that one's cost.
    """
    columns = ["trial_id", "number", "label", "recipe", "recipe_hash", "seed", "status", "rung", "metrics", "context"]
    rows = ledger.trials(columns).to_pylist()
    mine = [row for row in rows if row["status"] == STOPPED and row["context"] == ledger.context]
    if not mine:
        return []
    costs = _costs(ledger, {row["trial_id"] for row in mine})
    for row in mine:
        row["metrics"] = json.loads(row["metrics"])
        row["seconds"], row["epochs"] = costs[row["trial_id"]]
        del row["context"], row["status"]
    return sorted(mine, key=lambda row: (-1 if row["number"] is None else row["number"], row["seed"]))


def _costs(ledger: Ledger, trials: Collection[str]) -> dict[str, tuple[float, float]]:
    """Returns seconds and epochs of all attempts of each trial."""
    found: dict[str, tuple[float, float]] = dict.fromkeys(trials, (0.0, 0.0))
    for row in ledger.attempts(["trial_id", "duration_s", "stages"]).to_pylist():
        if row["trial_id"] in found:
            seconds, epochs = found[row["trial_id"]]
            stages: Sequence[Mapping[str, Any]] = json.loads(row["stages"] or "null") or ()
            epochs += sum(stage.get("epochs", 0.0) for stage in stages if stage["kind"] == "recovery")
            found[row["trial_id"]] = (seconds + (row["duration_s"] or 0.0), epochs)
    return found


def by_rung(trials: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Returns how many of :func:`stopped_trials` stand at each rung, in words, the earliest first."""
    found: dict[float, int] = {}
    for trial in trials:
        found[trial["rung"]] = found.get(trial["rung"], 0) + 1
    return {f"{rung:.1%}".replace(".0%", "%"): found[rung] for rung in sorted(found)}
