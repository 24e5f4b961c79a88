"""Rows out of damaged Parquet files: what is left of a column that is gone stands in other columns, or the row is lost.

A row is kept only where everything that numbers mean is as it was written. Columns that only describe may be null.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from orchestrator.ledger.columns import empty
from orchestrator.ledger.parquet_files import readable_columns
from orchestrator.ledger.schema import ATTEMPTS, BOUNDS, RATIOS, SCHEMAS
from workers.metrics import METRICS
from workers.node.storage import Storage
from workers.trial import TrialSpec

MAY_LACK = {
    "attempts": frozenset({"failure", "stages", "seconds", "provenance", "optuna", "number"}),
    "measurements": frozenset({"samples", "baseline_samples"}),
    "frontier": frozenset[str](),
}
"""Columns of each kind without which a row still says what was found and how."""

_SPEC: dict[str, Callable[[TrialSpec], Any]] = {
    "trial_id": lambda spec: spec.trial_id,
    "study": lambda spec: spec.study,
    "recipe": lambda spec: spec.recipe.to_json(),
    "recipe_hash": lambda spec: spec.recipe.hash,
    "techniques": lambda spec: "+".join(spec.recipe.techniques),
    "label": lambda spec: spec.recipe.label(),
    "seed": lambda spec: spec.seed,
    "is_baseline": lambda spec: not spec.recipe.steps,
    "context": lambda spec: spec.context.digest,
    "device": lambda spec: spec.context.device,
}
"""Columns that follow from the spec, as ``schema.attempt_row`` makes them."""

_METRICS = frozenset(f.name for f in ATTEMPTS) & {*METRICS, *RATIOS, *BOUNDS}


def salvage(storage: Storage, name: str, kind: str) -> tuple[pa.Table, set[str]]:
    """Returns the rows of a damaged file that are as they were written, and the columns that are null in some of them.

    Raises:
        StorageFault: the storage does not give the file.
    """
    found, nulls = [empty(SCHEMAS[kind])], set[str]()
    for columns in readable_columns(storage, name, kind):
        whole = _completed(columns) if kind == "attempts" else columns
        lacking = set(SCHEMAS[kind].names) - whole.keys()
        if lacking <= MAY_LACK[kind]:
            count = len(next(iter(whole.values())))
            arrays = [whole[f.name] if f.name in whole else pa.nulls(count, f.type) for f in SCHEMAS[kind]]
            found.append(pa.Table.from_arrays(arrays, schema=SCHEMAS[kind]))
            nulls |= lacking
    return pa.concat_tables(found), nulls


def _completed(columns: Mapping[str, pa.Array]) -> dict[str, pa.Array]:
    """Adds to a row group of attempts the columns that follow from others."""
    made: dict[str, list[Any]] = {}
    lacking = set(ATTEMPTS.names) - columns.keys()
    if "spec" in columns and lacking & _SPEC.keys() and not columns["spec"].null_count:
        specs = [TrialSpec.from_dict(json.loads(text)) for text in columns["spec"].to_pylist()]
        made |= {name: [_SPEC[name](spec) for spec in specs] for name in lacking & _SPEC.keys()}
    if "metrics" in columns and lacking & _METRICS:
        metrics = [json.loads(text or "{}") for text in columns["metrics"].to_pylist()]
        made |= {name: [one.get(name) for one in metrics] for name in lacking & _METRICS}
    if "optuna" in columns and "number" in lacking:
        states = [json.loads(text or "null") or {} for text in columns["optuna"].to_pylist()]
        made["number"] = [state.get("number") for state in states]
    return {**columns, **{name: pa.array(values, ATTEMPTS.field(name).type) for name, values in made.items()}}
