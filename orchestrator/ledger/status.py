"""How far studies are, read from their folders alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from orchestrator.ledger.ledger import Ledger
from workers.node.lease import holder


def study_status(ledger: Ledger) -> dict[str, Any]:
    """Returns one row about a study.

    ``state`` is ``running`` (a live driver holds the lease), ``done`` (budget or space used up) or ``stopped``; ``failed``
    counts trials by class; ``hypervolume`` is that of the newest frontier; ``other_contexts`` counts trials that answer
    an earlier question (other data, other training); ``problems`` lists files that cannot be read, with the reason.
    """
    stored = ledger.study_record() or {}
    rows = ledger.trials(["status", "is_baseline", "context", "feasible", "recipe_hash"]).to_pylist()
    here = [r for r in rows if r["context"] == ledger.context]
    mine = [r for r in here if not r["is_baseline"]]
    budget = stored["config"]["trials"]
    recipes = {r["recipe_hash"] for r in mine}
    frontier = ledger.frontier()
    owner = holder(ledger.storage, f"{ledger.study}/lease")
    state = "running" if owner else ("done" if len(recipes) >= budget or stored.get("complete") else "stopped")
    return {
        "study": ledger.study,
        "state": state,
        "done": len(recipes),
        "budget": budget,
        "running": len(ledger.running()) if owner else 0,
        "feasible": len({r["recipe_hash"] for r in mine if r["feasible"]}),
        "failed": dict(Counter(r["status"] for r in mine if r["status"] != "ok")),
        "hypervolume": frontier["hypervolume"][-1].as_py() if len(frontier) else None,
        "other_contexts": len(rows) - len(here),
        "driver": {k: owner[k] for k in ("host", "pid")} if owner else None,
        "problems": [f"{p.file}: {p.reason}" for p in ledger.problems()],
    }


def for_people(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of :func:`study_status` as a line of a table."""
    driver = row["driver"]
    return {
        "study": row["study"],
        "state": row["state"],
        "trials": f"{row['done']}/{row['budget']}",
        "running": row["running"],
        "feasible": row["feasible"],
        "failed": format_failures(row["failed"]),
        "hypervolume": row["hypervolume"],
        "driver": f"process {driver['pid']} on {driver['host']}" if driver else None,
        "bad_files": len(row["problems"]),
    }


def format_failures(failed: dict[str, int]) -> str:
    """Returns counts by failure class as ``2 infeasible, 1 timeout``, or ``none``."""
    return ", ".join(f"{count} {status}" for status, count in sorted(failed.items())) or "none"
