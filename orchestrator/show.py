"""One trial for a person: recipe, every metric with unit and conditions, provenance, and how to rerun it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

from orchestrator.ledger import Ledger
from orchestrator.units import format_seconds, format_value, unit_of
from workers.protocol import OBJECTIVES

_JSON = ("recipe", "metrics", "conditions", "stages", "seconds", "provenance", "optuna", "spec")


def find_trial(ledger: Ledger, start: str) -> dict[str, Any]:
    """Returns the accepted attempt of the trial whose id starts with ``start``, its JSON columns parsed, spec included.

    Raises:
        LookupError: none or several trials match; the message lists them.
    """
    ids = [t for t in ledger.trials(["trial_id"])["trial_id"].to_pylist() if t.startswith(start)]
    if len(ids) != 1:
        what = f"{len(ids)} trials match: {', '.join(sorted(ids)[:5])}" if ids else "no trial has an id that starts so"
        raise LookupError(
            f'TRIAL {start!r}: {what}; `vitpareto query {ledger.study} "SELECT trial_id, label FROM trials"`'
        )
    row: dict[str, Any] = next(r for r in ledger.trials().to_pylist() if r["trial_id"] == ids[0])
    attempts = {a["attempt_id"]: a["spec"] for a in ledger.attempts(["attempt_id", "spec"]).to_pylist()}
    row["spec"] = attempts[row["attempt_id"]]
    return {k: json.loads(v) if k in _JSON and v is not None else v for k, v in row.items()}


def describe_trial(row: dict[str, Any], ledger: Ledger, study: str, storage: str) -> Iterator[str]:
    """Yields the lines that describe a trial."""
    yield f"trial {row['trial_id']} of {study}, seed {row['seed']}, attempt {row['attempt_id']} ({row['attempts']} in all)"
    yield f"status: {row['status']}" + (
        "" if row["feasible"] or row["status"] != "ok" else ", breaks a constraint of the study"
    )
    if row["failure"]:
        yield f"failure: {row['failure'].splitlines()[0]}"
    yield "recipe:" if row["recipe"] else "recipe: none, the uncompressed baseline"
    for position, step in enumerate(row["recipe"], 1):
        values = ", ".join(f"{k}={v}" for k, v in step["config"].items())
        yield f"  {position}. {step['technique']}({values})"
    yield from _metric_lines(row, ledger)
    yield "conditions: " + _pairs(row["conditions"])
    yield "stages: " + ", ".join(
        f"{s['kind']} {s['key']} ({'cached' if s['cached'] else format_seconds(s['duration_s'])})"
        for s in row["stages"] or ()
    )
    yield "time: " + ", ".join(f"{k} {v:.2f} s" for k, v in (row["seconds"] or {}).items())
    yield f"started {row['started_at']}, took {row['duration_s']:.2f} s"
    yield "provenance: " + _pairs(row["provenance"])
    if row["artefact"]:
        yield f"artefact: {row['artefact']} (load it with workers.artefact.load)"
    option = "" if storage == "results" else f" --storage {shlex.quote(storage)}"
    yield f"rerun alone: vitpareto show {study} {row['trial_id']}{option} --spec > spec.json && python -m workers spec.json"


def _metric_lines(row: dict[str, Any], ledger: Ledger) -> Iterator[str]:
    metrics = dict(row["metrics"] or {})
    if row["top1_pct_drop"] is not None:
        metrics["top1_pct_drop"] = row["top1_pct_drop"]
    yield "metrics:" if metrics else "metrics: none"
    for name in sorted(metrics, key=lambda n: (list(OBJECTIVES).index(n) if n in OBJECTIVES else len(OBJECTIVES), n)):
        yield (
            f"  {name} = {metrics[name]:.10g} {unit_of(name)}".rstrip()
            + f"  ({format_value(name, metrics[name]).strip()})"
        )
    for m in ledger.measurements().to_pylist():
        if m["trial_id"] == row["trial_id"] and m["attempt_id"] in (row["attempt_id"], None, ""):
            yield "  measured " + _measurement(m)


def _measurement(m: dict[str, Any]) -> str:
    text = f"{m['kind']} {m['value']:.6g} {m['unit']} on {m['device']}, batch {m['batch']}, {m['resolution']} px, protocol {m['protocol']}"
    if m["ratio"] is not None:
        text += f"; ratio to the interleaved baseline {m['ratio']:.3f} [{m['ratio_low']:.3f}, {m['ratio_high']:.3f}]"
    if m["samples"]:
        text += f"; {len(m['samples'])} samples"
    return text + f"; {_pairs(json.loads(m['conditions'] or '{}'))}"


def _pairs(values: Any) -> str:
    return ", ".join(f"{k} {_plain(v)}" for k, v in (values or {}).items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {v}" for k, v in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
