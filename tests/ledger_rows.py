"""Rows of a ledger without training or timing anything, on each kind of storage."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.ledger import Ledger, attempt_row
from orchestrator.ledger.files import LedgerFiles
from orchestrator.ledger.schema import ATTEMPTS
from workers.node.storage import Storage, open_storage
from workers.trial import Context, Measurement, Recipe, Step, TrialResult, TrialSpec, trial_id

STUDY = "digits"


def make_row(
    n: int,
    *,
    attempt: str = "a",
    status: str = "ok",
    started_at: float | None = None,
    seed: int = 0,
    context: str = "one",
    metrics: dict[str, float] | None = None,
) -> dict:
    """Recipe ``n`` (0: the baseline) with one attempt."""
    recipe = Recipe((Step("tome", {"r": n}),) if n else ())
    where = Context({"name": context}, {}, {}, {})
    spec = TrialSpec(STUDY, trial_id(recipe, seed, where, {"tome": 1}), recipe, seed, where, "/nowhere")
    found = {"top1_pct": 98.0 - n, "size_bytes": 1000.0 - n, "depth_seen": 4.0} if metrics is None else metrics
    measured = Measurement(
        "latency", "k", "cpu", 1, 8, "quick", 2.5, "ms", 0.5, 0.4, 0.6, (2.0, 3.0), (4.0, 5.0), {"threads": 2}
    )
    result = TrialResult(
        trial_id=spec.trial_id,
        attempt_id=f"{attempt}{n}x{seed}",
        status=status,
        failure=None if status == "ok" else "it failed",
        metrics=found if status == "ok" else {},
        started_at=1000.0 + n if started_at is None else started_at,
        duration_s=1.5,
        measurements=(measured,) if status == "ok" else (),
    )
    return attempt_row(spec, result, {"number": n, "params": {"r": n}} if n else None)


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(tmp_path if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def settle(storage: Storage, study: str = STUDY) -> None:
    """Deletes what the newest generation has replaced, as the compactions after it do."""
    files = LedgerFiles(storage, study)
    newest = files.manifest()
    manifests, parts = files.superseded(newest, newest)
    replaced = [files.part(part, kind) for part in parts for kind in ("attempts", "measurements")]
    for name in (*newest.sources, *manifests, *replaced):
        storage.delete(name)


def ids(ledger: Ledger) -> list[str]:
    return sorted(ledger.attempts(["attempt_id"])["attempt_id"].to_pylist())


def files(storage: Storage, folder: str) -> list[str]:
    return storage.files(f"{STUDY}/{folder}")


def flip(storage: Storage, name: str, columns: pa.Schema, column: str) -> bytes:
    """Flips a bit in the data of a column, leaving all others as they are; returns the damaged file."""
    data = storage.read(name)
    chunk = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(columns.names.index(column))
    place = chunk.data_page_offset + chunk.total_compressed_size // 2
    place = max(place, (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 2)
    damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    storage.put_atomic(name, damaged)
    return damaged


def synthetic(n: int, start: int = 0) -> pa.Table:
    """n attempts without any file in between."""
    index = np.arange(start, start + n)
    columns = {f.name: pa.nulls(n, f.type) for f in ATTEMPTS}
    columns["trial_id"] = columns["attempt_id"] = columns["recipe_hash"] = pa.array([f"t{i}" for i in index])
    columns["status"] = pa.array(["ok"] * n)
    columns["number"] = pa.array(index)
    columns["is_baseline"] = pa.array([False] * n)
    return pa.table(columns, schema=ATTEMPTS)
