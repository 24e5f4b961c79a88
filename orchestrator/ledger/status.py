"""How far studies are, read from their folders alone."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

from orchestrator.ledger.ledger import Ledger, LedgerWarning
from orchestrator.ledger.stopped import STOPPED, by_rung, stopped_trials
from orchestrator.words.units import format_seconds
from workers.node.lease import holder
from workers.trial import INFRASTRUCTURE

_COLUMNS = ("status", "is_baseline", "context", "feasible", "recipe_hash", "attempts")
_SPENT = ("seconds", "speed_of")


def study_status(ledger: Ledger) -> dict[str, Any]:
    """Returns one row about a study.

    ``state`` is ``running`` (a live driver holds the lease), ``done`` (budget or space used up) or ``stopped``; ``failed``
    counts trials by class; ``paused`` those that stand at each rung of their recovery training, which count as done,
    ``paused_s`` and ``paused_epochs`` are what they cost; ``waiting`` are those that wait for the lane, or for a stage that another runs; ``hypervolume`` is
    that of the newest frontier; ``other_contexts`` counts trials that answer an earlier question (other data, other
    training); ``seconds`` are sums over the trials, the baseline's apart: training, measuring, waiting for the lane and so on;
    ``speeds_taken_over`` counts trials whose speed is that of an equal structure; ``problems`` lists files that cannot be read, with the reason, and ``rows_missing`` says that rows are known
    to be missing with them.
    """
    stored = ledger.study_record() or {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LedgerWarning)  # ``problems`` has it
        rows = ledger.trials((*_COLUMNS, *_SPENT)).to_pylist()
        frontier = ledger.frontier()
    problems = ledger.problems()
    here = [r for r in rows if r["context"] == ledger.context]
    mine = [r for r in here if not r["is_baseline"]]
    budget = stored["config"]["trials"]
    done = _ended(mine, stored["config"])
    owner = holder(ledger.storage, f"{ledger.study}/lease")
    marks = ledger.running() if owner else {}
    waiting = ledger.waiting() if marks else frozenset()
    paused = stopped_trials(ledger) if any(r["status"] == STOPPED for r in mine) else []
    used_up = (
        done >= budget and not paused
    )  # else only its driver knows whether one of these is still to be gone on with
    state = "running" if owner else ("done" if used_up or stored.get("complete") else "stopped")
    return {
        "study": ledger.study,
        "state": state,
        "done": done,
        "budget": budget,
        "running": len(marks) - len(waiting),
        "waiting": len(waiting),
        "feasible": len({r["recipe_hash"] for r in mine if r["feasible"]}),
        "failed": dict(Counter(r["status"] for r in mine if r["status"] not in ("ok", STOPPED))),
        "paused": by_rung(paused),
        "paused_s": sum(trial["seconds"] for trial in paused),
        "paused_epochs": sum(trial["epochs"] for trial in paused),
        "hypervolume": frontier["hypervolume"][-1].as_py() if len(frontier) else None,
        "other_contexts": len(rows) - len(here),
        "seconds": _seconds(mine),
        "speeds_taken_over": sum(r["speed_of"] is not None for r in mine),
        "driver": {k: owner.get(k) for k in ("host", "pid")} if owner else None,
        "problems": [f"{p.file}: {p.reason}" for p in problems],
        "rows_missing": any(p.hides_rows for p in problems),
    }


def _seconds(rows: list[dict[str, Any]]) -> dict[str, float]:
    spent: Counter[str] = Counter()
    for row in rows:
        spent.update(json.loads(row["seconds"] or "{}"))
    return {name: round(seconds, 2) for name, seconds in sorted(spent.items())}


def done_recipes(ledger: Ledger) -> int:
    """Returns how many recipes have an end in the study's present context."""
    rows = ledger.trials(_COLUMNS).to_pylist()
    mine = [r for r in rows if r["context"] == ledger.context and not r["is_baseline"]]
    return _ended(mine, (ledger.study_record() or {})["config"])


def _ended(rows: list[dict[str, Any]], config: Mapping[str, Any]) -> int:
    """Counts recipes as the driver does: those that are ok under every seed, failed for good under one, or stand at a rung.

    A loss of the worker is no end before the retries are used up.
    """
    seeds, retries = len(config.get("seeds") or [0]), int(config.get("retries") or 0)
    ended = Counter(r["recipe_hash"] for r in rows if r["status"] in ("ok", STOPPED))
    failed = [r for r in rows if r["status"] not in ("ok", STOPPED)]
    final = {r["recipe_hash"] for r in failed if r["status"] not in INFRASTRUCTURE or r["attempts"] > retries}
    return len(final | {recipe for recipe, count in ended.items() if count >= seeds})


def for_people(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of :func:`study_status` as a line of a table."""
    driver = row["driver"]
    return {
        "study": row["study"],
        "state": row["state"],
        "trials": f"{row['done']}/{row['budget']}",
        "running": row["running"],
        "waiting": row["waiting"],
        "feasible": row["feasible"],
        "failed": format_failures(row["failed"]),
        "paused": format_paused(row["paused"], row["paused_s"]),
        "hypervolume": row["hypervolume"],
        "driver": f"process {driver['pid']} on {driver['host']}" if driver else None,
        "bad_files": len(row["problems"]),
    }


def format_paused(paused: Mapping[str, int], seconds: float) -> str:
    """Returns counts by rung and what they cost as ``5 at 12.5%, 2 at 37.5% (31 s)``, or ``none``."""
    counts = ", ".join(f"{count} at {rung}" for rung, count in paused.items())
    return f"{counts} ({format_seconds(seconds)})" if counts else "none"


def format_failures(failed: dict[str, int]) -> str:
    """Returns counts by failure class as ``2 infeasible, 1 timeout``, or ``none``."""
    return ", ".join(f"{count} {status}" for status, count in sorted(failed.items())) or "none"
