"""Leaves a study's Optuna trials in its folder, as a file that optuna-dashboard opens.

The ledger stays the source of truth: the file is written anew when a run ends and never read back.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import timedelta
from typing import Any

from orchestrator.ledger import Ledger
from orchestrator.ledger.stopped import STOPPED
from orchestrator.sweep.journal import TrialNote, journal_bytes
from orchestrator.sweep.searcher import Proposer

JOURNAL = "optuna.journal"
"""In the study's folder; open it with ``optuna-dashboard FOLDER/optuna.journal``."""

_COLUMNS = ["number", "context", "trial_id", "seed", "status", "failure", "started_at", "duration_s"]


def leave_journal(ledger: Ledger, proposer: Proposer) -> None:
    """Writes the journal of a study whose ledger has a context, in place of an older one."""
    data = journal_bytes(proposer, ledger.study, trial_notes(ledger))
    ledger.storage.put_atomic(f"{ledger.study}/{JOURNAL}", data)


def trial_notes(ledger: Ledger) -> dict[int, TrialNote]:
    """Returns what the ledger knows of each of Optuna's numbers in its context: one note over all seeds."""
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in ledger.trials(_COLUMNS).to_pylist():
        if row["number"] is not None and row["context"] == ledger.context:
            rows[row["number"]].append(row)
    return {number: _note(sorted(found, key=lambda row: row["seed"])) for number, found in rows.items()}


def _note(rows: list[dict[str, Any]]) -> TrialNote:
    """Returns the note of one recipe: its seeds' ids, and the first status that is not ok."""
    failed = next((row for row in rows if row["status"] != "ok"), None)
    attributes: dict[str, Any] = {
        "trial_ids": [row["trial_id"] for row in rows],
        "status": "ok" if failed is None else failed["status"],
    }
    if failed is not None and failed["status"] != STOPPED:
        attributes["failure"] = (failed["failure"] or "no reason recorded").splitlines()[0]
    started = min(row["started_at"] for row in rows)
    ended = max(row["started_at"] + timedelta(seconds=row["duration_s"] or 0.0) for row in rows)
    return TrialNote(attributes, *(time.astimezone().replace(tzinfo=None) for time in (started, ended)))
