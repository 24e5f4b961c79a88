"""The frontier as a study goes on: snapshots in its history."""

from __future__ import annotations

from orchestrator.frontier import query
from orchestrator.sweep import points
from orchestrator.sweep.state import Sweep

COMPACT_ROWS = 64
"""Loose attempts that are worth a compaction while a study runs; at its end all are compacted."""


def write_frontier(sweep: Sweep) -> None:
    """Adds a snapshot of the frontier of the rows so far to its history."""
    objectives = sweep.config.objectives
    members = query.pareto(sweep.ledger, list(objectives), list(objectives.values()))
    sweep.ledger.write_frontier(
        members,
        points.hypervolume(sweep.config, sweep.proposer, sweep.baseline),
        len(sweep.rows),
        objectives=list(objectives),
        reference=points.reference(sweep.config, sweep.baseline),
        context=sweep.context.digest,
    )
    sweep.ledger.compact(min_rows=COMPACT_ROWS)
