"""The ledger keeps every attempt once, with what belongs to it."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from orchestrator.ledger import Ledger, LedgerError, LedgerWarning
from tests import ledger_rows
from tests.ledger_rows import STUDY, make_row, synthetic
from tests.places import ROOT
from workers.node.storage import LocalStorage
from workers.trial import TrialSpec

storage = ledger_rows.storage

ASK = {"recipe": "[]", "params": {}, "distributions": {}, "system_attrs": {}}


def test_a_row_survives_the_file_and_compaction(storage):
    ledger = Ledger(storage, STUDY)
    assert ledger.trials().num_rows == 0
    ledger.write_attempt(make_row(0))
    ledger.write_attempt(make_row(3))
    before = ledger.attempts().sort_by("trial_id"), ledger.measurements().sort_by("trial_id")
    assert ledger.compact() == 2
    assert ledger.compact() == 0
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


def test_asks_and_running_marks(storage):
    ledger = Ledger(storage, STUDY)
    for number in (10, 9):
        ledger.write_ask("one", number, {**ASK, "params": {"r": number}})
    ledger.write_ask("two", 1, ASK)
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
    config = {"trials": 3, "objectives": {"params": "minimize"}, "techniques": {"tome": {}}, "constraints": []}
    record = {"config": config, "context": "one", "token": "t"}
    ledger.write_study(record)
    assert ledger.study_record() == record
    others = [{**record, "config": {**config, key: 7 if key != "trials" else "7"}} for key in config]
    for content in (b"{", b"[]", b"{}", *(json.dumps(one).encode() for one in others)):
        storage.put_atomic(f"{STUDY}/study.json", content)
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
    with pytest.warns(LedgerWarning, match=r"reports/x\.json"):
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


def test_a_frontier_imports_neither_torch_nor_ray_nor_pandas(tmp_path):
    ledger = Ledger(LocalStorage(tmp_path), STUDY)
    ledger.append(synthetic(5))
    code = (
        "import sys, orchestrator.words.rows; from orchestrator.ledger import Ledger; from orchestrator.frontier.query import pareto, sql\n"
        "from workers.node.storage import open_storage; ledger = Ledger(open_storage(sys.argv[1]), 'digits')\n"
        "assert pareto(ledger, ['top1_pct'], where='size_bytes < 3').num_rows == 0\n"
        "assert sql(ledger, 'select number from trials').num_rows == 5\n"
        "print([m for m in ('torch', 'ray', 'optuna', 'pandas') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_only_the_ledger_writes_parquet():
    root = ROOT
    writers = {
        path.name
        for folder in ("orchestrator", "workers")
        for path in (root / folder).rglob("*.py")
        if ".write_table(" in path.read_text() or "ParquetWriter(" in path.read_text()
    }
    assert writers == {"parquet_files.py"}
