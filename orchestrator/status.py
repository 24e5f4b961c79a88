"""How far studies are, read from their folders alone."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from orchestrator.ledger import Ledger
from workers.lease import holder
from workers.storage import Storage


def study_names(storage: Storage) -> list[str]:
    """Returns the names of the studies in a storage, sorted."""
    return [n for n in storage.folders("") if storage.exists(f"{n}/study.json")]


def study_status(ledger: Ledger, stored: dict[str, Any]) -> dict[str, Any]:
    """Returns one row about a study.

    ``state`` is ``running`` (a live driver holds the lease), ``done`` (budget used up) or ``stopped``; ``failed`` counts by
    class; ``hypervolume`` is that of the newest frontier; ``problems`` lists files that cannot be read, with the reason.
    """
    rows = ledger.trials(["status", "is_baseline", "context", "feasible", "recipe_hash"]).to_pylist()
    mine = [r for r in rows if r["context"] == stored["context"] and not r["is_baseline"]]
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
        "feasible": sum(bool(r["feasible"]) for r in mine),
        "failed": dict(Counter(r["status"] for r in mine if r["status"] != "ok")),
        "hypervolume": frontier["hypervolume"][-1].as_py() if len(frontier) else None,
        "other_contexts": len(rows) - len([r for r in rows if r["context"] == stored["context"]]),
        "driver": json.dumps({k: owner[k] for k in ("host", "pid")}) if owner else None,
        "problems": [f"{p.file}: {p.reason}" for p in ledger.problems()],
    }
