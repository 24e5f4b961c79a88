"""What a ledger row is: Arrow schemas with a version, and the way from a spec and its result to a row.

Stored columns only. Columns that follow from other rows (accepted attempt, drop of accuracy, feasibility) are computed when
read: ``trials.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from orchestrator.ledger.columns import empty
from workers.metrics import DETAILS, INTERVALS, METRICS, OBJECTIVES
from workers.trial import TrialResult, TrialSpec

SCHEMA_VERSION = 1
"""Of the attempt files and of every Parquet file; raised when a column changes its meaning."""

RATIOS = tuple(f"{name}_ratio" for name in OBJECTIVES)
"""Value over the baseline's. Stored where the trial measured it paired; computed when read where it did not."""

BOUNDS = tuple(f"{name}_{end}" for name in INTERVALS for end in ("low", "high"))
"""Ends of the 95 % intervals of what is measured; null where it was not, or is exact."""

JSON_COLUMNS = ("metrics", "conditions", "stages", "seconds", "provenance", "optuna", "spec")
"""Columns of JSON text; ``spec`` is the whole TrialSpec, from which the attempt can be rerun alone."""

_METADATA_KEY = b"vitpareto"


def _schema(table: str, fields: Sequence[tuple[str, pa.DataType]]) -> pa.Schema:
    version = json.dumps({"table": table, "schema_version": SCHEMA_VERSION})
    return pa.schema(fields, metadata={_METADATA_KEY: version.encode()})


_TIME = pa.timestamp("us", tz="UTC")

ATTEMPTS = _schema(
    "attempts",
    [
        ("trial_id", pa.string()),
        ("attempt_id", pa.string()),
        ("study", pa.string()),
        ("number", pa.int64()),
        ("recipe", pa.string()),
        ("recipe_hash", pa.string()),
        ("techniques", pa.string()),
        ("label", pa.string()),
        ("seed", pa.int64()),
        ("is_baseline", pa.bool_()),
        ("status", pa.string()),
        ("failure", pa.string()),
        ("rung", pa.float64()),
        *((name, pa.float64()) for name in OBJECTIVES),
        *((name, pa.float64()) for name in RATIOS),
        *((name, pa.float64()) for name in BOUNDS),
        *((name, pa.float64()) for name in DETAILS),
        ("started_at", _TIME),
        ("duration_s", pa.float64()),
        ("context", pa.string()),
        ("device", pa.string()),
        ("artefact", pa.string()),
        ("speed_of", pa.string()),
        *((name, pa.string()) for name in JSON_COLUMNS),
    ],
)
"""One row an attempt. ``number`` is Optuna's (null: not asked for by Optuna), ``techniques`` is ``a+b`` in recipe
order, ``rung`` the share of the recovery training after which a ``stopped`` attempt paused (null in others), ``context`` a digest, times
in UTC and seconds, objectives in the unit that their name says, null where not measured. ``speed_of`` is the trial whose measurement the
speeds are, null where they are the trial's own."""

MEASUREMENTS = _schema(
    "measurements",
    [
        ("trial_id", pa.string()),
        ("attempt_id", pa.string()),
        ("position", pa.int64()),
        ("recipe_hash", pa.string()),
        ("kind", pa.string()),
        ("artefact", pa.string()),
        ("device", pa.string()),
        ("batch", pa.int64()),
        ("resolution", pa.int64()),
        ("protocol", pa.string()),
        ("value", pa.float64()),
        ("unit", pa.string()),
        ("ratio", pa.float64()),
        ("ratio_low", pa.float64()),
        ("ratio_high", pa.float64()),
        ("samples", pa.list_(pa.float64())),
        ("baseline_samples", pa.list_(pa.float64())),
        ("conditions", pa.string()),
    ],
)
"""One row a measured quantity; ``position`` is its place in its attempt. One that was added after the trial had ended
(accuracy on the report split) has no attempt id."""

FRONTIER = _schema(
    "frontier",
    [
        ("snapshot", pa.int64()),
        ("taken_at", _TIME),
        ("trials", pa.int64()),
        ("hypervolume", pa.float64()),
        ("objectives", pa.list_(pa.string())),
        ("reference", pa.list_(pa.float64())),
        ("context", pa.string()),
        ("trial_id", pa.string()),
        ("recipe_hash", pa.string()),
        ("label", pa.string()),
        *((name, pa.float64()) for name in OBJECTIVES),
    ],
)
"""One row for every member of every snapshot of the frontier; the highest ``snapshot`` is the current one. A snapshot
without members has one row whose ``trial_id`` is null."""

SCHEMAS = {"attempts": ATTEMPTS, "measurements": MEASUREMENTS, "frontier": FRONTIER}


def attempt_row(spec: TrialSpec, result: TrialResult, optuna: Mapping[str, Any] | None) -> dict[str, Any]:
    """Combines what was asked, how it ended and what the sampler needs to remember into one attempt row.

    Args:
        optuna: state of the sampler's trial with its ``number``; None for a trial that it did not ask for.

    Returns:
        Plain values for JSON; NaN and infinity become None.
    """
    recipe = spec.recipe
    if result.status in ("ok", "stopped"):  # alone, without a state to go on from, it is to end where this attempt did
        spec = replace(spec, until=result.rung)
    row = {
        "schema_version": SCHEMA_VERSION,
        "trial_id": result.trial_id,
        "attempt_id": result.attempt_id,
        "study": spec.study,
        "number": None if optuna is None else optuna.get("number"),
        "recipe": recipe.to_json(),
        "recipe_hash": recipe.hash,
        "techniques": "+".join(recipe.techniques),
        "label": recipe.label(),
        "seed": spec.seed,
        "is_baseline": not recipe.steps,
        "context": spec.context.digest,
        "device": spec.context.device,
        "optuna": optuna,
        "spec": spec.to_dict(),
    }
    found = result.to_dict()
    row["speed_of"] = found["conditions"].get("speed_of")
    copied = ("status", "failure", "rung", "artefact", "started_at", "duration_s", "measurements")
    row |= {name: found[name] for name in (*copied, "metrics", "conditions", "stages", "seconds", "provenance")}
    return _finite(row)  # type: ignore[no-any-return]


def report_record(trial_id: str, recipe_hash: str, *measurements: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of measurements that were added to a trial that has ended (fields of
    ``trial.Measurement``)."""
    return {
        "schema_version": SCHEMA_VERSION,
        "trial_id": trial_id,
        "recipe_hash": recipe_hash,
        "measurements": [_finite(dict(m)) for m in measurements],
    }


def _finite(value: Any) -> Any:
    """Returns ``value`` with NaN and infinities as None, which JSON and SQL both have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def attempts_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Returns attempt rows as a table of schema :data:`ATTEMPTS`; raises ValueError, TypeError or KeyError for foreign
    values."""
    if not rows:
        return empty(ATTEMPTS)
    columns = [pa.array([_attempt_cell(row, field.name) for row in rows], field.type) for field in ATTEMPTS]
    return pa.Table.from_arrays(columns, schema=ATTEMPTS)


def _attempt_cell(row: Mapping[str, Any], name: str) -> Any:
    if name in METRICS or name in RATIOS or name in BOUNDS:
        return row["metrics"].get(name)
    if name in JSON_COLUMNS:
        return _json(row.get(name))
    if name == "started_at":
        return round(row["started_at"] * 1e6)
    return row.get(name)


def measurements_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Returns the measurements inside attempt rows as a table of schema :data:`MEASUREMENTS`."""
    if not rows:
        return empty(MEASUREMENTS)
    flat = [
        {
            **measurement,
            "trial_id": row["trial_id"],
            "attempt_id": row.get("attempt_id"),
            "recipe_hash": row["recipe_hash"],
            "position": position,
            "conditions": _json(measurement.get("conditions")),
        }
        for row in rows
        for position, measurement in enumerate(row["measurements"])
    ]
    return pa.Table.from_arrays(
        [pa.array([m.get(f.name) for m in flat], f.type) for f in MEASUREMENTS], schema=MEASUREMENTS
    )


def metric_of(conditions: Mapping[str, Any]) -> str:
    """Returns which accuracy a record of kind ``accuracy_search`` or ``accuracy_report`` is of; old records do not say it."""
    return str(conditions.get("metric", "top1_pct"))


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True, separators=(",", ":"))


def schema_fault(kind: str, schema: pa.Schema) -> str | None:
    """Returns why a Parquet file with ``schema`` cannot be read as table ``kind`` (attempts, measurements, frontier),
    or None."""
    try:
        stated = json.loads((schema.metadata or {})[_METADATA_KEY])
        table, version = stated["table"], int(stated["schema_version"])
    except (KeyError, TypeError, ValueError):
        return "was not written by vitpareto"
    if table != kind:
        return f"holds {table}, not {kind}"
    if version > SCHEMA_VERSION:
        return f"has schema version {version}, this vitpareto reads up to {SCHEMA_VERSION}"
    return None


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Returns ``table`` in exactly the columns of ``schema``; a column that an older file lacks is null."""
    columns = [
        table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(len(table), f.type) for f in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def frontier_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Makes rows of the frontier's history; a column that a row lacks is null."""
    return pa.Table.from_arrays([pa.array([r.get(f.name) for r in rows], f.type) for f in FRONTIER], schema=FRONTIER)
