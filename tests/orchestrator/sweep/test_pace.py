"""What a driver does again and again stays a small share of its time."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.sweep import frontier_history, pace
from orchestrator.sweep.frontier_history import FrontierHistory
from orchestrator.sweep.pace import Pace
from tests.orchestrator.sweep.test_state import Bench


class Clock:
    """A clock that is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)


def test_what_takes_long_is_done_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    often = Pace(5.0)
    assert often.due
    with often.turn():
        clock.now += 0.05
    clock.now += 4.9
    assert not often.due
    clock.now += 0.2
    assert often.due
    with often.turn():
        clock.now += 2.0
    clock.now += 2.0 / pace.SHARE - 1.0
    assert not often.due
    clock.now += 2.0
    assert often.due


def test_a_failure_counts_as_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    often = Pace(5.0, first_s=1.0)
    assert not often.due
    clock.now += 1.0
    with pytest.raises(OSError, match="full"), often.turn():
        raise OSError("full")
    assert not often.due


def test_the_frontier_is_kept_when_enough_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier_history, "FRONTIER_S", 0.0)
    monkeypatch.setattr(pace, "SHARE", 1e9)
    bench = Bench(tmp_path, trials=4, sampler={"name": "random"})
    sweep = bench.open()
    history = FrontierHistory(sweep)
    history.turn()
    assert len(bench.ledger.frontier()) == 0, "there is nothing before the baseline"
    for done in (1, 2, 3):
        bench.run(sweep, 1)
        history.turn()
        history.turn()  # nothing has come since
        assert set(bench.ledger.frontier()["trials"].to_pylist()) == set(range(1, done + 1))
    monkeypatch.setattr(frontier_history, "GROWTH", 2.0)
    bench.run(sweep, 1)
    history.turn()
    assert max(bench.ledger.frontier()["trials"].to_pylist()) == 3, "one row more is no growth by a half"
