"""What a JSON file of a study must be to be one of ours: an attempt, a report, an ask. Each check returns the fault, or None.

Reading trusts what passed here, so a field that any reader looks into has its type checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.ledger.schema import JSON_COLUMNS, SCHEMA_VERSION
from workers.trial import STATUSES

_REQUIRED = (
    "trial_id",
    "attempt_id",
    "recipe",
    "recipe_hash",
    "seed",
    "status",
    "metrics",
    "started_at",
    "measurements",
)
_TEXT_KEYS = ("trial_id", "attempt_id", "recipe", "recipe_hash", "status")


_MAPPINGS = frozenset(JSON_COLUMNS) - {"stages", "metrics"}
_NUMBER = int | float | None
"""Of a value that JSON may hold as null."""


def row_fault(row: object) -> str | None:
    """Returns why ``row`` is not an attempt row that this version reads, or None."""
    if not isinstance(row, dict) or "schema_version" not in row:
        return "is not an attempt record"
    fault = _version_fault(row)
    if fault:
        return fault
    missing = [name for name in _REQUIRED if name not in row]
    if missing:
        return f"lacks {', '.join(missing)}"
    wrong = next((name for name, fine in _attempt_checks(row) if not fine), None)
    return None if wrong is None else f"is not an attempt record: {wrong} has another type or value"


def _attempt_checks(row: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yields field and whether it is right; each rests on those before it."""
    metrics, seconds, stages = row["metrics"], row.get("seconds"), row.get("stages")
    for name in _TEXT_KEYS:
        yield name, isinstance(row[name], str)
    for name in sorted(_MAPPINGS):
        yield name, isinstance(row.get(name), Mapping | None)
    yield "conditions", isinstance((row.get("conditions") or {}).get("strong_baseline"), Mapping | None)
    yield "status", row["status"] in STATUSES
    yield "recipe", _is_recipe(row["recipe"])
    yield "metrics", isinstance(metrics, dict) and all(isinstance(v, _NUMBER) for v in metrics.values())
    yield "seconds", all(isinstance(v, int | float) for v in (seconds or {}).values())
    yield "stages", stages is None or (isinstance(stages, list) and all(map(_is_stage, stages)))
    yield "started_at", isinstance(row["started_at"], int | float) and abs(row["started_at"]) < 1e11
    yield "duration_s", isinstance(row.get("duration_s", 0.0), int | float)
    yield "failure", isinstance(row.get("failure"), str | None)
    yield "rung", isinstance(row.get("rung"), _NUMBER) and not isinstance(row.get("rung"), bool)
    yield "speed_of", isinstance(row.get("speed_of"), str | None)
    yield "measurements", _are_measurements(row["measurements"])


def report_fault(record: Mapping[str, Any]) -> str | None:
    """Returns why ``record`` is not a report that this version reads, or None."""
    fault = _version_fault(record)
    if fault:
        return fault
    texts = isinstance(record.get("trial_id"), str) and isinstance(record.get("recipe_hash"), str)
    fine = texts and _are_measurements(record.get("measurements"))
    return None if fine else "is not a report of vitpareto: a field is missing or has another type"


def ask_fault(record: Mapping[str, Any]) -> str | None:
    """Returns why ``record`` is not what the driver wrote of an ask, or None."""
    number, texts = record.get("number"), record.get("distributions")
    fine = (
        isinstance(number, int)
        and number >= 0
        and isinstance(record.get("context"), str)
        and _is_recipe(record.get("recipe"))
        and isinstance(record.get("params"), dict)
        and isinstance(texts, dict)
        and all(isinstance(text, str) for text in texts.values())
        and isinstance(record.get("system_attrs"), dict)
        and ("stages_of" not in record or _is_recipe(record["stages_of"]))
        and isinstance(specs := record.get("specs", []), list)
        and all(isinstance(spec, dict) for spec in specs)
    )
    return None if fine else "is not an ask of vitpareto: a field is missing or has another type"


def _version_fault(record: Mapping[str, Any]) -> str | None:
    version = record.get("schema_version")
    if isinstance(version, int) and version <= SCHEMA_VERSION:
        return None
    return f"has schema version {version!r}, this vitpareto reads up to {SCHEMA_VERSION}"


def _is_stage(found: object) -> bool:
    return (
        isinstance(found, dict)
        and {"kind", "key", "cached"} <= found.keys()
        and isinstance(found.get("duration_s"), int | float)
        and isinstance(found.get("epochs", 0.0), int | float)
    )


def _is_recipe(text: object) -> bool:
    try:
        steps = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return False
    return isinstance(steps, list) and all(
        isinstance(s, dict) and isinstance(s.get("technique"), str) and isinstance(s.get("config"), dict) for s in steps
    )


def _are_measurements(found: object) -> bool:
    return isinstance(found, list) and all(
        isinstance(m, dict)
        and isinstance(m.get("kind"), str)
        and isinstance(m.get("value", 0.0), _NUMBER)
        and isinstance(m.get("conditions"), dict | None)
        for m in found
    )
