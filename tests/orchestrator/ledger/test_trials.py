"""From attempts to trials: which attempt counts, and columns that are derived."""

from __future__ import annotations

import pytest

from orchestrator.ledger import Ledger
from tests import ledger_rows
from tests.ledger_rows import STUDY, make_row

storage = ledger_rows.storage


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
