"""Damaged, missing and foreign files are reported and hide nothing."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from orchestrator.ledger import Ledger, LedgerError, LedgerWarning, parquet_bytes
from orchestrator.ledger.schema import ATTEMPTS, MEASUREMENTS
from tests import ledger_rows
from tests.ledger_rows import STUDY, files, flip, ids, make_row, settle, synthetic
from workers.node.storage import LocalStorage, Storage, StorageFault

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
    assert told(ledger) == ["a1x0", "a2x0"]
    problems = ledger.problems()
    assert {p.file for p in problems if not p.hides_rows} == {
        f"{STUDY}/{name}" for name in ("attempts/notes.txt", "asks/00000001.json", "ledger/readme.md")
    }
    assert {p.file for p in problems} == {f"{STUDY}/{name}" for name in bad}
    assert all(p.reason for p in problems)
    assert "99" in next(p.reason for p in problems if "newer" in p.file)
    assert ledger.compact() == 1
    assert told(ledger) == ["a1x0", "a2x0"]
    assert all(storage.exists(f"{STUDY}/{name}") for name in bad)  # nothing is deleted that was not compacted


def told(ledger: Ledger) -> list[str]:
    """Returns the ids that an answer holds which says that rows are missing from it."""
    with pytest.warns(LedgerWarning, match=f"vitpareto repair {STUDY}"):
        return ids(ledger)


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
    assert told(ledger) == ["t100", "t101"]
    assert [p for p in ledger.problems() if "attempts-000001" in p.file]
    ledger.append(synthetic(50, start=200))  # would merge the damaged one if it could
    assert len(told(ledger)) == 52
    name = next(f for f in files(storage, "ledger") if f.startswith("attempts-000001"))
    assert storage.read(f"{STUDY}/ledger/{name}") == broken


def test_a_missing_part_is_reported(storage):
    ledger = Ledger(storage, STUDY)
    ledger.append(synthetic(10))
    ledger.append(synthetic(2, start=100))
    storage.delete(f"{STUDY}/ledger/{next(f for f in files(storage, 'ledger') if f.startswith('attempts'))}")
    assert told(ledger) == ["t100", "t101"]
    assert "missing" in ledger.problems()[0].reason


@pytest.mark.parametrize("content", [b"{", b'{"schema_version": 9, "parts": [], "sources": []}'])
def test_without_a_usable_manifest_all_parts_are_read_and_none_is_written(storage, content):
    ledger = Ledger(storage, STUDY)
    for n in range(4):
        ledger.append(synthetic(5, start=10 * n))
    ledger.write_attempt(make_row(1))
    manifest = f"{STUDY}/ledger/manifest-000004.json"
    storage.put_atomic(manifest, content)
    assert len(told(ledger)) == 21
    assert "manifest" in ledger.problems()[0].reason
    with pytest.raises(LedgerError, match="manifest"):
        ledger.compact()
    assert len(told(ledger)) == 21


def test_a_manifest_that_was_removed_costs_nothing(storage):
    ledger = Ledger(storage, STUDY)
    for n in range(4):
        ledger.append(synthetic(5, start=10 * n))
    ledger.write_attempt(make_row(1))
    storage.delete(f"{STUDY}/ledger/manifest-000004.json")
    for _ in range(3):
        assert len(ids(ledger)) == 21
        ledger.compact()
    assert ledger.problems() == []


def test_without_any_manifest_all_parts_are_read_and_none_is_written(storage):
    ledger = Ledger(storage, STUDY)
    for n in range(4):
        ledger.append(synthetic(5, start=10 * n))
    for name in files(storage, "ledger"):
        if name.startswith("manifest"):
            storage.delete(f"{STUDY}/ledger/{name}")
    assert len(told(ledger)) == 20
    with pytest.raises(LedgerError, match="was a manifest removed"):
        ledger.compact()
    assert len(told(ledger)) == 20


def test_a_damaged_newest_generation_leaves_the_one_before(storage):
    """Deleting is a generation late: a part that rots at once takes nothing with it that has been there before."""
    ledger = Ledger(storage, STUDY)
    for n in range(3):
        ledger.write_attempt(make_row(n))
        ledger.compact()
    for name in files(storage, "ledger"):
        if "-000003-" in name:
            storage.put_atomic(f"{STUDY}/ledger/{name}", b"rotten")
    assert ids(ledger) == ["a0x0", "a1x0", "a2x0"], "without a word"
    assert {p.hides_rows for p in ledger.problems()} == {False}
    ledger.check_whole()
    for n in (3, 4, 5):
        ledger.write_attempt(make_row(n))
        ledger.compact()
    assert ids(ledger) == [f"a{n}x0" for n in range(6)]
    assert ledger.problems() == [], "what is not needed any more is not named"


@pytest.mark.parametrize("kind", ["attempts", "measurements"])
def test_a_rotten_half_of_the_newest_part_is_made_again_by_the_next_compaction(storage, kind):
    ledger = Ledger(storage, STUDY)
    for n in range(5):
        ledger.write_attempt(make_row(n))
        if n % 2:
            ledger.compact()
    name = part(storage, kind)
    data = storage.read(name)
    storage.put_atomic(name, data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    for n in range(5, 9):
        Ledger(storage, STUDY).compact()
        fresh = Ledger(storage, STUDY)
        assert (len(ids(fresh)), len(fresh.measurements(["attempt_id"])), fresh.problems()) == (n, n, [])
        fresh.write_attempt(make_row(n))


def test_an_older_file_without_a_column_reads_as_null(storage):
    ledger = Ledger(storage, STUDY)
    old = pa.schema([f for f in MEASUREMENTS if f.name != "ratio_low"], metadata=MEASUREMENTS.metadata)
    ledger.write_attempt(make_row(1))
    ledger.compact()
    name = next(f for f in files(storage, "ledger") if f.startswith("measurements"))
    table = ledger.measurements().select(old.names)
    storage.put_atomic(f"{STUDY}/ledger/{name}", parquet_bytes(table.replace_schema_metadata(old.metadata)))
    assert ledger.measurements(["ratio_low", "ratio"]).to_pylist() == [{"ratio_low": None, "ratio": 0.5}]


def part(storage: Storage, kind: str, number: int = -1) -> str:
    return f"{STUDY}/ledger/{[f for f in files(storage, 'ledger') if f.startswith(kind)][number]}"


def written(storage: Storage, count: int = 4) -> Ledger:
    """A compacted ledger of real rows: a baseline and trials with a measurement each."""
    ledger = Ledger(storage, STUDY)
    for n in range(count):
        ledger.write_attempt(make_row(n))
    ledger.compact()
    settle(storage)
    return ledger


@pytest.mark.parametrize(("kind", "other"), [("attempts", "measurements"), ("measurements", "attempts")])
@pytest.mark.parametrize("how", ["empty", "missing"])
def test_a_damaged_half_of_a_part_does_not_hide_the_other(storage, kind, other, how):
    ledger = written(storage)
    name = part(storage, kind)
    storage.delete(name) if how == "missing" else storage.put_atomic(name, b"")
    read = {"attempts": ledger.attempts, "measurements": ledger.measurements}
    assert len(read[other](["attempt_id"])) == 4  # without a word: nothing that was asked is missing
    with pytest.warns(LedgerWarning, match=name):
        assert len(read[kind](["attempt_id"])) == 0
    assert [(p.file, p.hides_rows) for p in ledger.problems()] == [(name, True)]


def test_every_flipped_bit_of_a_part_is_noticed(storage):
    ledger = written(storage)
    for name in (part(storage, "attempts"), part(storage, "measurements")):
        data = storage.read(name)
        for place in range(0, len(data), 211):
            storage.put_atomic(name, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert [p.file for p in ledger.problems()] == [name], place
        storage.put_atomic(name, data)
    assert ledger.problems() == []


def test_without_digests_every_column_s_checksum_is_verified(storage):
    ledger = written(storage)
    manifest = f"{STUDY}/ledger/manifest-000001.json"
    old = json.loads(storage.read(manifest))
    del old["digest"]
    for one in old["parts"]:  # as it was written before there were digests
        del one["contents"]
    storage.put_atomic(manifest, json.dumps(old).encode())
    assert (ledger.problems(), len(ids(ledger))) == ([], 4)
    name = part(storage, "attempts")
    flip(storage, name, ATTEMPTS, "top1_pct")
    assert len(ids(ledger)) == 4  # which needs no damaged column
    assert [p.file for p in ledger.problems()] == [name]


def test_a_manifest_that_lacks_a_part_is_damaged(storage):
    ledger = Ledger(storage, STUDY)
    ledger.append(synthetic(10))
    ledger.append(synthetic(2, start=100))
    manifest = f"{STUDY}/ledger/manifest-000002.json"
    whole = json.loads(storage.read(manifest))
    without_digest = {key: value for key, value in whole.items() if key != "digest"}
    for bad in ({**whole, "parts": whole["parts"][1:]}, {**whole, "sources": ["x"]}, {**without_digest, "parts": []}):
        storage.put_atomic(manifest, json.dumps(bad).encode())
        assert len(told(ledger)) == 12
        assert "manifest-000002.json is damaged" in ledger.problems()[0].reason
    storage.put_atomic(manifest, json.dumps(without_digest).encode())  # as it was written before
    assert (len(ids(ledger)), ledger.problems()) == (12, [])


def test_a_first_manifest_that_is_gone_hides_nothing(storage):
    ledger = written(storage)
    storage.delete(f"{STUDY}/ledger/manifest-000001.json")
    for _ in range(3):
        assert ids(ledger) == ["a0x0", "a1x0", "a2x0", "a3x0"]
        assert ledger.problems() == []
        ledger.compact()


def test_a_storage_that_does_not_answer_is_no_damage(tmp_path):
    class Silent(LocalStorage):
        def read(self, name: str) -> bytes:
            raise StorageFault(5, "no answer", name)

    written(LocalStorage(tmp_path))
    Ledger(LocalStorage(tmp_path), STUDY).write_attempt(make_row(9))
    ledger = Ledger(Silent(tmp_path), STUDY)
    for ask in (ids, Ledger.problems):
        with pytest.raises(StorageFault):
            ask(ledger)


def test_a_run_is_refused_while_rows_are_missing(storage):
    ledger = written(storage)
    ledger.check_whole()
    storage.put_atomic(f"{STUDY}/asks/foreign.json", b"{}")
    ledger.check_whole()  # no row is missing with it
    storage.put_atomic(part(storage, "attempts"), b"PAR1")
    with pytest.raises(LedgerError, match=f"(?s)attempts-000001-.*is damaged.*vitpareto repair {STUDY}"):
        ledger.check_whole()
