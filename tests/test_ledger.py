"""The ledger keeps every attempt once, whatever is killed, damaged or read meanwhile."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from orchestrator import ledger as ledger_module
from orchestrator.columns import booleans, equals, floats, group_numbers, integers, to_arrow
from orchestrator.ledger import Ledger, LedgerError, attempt_row, parquet_bytes
from orchestrator.ledger_schema import ATTEMPTS, MEASUREMENTS
from workers.protocol import Context, Measurement, Recipe, Step, TrialResult, TrialSpec, trial_id
from workers.storage import LocalStorage, Storage, open_storage

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


def ids(ledger: Ledger) -> list[str]:
    return sorted(ledger.attempts(["attempt_id"])["attempt_id"].to_pylist())


def files(storage: Storage, folder: str) -> list[str]:
    return storage.files(f"{STUDY}/{folder}")


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_survives_the_file_and_compaction(storage):
    ledger = Ledger(storage, STUDY)
    assert ledger.trials().num_rows == 0
    ledger.write_attempt(make_row(0))
    ledger.write_attempt(make_row(3))
    before = ledger.attempts().sort_by("trial_id"), ledger.measurements().sort_by("trial_id")
    assert ledger.compact() == 2
    assert files(storage, "attempts") == []
    assert ledger.attempts().sort_by("trial_id").equals(before[0])
    assert ledger.measurements().sort_by("trial_id").equals(before[1])
    row = next(r for r in ledger.trials().to_pylist() if r["number"] == 3)
    assert (row["top1_pct"], row["size_bytes"], row["macs"]) == (95.0, 997.0, None)
    assert json.loads(row["metrics"])["depth_seen"] == 4.0
    assert (row["techniques"], row["label"], row["is_baseline"]) == ("tome", "tome(r=3)", False)
    assert row["started_at"].timestamp() == 1003.0
    assert json.loads(row["optuna"])["params"] == {"r": 3}
    measured = ledger.measurements().to_pylist()[0]
    assert (measured["samples"], json.loads(measured["conditions"])) == ([2.0, 3.0], {"threads": 2})
    assert ledger.problems() == []


def test_a_trial_can_be_rerun_from_its_row(storage):
    ledger = Ledger(storage, STUDY)
    ledger.write_attempt(make_row(2))
    spec = TrialSpec.from_dict(json.loads(ledger.attempts(["spec"])["spec"][0].as_py()))
    assert (spec.trial_id, spec.recipe.label()) == (make_row(2)["trial_id"], "tome(r=2)")


def test_an_attempt_is_written_once(storage):
    ledger = Ledger(storage, STUDY)
    assert ledger.write_attempt(make_row(1))
    assert not ledger.write_attempt(make_row(1, metrics={"top1_pct": 0.0}))
    assert ledger.trials(["top1_pct"])["top1_pct"].to_pylist() == [97.0]


def test_nan_becomes_null_and_bad_rows_are_refused(storage):
    ledger = Ledger(storage, STUDY)
    ledger.write_attempt(make_row(1, metrics={"top1_pct": math.nan, "size_bytes": math.inf}))
    assert ledger.trials(["top1_pct", "size_bytes"]).to_pylist() == [{"top1_pct": None, "size_bytes": None}]
    with pytest.raises(ValueError, match="lacks"):
        ledger.write_attempt({"schema_version": 1})
    with pytest.raises(ValueError, match="attempt_id"):
        ledger.write_attempt({**make_row(2), "attempt_id": "../../escape"})


def test_columns_and_unknown_columns(storage):
    ledger = Ledger(storage, STUDY)
    ledger.write_attempt(make_row(1))
    assert ledger.trials(["top1_pct", "trial_id"]).column_names == ["top1_pct", "trial_id"]
    with pytest.raises(KeyError, match="no column nonsense"):
        ledger.trials(["nonsense"])


# --- trials -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compacted", [False, True])
def test_accepted_attempt(storage, compacted):
    ledger = Ledger(storage, STUDY)
    attempts = [("a", "worker_died", 1.0), ("c", "ok", 3.0), ("b", "ok", 3.0), ("d", "ok", 2.5), ("e", "timeout", 9.0)]
    for name, status, time in attempts:
        ledger.write_attempt(make_row(1, attempt=name, status=status, started_at=time))
    for name, status, time in [("x", "node_lost", 1.0), ("y", "error", 5.0), ("z", "timeout", 4.0)]:
        ledger.write_attempt(make_row(2, attempt=name, status=status, started_at=time))
    for name in "qp":
        ledger.write_attempt(make_row(3, attempt=name))
    if compacted:
        ledger.compact()
    rows = {r["number"]: r for r in ledger.trials().to_pylist()}
    assert {n: (r["attempt_id"][0], r["status"], r["attempts"]) for n, r in rows.items()} == {
        1: ("d", "ok", 5),
        2: ("y", "error", 3),
        3: ("p", "ok", 2),
    }


@pytest.mark.parametrize(
    "names",
    [
        ["00ff", "0100", "00ff", "abcd"],
        ["f" * 16, "0" * 16, "f" * 16],
        ["00ff", "00FF", "00ff"],
        ["a", "bb", "a"],
        ["0:", "0;", "0/", "0:"],
        ["é0", "00f", "é0"],
        ["g0", "g1", "g0"],
        ["", "", "a"],
        ["0" * 17, "1" + "0" * 16, "0" * 17],
        [],
    ],
)
def test_equal_names_get_one_number(names):
    chunks = pa.chunked_array([names[:1], names[1:]], pa.string())
    numbers, count = group_numbers(chunks.slice(0))
    assert count == len(set(names))
    assert [names.index(n) for n in names] == [numbers.tolist().index(k) for k in numbers.tolist()]
    if names:
        tail, count = group_numbers(pa.chunked_array([pa.array(names).slice(1)]))
        assert (count, len(tail)) == (len(set(names[1:])), len(names) - 1)


def test_columns_become_arrays_and_back():
    parts = [pa.array([None, 1, 2]), pa.array([3, 4, None, 5]).slice(1), pa.array([], pa.int64())]
    whole = pa.chunked_array(parts, pa.int64())
    assert integers(whole).tolist() == [0, 1, 2, 4, 0, 5]
    reals = floats(whole.cast(pa.float64()))
    assert np.array_equal(reals, [np.nan, 1, 2, 4, np.nan, 5], equal_nan=True)
    assert to_arrow(reals).equals(whole.cast(pa.float64()).combine_chunks())
    flags = pa.chunked_array([pa.array([True] * 9 + [None, False, True]).slice(7), pa.array([None, True])])
    assert booleans(flags).tolist() == [True, True, False, False, True, False, True]
    assert to_arrow(booleans(flags)).to_pylist() == booleans(flags).tolist()
    text = pa.chunked_array(
        [pa.array(["ok", None, "error", "ok"]).slice(1), pa.array(["error"]), pa.array([], pa.string())]
    )
    assert equals(text, "ok").tolist() == [False, False, True, False]
    for empty in (pa.chunked_array([], pa.int64()), pa.chunked_array([pa.array([], pa.int64())])):
        assert len(integers(empty)) == len(floats(empty)) == len(booleans(empty.cast(pa.bool_()))) == 0


def test_derived_columns_use_the_baseline_of_the_same_context(storage):
    ledger = Ledger(storage, STUDY, ["top1_pct_drop <= 2", "size_bytes_ratio < 1"])
    ledger.write_attempt(make_row(1))
    assert ledger.trials(["top1_pct_drop", "feasible"]).to_pylist() == [{"top1_pct_drop": None, "feasible": False}]
    ledger.write_attempt(make_row(0))
    ledger.write_attempt(make_row(0, context="two", attempt="t", metrics={"top1_pct": 50.0, "size_bytes": 500.0}))
    ledger.write_attempt(make_row(3))
    ledger.write_attempt(make_row(4, status="timeout"))
    ledger.write_attempt(
        make_row(5, context="two", metrics={"top1_pct": 49.0, "size_bytes": 100.0, "size_bytes_ratio": 0.25})
    )
    rows = {
        r["number"]: r
        for r in ledger.trials(["number", "top1_pct_drop", "size_bytes_ratio", "feasible"]).to_pylist()
        if r["number"]
    }
    assert rows[1] == {"number": 1, "top1_pct_drop": 1.0, "size_bytes_ratio": 0.999, "feasible": True}
    assert (rows[3]["top1_pct_drop"], rows[3]["feasible"]) == (3.0, False)
    assert (rows[4]["top1_pct_drop"], rows[4]["feasible"]) == (None, False)
    assert (rows[5]["top1_pct_drop"], rows[5]["size_bytes_ratio"], rows[5]["feasible"]) == (
        1.0,
        0.25,
        True,
    )  # as measured


# --- asks, marks, frontier --------------------------------------------------------------------------------------------


def test_asks_and_running_marks(storage):
    ledger = Ledger(storage, STUDY)
    for number in (10, 9):
        ledger.write_ask("one", number, {"params": {"r": number}})
    ledger.write_ask("two", 1, {})
    assert [a["number"] for a in ledger.asks("one")] == [9, 10]
    row = make_row(1)
    ledger.mark_running(row["trial_id"], {"host": "here"})
    assert ledger.running()[row["trial_id"]]["host"] == "here"
    ledger.write_attempt(row)
    assert ledger.running() == {}


def test_outcomes_are_those_of_accepted_attempts(storage):
    ledger = Ledger(storage, STUDY)
    lost, good = make_row(1, status="worker_died", attempt="w"), make_row(1)
    slow, other = make_row(2, status="timeout"), make_row(3, context="two")
    for row in (lost, good, slow, other):
        ledger.write_attempt(row)
    found = ledger.outcomes(good["context"])
    assert {t: s for t, (s, _) in found.items()} == {good["trial_id"]: "ok", slow["trial_id"]: "timeout"}
    assert found[good["trial_id"]][1] == {"top1_pct": 97.0, "size_bytes": 999.0, "depth_seen": 4.0}
    assert list(ledger.outcomes(good["context"], [slow["trial_id"], "unknown"])) == [slow["trial_id"]]


def test_the_study_record(storage):
    ledger = Ledger(storage, STUDY)
    assert ledger.study_record() is None
    ledger.write_study({"config": {"trials": 3}})
    assert ledger.study_record() == {"config": {"trials": 3}}
    storage.put_atomic(f"{STUDY}/study.json", b"{")
    with pytest.raises(LedgerError, match=r"study\.json is damaged"):
        ledger.study_record()


def test_the_report_split_is_added_to_a_finished_trial(storage):
    ledger = Ledger(storage, STUDY)
    row, other = make_row(1), make_row(2)
    ledger.write_attempt(row)
    ledger.compact()
    ledger.write_attempt(other)
    report = {**row["measurements"][0], "kind": "accuracy_report", "value": 97.5, "unit": "percent"}
    assert ledger.write_report(row["trial_id"], row["recipe_hash"], report)
    assert not ledger.write_report(row["trial_id"], row["recipe_hash"], {**report, "value": 1.0})
    assert ledger.write_report(other["trial_id"], other["recipe_hash"], report)
    assert ledger.reported() == {row["trial_id"], other["trial_id"]}
    rows = ledger.measurements(["attempt_id", "kind", "value"]).to_pylist()
    found = [(r["attempt_id"], r["kind"], r["value"]) for r in rows]
    reports = [(None, "accuracy_report", 97.5)] * 2
    assert found == [("a1x0", "latency", 2.5), ("a2x0", "latency", 2.5), *reports]
    storage.put_atomic(f"{STUDY}/reports/x.json", b'{"schema_version": 1}')
    assert [p.file for p in ledger.problems()] == [f"{STUDY}/reports/x.json"]
    assert ledger.measurements().num_rows == 4


def test_later_measurements_stand_beside_the_trials_own(storage):
    ledger = Ledger(storage, STUDY)
    row = make_row(1)
    ledger.write_attempt(row)
    later = [{**row["measurements"][0], "value": value} for value in (3.0, 4.0)]
    ledger.write_remeasurement(row["trial_id"], row["recipe_hash"], later)
    ledger.write_remeasurement(row["trial_id"], row["recipe_hash"], later[:1])
    assert ledger.remeasured() == [row["trial_id"]] * 2
    assert ledger.reported() == set()
    ledger.compact()
    found = ledger.measurements(["attempt_id", "trial_id", "value"]).to_pylist()
    assert sorted((r["attempt_id"] or "", r["value"]) for r in found) == [
        ("", 3.0),
        ("", 3.0),
        ("", 4.0),
        ("a1x0", 2.5),
    ]
    assert {r["trial_id"] for r in found} == {row["trial_id"]}
    assert ledger.problems() == []


def test_frontier_keeps_its_history(storage):
    ledger = Ledger(storage, STUDY, context="c")
    assert ledger.frontier().num_rows == 0
    ledger.write_attempt(make_row(1))
    ledger.write_attempt(make_row(2))
    options = {"objectives": ["top1_pct", "size_bytes"], "reference": [0.0, 1.1]}
    assert ledger.write_frontier(ledger.trials().slice(0, 0), None, 0, **options) == 1
    assert ledger.write_frontier(ledger.trials(), 0.5, 2, **options) == 2
    history = ledger.frontier().to_pylist()
    assert [(h["snapshot"], h["trials"], h["hypervolume"]) for h in history] == [(1, 0, None), (2, 2, 0.5), (2, 2, 0.5)]
    assert (history[0]["trial_id"], history[0]["context"], history[1]["reference"]) == (None, "c", [0.0, 1.1])
    assert {(h["label"], h["size_bytes"]) for h in history[1:]} == {("tome(r=1)", 999.0), ("tome(r=2)", 998.0)}
    storage.put_atomic(f"{STUDY}/frontier.parquet", b"PAR1 broken")
    assert [p.file for p in ledger.problems()] == [f"{STUDY}/frontier.parquet"]
    assert ledger.write_frontier(ledger.trials(), 0.5, 2, **options) == 1
    assert any(".damaged-" in name for name in storage.files(STUDY))


# --- compaction -------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class KilledAt:
    """A storage whose process dies before its ``n``-th write or deletion."""

    def __init__(self, storage: Storage, n: int) -> None:
        self.inner, self.left = storage, n

    def __getattr__(self, name: str):
        method = getattr(self.inner, name)
        if name not in ("put_atomic", "put_if_absent", "delete"):
            return method

        def counted(*args):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return method(*args)

        return counted


def test_killed_at_any_point_nothing_is_lost_or_repeated(storage):
    for row in range(3):
        Ledger(storage, STUDY).write_attempt(make_row(row))
    Ledger(storage, STUDY).compact()
    for n in range(40):
        ledger = Ledger(storage, STUDY)
        for k in range(3):
            ledger.write_attempt(make_row(100 * (n + 1) + k))
        expected = 3 * (n + 2)
        dying = Ledger(KilledAt(storage, n), STUDY)  # type: ignore[arg-type]
        try:
            dying.compact()
            finished = True
        except Killed:
            finished = False
        assert len(set(ids(ledger))) == len(ids(ledger)) == expected, n
        assert ledger.trials(["attempts"])["attempts"].to_pylist() == [1] * expected
        assert ledger.measurements(["trial_id"]).num_rows == expected
        assert ledger.problems() == []
        ledger.compact()
        assert len(ids(ledger)) == expected
        assert len(files(storage, "attempts")) == 0
        assert len([f for f in files(storage, "ledger") if f.startswith("manifest")]) == 1
        if finished:
            return
    raise AssertionError("never finished")


def test_a_second_compactor_loses_and_deletes_nothing(storage, monkeypatch):
    first, second = Ledger(storage, STUDY), Ledger(storage, STUDY)
    first.write_attempt(make_row(1))
    real = ledger_module.parquet_bytes

    def overtaken(table):
        monkeypatch.setattr(ledger_module, "parquet_bytes", real)
        second.write_attempt(make_row(2))
        assert second.compact() == 2
        return real(table)

    monkeypatch.setattr(ledger_module, "parquet_bytes", overtaken)
    assert first.compact() == 0
    assert ids(first) == ["a1x0", "a2x0"]
    assert len(files(storage, "ledger")) == 3


def test_a_stale_compactor_that_creates_an_old_generation_loses(storage, monkeypatch):
    first, second = Ledger(storage, STUDY), Ledger(storage, STUDY)
    first.write_attempt(make_row(1))
    real = ledger_module.parquet_bytes

    def overtaken_twice(table):
        monkeypatch.setattr(ledger_module, "parquet_bytes", real)
        for n in (2, 3):
            second.write_attempt(make_row(n))
            second.compact()
        return real(table)

    monkeypatch.setattr(ledger_module, "parquet_bytes", overtaken_twice)
    assert first.compact() == 0
    first.write_attempt(make_row(4))
    first.compact()
    assert ids(first) == ["a1x0", "a2x0", "a3x0", "a4x0"]
    assert first.problems() == []


def test_an_attempt_written_again_after_compaction_stays_one(storage):
    ledger = Ledger(storage, STUDY)
    for _ in range(3):
        ledger.write_attempt(make_row(1))
        ledger.compact()
    assert ids(ledger) == ["a1x0"]
    assert ledger.measurements().num_rows == 1
    assert ledger.trials(["attempts"])["attempts"].to_pylist() == [1]


def test_files_stay_few_and_rows_are_seldom_rewritten(tmp_path, monkeypatch):
    ledger, written = Ledger(LocalStorage(tmp_path), STUDY), []
    real = ledger_module.parquet_bytes
    monkeypatch.setattr(ledger_module, "parquet_bytes", lambda t: written.append(len(t)) or real(t))
    for n in range(64):
        ledger.append(synthetic(10, start=10 * n))
    assert len(ids(ledger)) == 640
    assert len(files(ledger.storage, "ledger")) <= 2 * 7 + 1
    assert sum(written) <= 640 * 8
    assert ledger.compact(min_rows=1) == 0


def synthetic(n: int, start: int = 0) -> pa.Table:
    """n attempts without any file in between."""
    index = np.arange(start, start + n)
    columns = {f.name: pa.nulls(n, f.type) for f in ATTEMPTS}
    columns["trial_id"] = columns["attempt_id"] = columns["recipe_hash"] = pa.array([f"t{i}" for i in index])
    columns["status"] = pa.array(["ok"] * n)
    columns["number"] = pa.array(index)
    columns["is_baseline"] = pa.array([False] * n)
    return pa.table(columns, schema=ATTEMPTS)


# --- damage -----------------------------------------------------------------------------------------------------------


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


# --- concurrency ------------------------------------------------------------------------------------------------------

READER = """
import json, sys, time
from orchestrator.ledger import Ledger
from workers.storage import open_storage
ledger, reads, last = Ledger(open_storage(sys.argv[1]), "digits"), 0, set()
print("ready", flush=True)
while True:
    found = ledger.attempts(["attempt_id"])["attempt_id"].to_pylist()
    trials, measured = ledger.trials(["trial_id", "status"]).num_rows, ledger.measurements(["attempt_id"]).num_rows
    assert len(found) == len(set(found)), "an attempt was seen twice"
    assert last <= set(found), f"attempts disappeared: {last - set(found)}"
    assert trials >= len(found) and measured >= len(found)
    assert ledger.problems() == [], ledger.problems()
    last, reads = set(found), reads + 1
    if len(found) >= int(sys.argv[2]):
        break
print(reads)
"""


def test_a_second_process_always_sees_a_consistent_state(tmp_path):
    total = 120
    command = [sys.executable, "-c", READER, str(tmp_path), str(total)]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    ledger, rng = Ledger(LocalStorage(tmp_path), STUDY), np.random.default_rng(0)
    for n in range(total):
        ledger.write_attempt(make_row(n))
        if rng.random() < 0.4:
            ledger.compact()
    out, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0
    assert int(out) >= 3


def test_a_frontier_imports_neither_torch_nor_ray_nor_pandas(tmp_path):
    ledger = Ledger(LocalStorage(tmp_path), STUDY)
    ledger.append(synthetic(5))
    code = (
        "import sys, orchestrator.rows; from orchestrator.ledger import Ledger; from orchestrator.query import pareto, sql\n"
        "from workers.storage import open_storage; ledger = Ledger(open_storage(sys.argv[1]), 'digits')\n"
        "assert pareto(ledger, ['top1_pct'], where='size_bytes < 3').num_rows == 0\n"
        "assert sql(ledger, 'select number from trials').num_rows == 5\n"
        "print([m for m in ('torch', 'ray', 'optuna', 'pandas') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert found.stdout.strip() == "[]"


def test_only_the_ledger_writes_parquet():
    root = Path(__file__).parent.parent
    writers = {
        path.name
        for folder in ("orchestrator", "workers")
        for path in (root / folder).rglob("*.py")
        if ".write_table(" in path.read_text() or "ParquetWriter(" in path.read_text()
    }
    assert writers == {"ledger.py"}
