"""The frontier as a study goes on: snapshots in its history."""

from __future__ import annotations

from orchestrator.frontier import query
from orchestrator.sweep import points
from orchestrator.sweep.pace import Pace
from orchestrator.sweep.state import Sweep

FRONTIER_S = 5.0
"""Shortest time between two snapshots while a study runs."""

GROWTH = 1.05
"""Trials since the last snapshot, as a multiple of those of then: a history that grows with the logarithm of a study's trials."""

COMPACT_ROWS = 64
"""Loose attempts that are worth a compaction while a study runs; at its end all are compacted."""


class FrontierHistory:
    """Keeps the history of a running study's frontier; its end adds the last snapshot (:func:`write_frontier`)."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._pace = Pace(FRONTIER_S, FRONTIER_S)
        self._rows = 0

    def turn(self) -> None:
        """Adds a snapshot where enough time has passed and enough trials have ended.

        Raises:
            OSError, LedgerError: it could not be written; a later one will be.
        """
        rows = self.sweep.ended_works
        if self.sweep.baseline is None or not self._pace.due or rows < max(self._rows + 1, GROWTH * self._rows):
            return
        with self._pace.turn():
            write_frontier(self.sweep)
        self._rows = rows


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
