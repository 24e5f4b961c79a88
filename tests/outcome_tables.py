"""Small tables of outcomes, made by formula, as Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

OPERATIONS = ("conv", "none", "pool", "skip")
OBJECTIVES = {"accuracy": "maximize", "latency": "minimize"}
PARAMETERS = ("first", "second", "width", "dropout")


def rows() -> list[dict[str, Any]]:
    """Returns 4 x 4 x 5 x 3 configurations whose accuracy and latency are at odds."""
    gain = {"conv": 3.0, "none": 0.0, "pool": 1.0, "skip": 1.6}
    cost = {"conv": 4.0, "none": 0.0, "pool": 1.5, "skip": 0.4}
    return [
        {
            "first": a,
            "second": b,
            "width": width,
            "dropout": dropout,
            "accuracy": 50
            + gain[a]
            + 2 * gain[b]
            + 0.7 * gain[a] * (b == "skip")
            + width**0.5
            - 9 * (dropout - 0.25) ** 2,
            "latency": 1 + cost[a] + cost[b] + width / 16,
        }
        for a in OPERATIONS
        for b in OPERATIONS
        for width in (8, 16, 24, 64, 128)
        for dropout in (0.0, 0.25, 0.5)
    ]


def written(folder: Path, data: list[dict[str, Any]] | pa.Table) -> Path:
    """Writes rows as ``table.parquet`` in a folder; returns its path."""
    file = folder / "table.parquet"
    pq.write_table(data if isinstance(data, pa.Table) else pa.Table.from_pylist(data), file)
    return file
