"""Speeds that several trials share: one measurement, one error, and further samples for all of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from orchestrator.frontier.query import pareto, uncertain
from orchestrator.ledger import Ledger
from tests.ledger_rows import STUDY
from tests.measured import measure_again, measured_row
from workers.node.storage import LocalStorage

OBJECTIVES = ["size_bytes", "latency_ms_p50"]


def shared(row: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """Returns ``row`` as a trial writes it that took the speed of ``first`` over."""
    taken = [m for m in row["measurements"] if m["kind"] != "latency"]
    return {**row, "speed_of": first["trial_id"], "measurements": taken}


def filled(folder: Any, *rows: dict[str, Any]) -> Ledger:
    ledger = Ledger(LocalStorage(folder), STUDY)
    for row in (measured_row(0, ratio=1.0, size_bytes=5000.0), *rows):
        ledger.write_attempt(row)
    return ledger


@pytest.fixture(params=[False, True], ids=["loose", "compacted"])
def compacted(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_what_shares_a_measurement_shares_its_error(tmp_path: Any, compacted: bool) -> None:
    small = measured_row(1, ratio=0.5, size_bytes=1000.0)
    large = measured_row(2, ratio=0.5, size_bytes=2000.0)
    for name, second, probability in (("own", large, 0.5), ("shared", shared(large, small), 0.0)):
        ledger = filled(tmp_path / name, small, second)
        if compacted:
            ledger.compact()
        rows = {r["trial_id"]: r for r in pareto(ledger, OBJECTIVES, all_rows=True).to_pylist()}
        found = rows[second["trial_id"]]["probability"] if second["trial_id"] in rows else 0.0
        assert found == pytest.approx(probability, abs=0.06), name
        assert rows[small["trial_id"]]["probability"] == 1.0


def test_a_further_sample_goes_to_all_that_share_the_first(tmp_path: Any) -> None:
    first = measured_row(1, ratio=0.5, size_bytes=1000.0)
    second = shared(measured_row(2, ratio=0.5, size_bytes=900.0), first)
    other = measured_row(3, ratio=0.7, size_bytes=800.0)
    ledger = filled(tmp_path, first, second, other)
    before = {r["trial_id"]: r for r in pareto(ledger, OBJECTIVES).to_pylist()}
    for _ in range(3):
        measure_again(ledger, first, 0.52)
    after = {r["trial_id"]: r for r in pareto(ledger, OBJECTIVES).to_pylist()}
    assert after.keys() == {second["trial_id"], other["trial_id"]}, "of two that are equally fast the smaller one"
    name = second["trial_id"]
    assert after[name]["latency_ms_p50"] == pytest.approx(4.0 * math.exp(np.log([0.5, 0.52, 0.52, 0.52]).mean()))
    widths = [math.log(r[name]["latency_ms_p50_high"] / r[name]["latency_ms_p50_low"]) for r in (before, after)]
    assert widths[1] == pytest.approx(widths[0] / 2, rel=0.3)
    assert after[other["trial_id"]]["latency_ms_p50"] == before[other["trial_id"]]["latency_ms_p50"]


def test_seeds_that_share_a_measurement_are_one_sample_of_it(tmp_path: Any) -> None:
    first, *others = (measured_row(1, ratio=0.5, size_bytes=1000.0, seed=seed) for seed in range(4))
    baselines = [measured_row(0, ratio=1.0, size_bytes=5000.0, seed=seed) for seed in range(1, 4)]
    width = {}
    for name, rows in (("own", others), ("shared", [shared(row, first) for row in others]), ("one", [])):
        ledger = filled(tmp_path / name, *(baselines if rows else []), first, *rows)
        (row,) = (r for r in pareto(ledger, OBJECTIVES).to_pylist() if r["trial_id"] == first["trial_id"])
        width[name] = math.log(row["latency_ms_p50_high"] / row["latency_ms_p50_low"])
        assert row["latency_ms_p50"] == pytest.approx(2.0)
    assert width["shared"] == pytest.approx(width["one"])
    assert width["own"] == pytest.approx(width["one"] / 2)


def test_what_shares_a_measurement_is_asked_for_once(tmp_path: Any) -> None:
    first = measured_row(1, ratio=0.50, size_bytes=1000.0, params=3.0)
    second = shared(measured_row(2, ratio=0.50, size_bytes=900.0, params=4.0), first)
    rival = measured_row(3, ratio=0.51, size_bytes=800.0, params=2.0)
    ledger = filled(tmp_path, first, second, rival)
    asked = uncertain(ledger, [*OBJECTIVES, "params"])
    assert rival["trial_id"] in asked
    assert len({first["trial_id"], second["trial_id"]} & set(asked)) == 1
