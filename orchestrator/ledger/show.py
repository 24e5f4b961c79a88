"""One trial for a person: recipe, every metric with unit and conditions, provenance, and how to rerun it."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator
from typing import Any

from orchestrator.ledger.ledger import Ledger
from orchestrator.study.constraints import DROPS
from orchestrator.words.interval_text import metric_text
from orchestrator.words.units import format_seconds, unit_of
from workers.metrics import OBJECTIVES

WIDTH = 118

_FOR_PROGRAMS = ("correct_bits", "levels", "logits_digest", "cpu_flags")
"""What fills lines and tells a person nothing; ``--json`` has it."""

_JSON = ("recipe", "metrics", "conditions", "stages", "seconds", "provenance", "optuna", "spec")


def find_trial(ledger: Ledger, start: str) -> dict[str, Any]:
    """Returns the accepted attempt of the trial whose id starts with ``start``, its JSON columns parsed, spec included.

    Raises:
        LookupError: none or several trials match; the message lists them.
    """
    ids = sorted(t for t in ledger.trials(["trial_id"])["trial_id"].to_pylist() if t.startswith(start))
    if start in ids:
        ids = [start]
    if len(ids) != 1:
        what = f"{len(ids)} trials match: {', '.join(ids[:5])}" if ids else "no trial has an id that starts so"
        remedy = f'list them with: vitpareto query {ledger.study} "SELECT trial_id, label FROM trials"'
        raise LookupError(f"TRIAL {start!r}: {what}{', ...' if len(ids) > 5 else ''}; {remedy}")
    row: dict[str, Any] = next(r for r in ledger.trials().to_pylist() if r["trial_id"] == ids[0])
    attempts = {a["attempt_id"]: a["spec"] for a in ledger.attempts(["attempt_id", "spec"]).to_pylist()}
    row["spec"] = attempts[row["attempt_id"]]
    return {k: json.loads(v) if k in _JSON and v is not None else v for k, v in row.items()}


def describe_trial(row: dict[str, Any], ledger: Ledger, study: str, storage: str) -> Iterator[str]:
    """Yields the lines that describe a trial; those that are to be copied are never broken."""
    option = "" if storage == "results" else f" --storage {shlex.quote(storage)}"
    this = f"vitpareto show {study} {row['trial_id']}{option}"
    yield f"trial {row['trial_id']} of {study}, seed {row['seed']}, attempt {row['attempt_id']} ({row['attempts']} in all)"
    broken = row["status"] == "ok" and not row["feasible"]
    yield f"status: {row['status']}{', breaks a constraint of the study' if broken else ''}"
    if row["rung"] is not None:
        yield f"  paused after {row['rung']:.1%} of its recovery training, where the metrics below were found"
        yield f"  bring it to its end: vitpareto resume {study} --finish {row['trial_id']}{option}"
    if row["failure"]:
        yield from _folded("failure", row["failure"].splitlines()[0])
        yield f"  all of it: {this} --json"
    yield "recipe:" if row["recipe"] else "recipe: none, the uncompressed baseline"
    for position, step in enumerate(row["recipe"], 1):
        values = ", ".join(f"{k}={v}" for k, v in step["config"].items())
        yield f"  {position}. {step['technique']}({values})"
    yield from _metric_lines(row)
    yield from _measurement_lines(row, ledger)
    yield from _folded("conditions", _pairs(row["conditions"]))
    stages = [f"{s['kind']} {s['key']} ({_duration(s)})" for s in row["stages"] or ()]
    yield from _folded("stages", ", ".join(stages))
    spent = ", ".join(f"{k} {v:.2f} s" for k, v in (row["seconds"] or {}).items())
    yield from _folded("time", f"{row['duration_s']:.2f} s from {row['started_at']:%Y-%m-%d %H:%M:%S} UTC: {spent}")
    yield from _folded(
        "provenance",
        _pairs({k: v for k, v in (row["provenance"] or {}).items() if v is not None and k not in _FOR_PROGRAMS}),
    )
    if row["artefact"]:
        yield f"artefact: {row['artefact']} in the storage; load it with workers.artefact.load"
    yield f"rerun alone: {this} --spec > spec.json && python -m workers spec.json"


def _metric_lines(row: dict[str, Any]) -> Iterator[str]:
    metrics = dict(row["metrics"] or {})
    metrics |= {drop: row[drop] for drop in DROPS if row[drop] is not None}
    yield "metrics:" if metrics else "metrics: none"
    told = {f"{n}_{end}" for n in OBJECTIVES for end in ("low", "high", "ratio")}  # beside their value
    about = metrics | {"simulated": (row["conditions"] or {}).get("simulated")}
    order = [*OBJECTIVES, *sorted(metrics.keys() - OBJECTIVES - told)]
    for name in [n for n in order if n in metrics]:
        short = metric_text(name, about)
        exact = f"{metrics[name]:.10g} {unit_of(name)}".rstrip()
        yield f"  {name}: {short}" + (f" ({exact})" if short[-1] in "BkMG" and metrics[name] >= 1000 else "")


def _measurement_lines(row: dict[str, Any], ledger: Ledger) -> Iterator[str]:
    found = [m for m in ledger.measurements().to_pylist() if m["trial_id"] == row["trial_id"]]
    for m in found:
        if m["attempt_id"] in (row["attempt_id"], None, ""):  # without an attempt: the report split
            yield from _folded(f"measured {m['kind']}", _measurement(m))


def _measurement(m: dict[str, Any]) -> str:
    value = "unknown" if m["value"] is None else f"{m['value']:.6g}"
    text = f"{value} {m['unit']} on {m['device']}, batch {m['batch']}, {m['resolution']} px, protocol {m['protocol']}"
    if None not in (m["ratio"], m["ratio_low"], m["ratio_high"]):
        text += (
            f"; {m['ratio']:.3f} times the interleaved baseline, interval {m['ratio_low']:.3f} to {m['ratio_high']:.3f}"
        )
    if m["samples"]:
        text += f"; {len(m['samples'])} samples"
    conditions = json.loads(m["conditions"] or "{}")
    return text + f"; {_pairs({k: v for k, v in conditions.items() if k not in _FOR_PROGRAMS})}"


def _duration(stage: dict[str, Any]) -> str:
    return "cached" if stage["cached"] else format_seconds(stage["duration_s"])


def _folded(name: str, text: str) -> list[str]:
    options = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(f"{name}: {text}", WIDTH, **options)  # type: ignore[arg-type]


def _pairs(values: Any) -> str:
    return ", ".join(f"{k} {_plain(v)}" for k, v in (values or {}).items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {v}" for k, v in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
