"""Rows of trials that were stopped early: which attempt counts, what status, show, report and the dashboard say of them."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.ledger import Ledger
from orchestrator.ledger.records import row_fault
from orchestrator.ledger.show import describe_trial, find_trial
from orchestrator.ledger.status import for_people, study_status
from orchestrator.ledger.stopped import by_rung, rungs, stopped_trials
from orchestrator.report.read import read_report
from orchestrator.report.render import page_data
from orchestrator.report.sentences import facts
from orchestrator.study.load import load_study
from orchestrator.sweep.dashboard import trial_notes
from tests.ledger_rows import STUDY, make_row
from tests.studies import tiny_study
from workers.node.storage import Storage, open_storage


def at_rung(n: int, rung: float, *, started_at: float, epochs: float) -> dict[str, Any]:
    row = make_row(n, attempt=f"r{round(rung * 1000)}", started_at=started_at)
    stage = {"kind": "recovery", "key": "k", "cached": False, "duration_s": 1.0, "epochs": epochs}
    more = {"status": "stopped", "rung": rung, "measurements": [], "stages": [stage], "artefact": None}
    return {**row, **more, "metrics": {"top1_pct": 50 + 100 * rung, "size_bytes": 1000.0 - n}}


@pytest.fixture
def ledger() -> Ledger:
    """The baseline; 1 stopped at the second rung; 2 and 3 went on from the first, 2 to its end, 3 to its worker's; 4 at the first."""
    storage: Storage = open_storage("memory://stopped")
    rows = [
        make_row(0),
        at_rung(1, 0.125, started_at=1001, epochs=1),
        at_rung(1, 0.375, started_at=1011, epochs=2),
        at_rung(2, 0.125, started_at=1002, epochs=1),
        make_row(2, started_at=1012),
        at_rung(3, 0.125, started_at=1003, epochs=1),
        make_row(3, attempt="w", status="worker_died", started_at=1013),
        at_rung(4, 0.125, started_at=1004, epochs=1),
    ]
    ledger = Ledger(storage, STUDY, context=rows[0]["context"])
    for row in rows:
        ledger.write_attempt(row)
    config = load_study(tiny_study(STUDY, trials=4)).to_dict()
    ledger.write_study({"config": config, "token": "", "context": rows[0]["context"]})
    return ledger


def test_a_stopped_attempt_gives_way_to_an_end_and_to_what_came_later(ledger: Ledger) -> None:
    rows = {r["number"]: r for r in ledger.trials(["number", "status", "rung", "attempts", "feasible"]).to_pylist()}
    found = {number: (r["status"], r["rung"], r["attempts"]) for number, r in rows.items()}
    assert found == {
        None: ("ok", None, 1),
        1: ("stopped", 0.375, 2),
        2: ("ok", None, 2),
        3: ("worker_died", None, 2),
        4: ("stopped", 0.125, 1),
    }
    assert [number for number, r in rows.items() if r["feasible"]] == [None, 2]


@pytest.mark.parametrize("compacted", [False, True])
def test_what_was_seen_at_rungs_is_there_whatever_became_of_them(ledger: Ledger, compacted: bool) -> None:
    if compacted:
        assert ledger.compact() == 8
    found = rungs(ledger, str(ledger.context))
    ids = {r["number"]: r["trial_id"] for r in ledger.trials(["number", "trial_id"]).to_pylist()}
    assert {n: sorted(found[ids[n]]) for n in (1, 2, 3, 4)} == {1: [0.125, 0.375], 2: [0.125], 3: [0.125], 4: [0.125]}
    assert found[ids[1]][0.375] == {"top1_pct": 87.5, "size_bytes": 999.0}
    assert rungs(ledger, str(ledger.context), [ids[4]]).keys() == {ids[4]}
    assert rungs(ledger, "another") == {}


def test_stopped_trials_are_told_with_their_cost(ledger: Ledger) -> None:
    found = stopped_trials(ledger)
    assert [(t["number"], t["rung"], t["seconds"], t["epochs"]) for t in found] == [
        (1, 0.375, 3.0, 3),
        (4, 0.125, 1.5, 1),
    ]
    assert by_rung(found) == {"12.5%": 1, "37.5%": 1}


def test_status_counts_them_as_done_and_not_as_failed(ledger: Ledger) -> None:
    status = study_status(ledger)
    assert (status["done"], status["failed"], status["feasible"]) == (3, {"worker_died": 1}, 1)
    assert (status["paused"], status["paused_s"], status["paused_epochs"]) == ({"12.5%": 1, "37.5%": 1}, 4.5, 4)
    assert status["state"] == "stopped"
    assert for_people(status)["paused"] == "1 at 12.5%, 1 at 37.5% (4.5 s)"
    ledger.write_study({**(ledger.study_record() or {}), "complete": True})
    assert study_status(ledger)["state"] == "done"


def test_show_says_how_to_finish_one(ledger: Ledger) -> None:
    row = find_trial(ledger, stopped_trials(ledger)[0]["trial_id"])
    lines = list(describe_trial(row, ledger, STUDY, "results"))
    assert "  paused after 37.5% of its recovery training, where the metrics below were found" in lines
    assert f"  bring it to its end: vitpareto resume {STUDY} --finish {row['trial_id']}" in lines
    assert row["spec"]["until"] is None or row["spec"]["until"] == 0.375


def test_the_report_has_a_place_for_them(ledger: Ledger) -> None:
    report = read_report(ledger, ["top1_pct", "size_bytes"])
    assert [(s["rung"], s["cost"]) for s in report.stopped] == [
        ("37.5%", "3.0 s, epochs: 3"),
        ("12.5%", "1.5 s, epochs: 1"),
    ]
    assert report.stopped[0]["found"]["top-1 accuracy"].startswith("87.5")
    assert {f["status"] for f in report.failures} == {"worker_died"}
    assert len(report.candidates) == 2, "the baseline and the one that was finished"
    said = dict(facts(report, report.ended, "1"))["Stopped early"]  # type: ignore[arg-type]
    assert (
        said
        == "1 at 12.5% of the recovery, 1 at 37.5% of the recovery; they cost 4 epochs of recovery and 4.5 s in all"
    )
    assert page_data(report, "")["stopped"] == report.stopped


def test_the_dashboard_calls_them_no_failure(ledger: Ledger) -> None:
    notes = trial_notes(ledger)
    assert notes[1].attributes["status"] == "stopped"
    assert "failure" not in notes[1].attributes
    assert "failure" in notes[3].attributes


@pytest.mark.parametrize("rung", ["x", True, [0.5]])
def test_a_rung_is_a_number(rung: object) -> None:
    row = at_rung(1, 0.125, started_at=1001, epochs=1)
    assert row_fault(row) is None
    assert row_fault({**row, "rung": rung}) == "is not an attempt record: rung has another type or value"
    old = {name: value for name, value in row.items() if name != "rung"}
    assert row_fault(old) is None
