"""Damaged, missing and foreign files are reported and hide nothing."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from orchestrator.ledger import Ledger, LedgerError, parquet_bytes
from orchestrator.ledger.schema import ATTEMPTS, MEASUREMENTS
from tests import ledger_rows
from tests.ledger_rows import STUDY, files, ids, make_row, synthetic
from workers.node.storage import Storage

storage = ledger_rows.storage


def test_foreign_and_truncated_files_are_reported_and_hide_nothing(storage):
    ledger = Ledger(storage, STUDY)
    ledger.write_attempt(make_row(1))
    ledger.compact()
    ledger.write_attempt(make_row(2))
    good = json.dumps(make_row(3)).encode()
    bad = {
        "attempts/cut.x.json": good[: len(good) // 2],
        "attempts/empty.x.json": b"",
        "attempts/list.x.json": b"[]",
        "attempts/foreign.x.json": b'{"hello": 1}',
        "attempts/newer.x.json": json.dumps({**make_row(3), "schema_version": 99}).encode(),
        "attempts/copy.x.json": good,
        "attempts/notes.txt": b"my notes",
        f"attempts/{make_row(4)['trial_id']}.a4x0.json": json.dumps(
            {**make_row(4), "metrics": {"top1_pct": "x"}}
        ).encode(),
        "asks/00000001.json": b"{",
        "ledger/readme.md": b"?",
    }
    for name, data in bad.items():
        storage.put_atomic(f"{STUDY}/{name}", data)
    assert ids(ledger) == ["a1x0", "a2x0"]
    problems = ledger.problems()
    assert {p.file for p in problems} == {f"{STUDY}/{name}" for name in bad}
    assert all(p.reason for p in problems)
    assert "99" in next(p.reason for p in problems if "newer" in p.file)
    assert ledger.compact() == 1
    assert ids(ledger) == ["a1x0", "a2x0"]
    assert all(storage.exists(f"{STUDY}/{name}") for name in bad)  # nothing is deleted that was not compacted


def damage(storage: Storage, kind: str) -> bytes:
    name = next(f for f in files(storage, "ledger") if f.startswith("attempts"))
    data = storage.read(f"{STUDY}/ledger/{name}")
    newer = ATTEMPTS.with_metadata({b"vitpareto": b'{"table": "attempts", "schema_version": 2}'})
    broken = {
        "truncated": data[: len(data) // 2],
        "flipped": data[:100] + bytes(b ^ 0xFF for b in data[100:140]) + data[140:],
        "foreign": parquet_bytes(pa.table({"a": [1]})),
        "newer": parquet_bytes(ATTEMPTS.empty_table().replace_schema_metadata(newer.metadata)),
    }
    storage.put_atomic(f"{STUDY}/ledger/{name}", broken[kind])
    return broken[kind]


@pytest.mark.parametrize("kind", ["truncated", "flipped", "foreign", "newer"])
def test_a_damaged_part_is_reported_and_the_rest_is_read(storage, kind):
    ledger = Ledger(storage, STUDY)
    ledger.append(synthetic(10))
    ledger.append(synthetic(2, start=100))
    broken = damage(storage, kind)
    assert ids(ledger) == ["t100", "t101"]
    assert [p for p in ledger.problems() if "attempts-000001" in p.file]
    ledger.append(synthetic(50, start=200))  # would merge the damaged one if it could
    assert len(ids(ledger)) == 52
    name = next(f for f in files(storage, "ledger") if f.startswith("attempts-000001"))
    assert storage.read(f"{STUDY}/ledger/{name}") == broken


def test_a_missing_part_is_reported(storage):
    ledger = Ledger(storage, STUDY)
    ledger.append(synthetic(10))
    ledger.append(synthetic(2, start=100))
    storage.delete(f"{STUDY}/ledger/{next(f for f in files(storage, 'ledger') if f.startswith('attempts'))}")
    assert ids(ledger) == ["t100", "t101"]
    assert "missing" in ledger.problems()[0].reason


@pytest.mark.parametrize("content", [b"{", b'{"schema_version": 9, "parts": [], "sources": []}', None])
def test_without_a_usable_manifest_all_parts_are_read_and_none_is_written(storage, content):
    ledger = Ledger(storage, STUDY)
    for n in range(4):
        ledger.append(synthetic(5, start=10 * n))
    ledger.write_attempt(make_row(1))
    manifest = f"{STUDY}/ledger/manifest-000004.json"
    storage.delete(manifest) if content is None else storage.put_atomic(manifest, content)
    assert len(ids(ledger)) == 21
    assert "manifest" in ledger.problems()[0].reason
    with pytest.raises(LedgerError, match="manifest"):
        ledger.compact()
    assert len(ids(ledger)) == 21


def test_an_older_file_without_a_column_reads_as_null(storage):
    ledger = Ledger(storage, STUDY)
    old = pa.schema([f for f in MEASUREMENTS if f.name != "ratio_low"], metadata=MEASUREMENTS.metadata)
    ledger.write_attempt(make_row(1))
    ledger.compact()
    name = next(f for f in files(storage, "ledger") if f.startswith("measurements"))
    table = ledger.measurements().select(old.names)
    storage.put_atomic(f"{STUDY}/ledger/{name}", parquet_bytes(table.replace_schema_metadata(old.metadata)))
    assert ledger.measurements(["ratio_low", "ratio"]).to_pylist() == [{"ratio_low": None, "ratio": 0.5}]
