"""Verdicts: exact numbers must be equal, others may differ by what both intervals allow, other devices are not compared."""

from __future__ import annotations

import math
from typing import Any

import pytest

from orchestrator.frontier.verdicts import Run, Verdict, differences, half_width, judge

METRICS = {
    "top1_pct": 90.0,
    "top1_pct_low": 85.0,
    "top1_pct_high": 93.0,
    "size_bytes": 1000.0,
    "latency_ms_p50": 2.0,
    "latency_ms_p50_ratio": 0.5,
    "latency_ms_p50_low": 2.0 / 1.03,
    "latency_ms_p50_high": 2.0 * 1.03,
}


def run(**changes: Any) -> Run:
    fields: dict[str, Any] = {
        "status": "ok",
        "failure": None,
        "device": "cpu",
        "device_name": "Some CPU",
        "predictions": {"top1_pct": "ff00"},
        "logits": {"top1_pct": "l1"},
        "ways": {"latency": "bf16"},
        "metrics": METRICS,
    }
    named = {k: changes.pop(k) for k in list(changes) if k in fields}
    return Run(**{**fields, "metrics": {**METRICS, **changes}, **named})


def verdict(objective: str, here: Run, row: Run | None = None) -> Verdict:
    return next(v for v in judge(row or run(), here) if v.objective == objective)


def test_the_same_run_is_equal_in_everything() -> None:
    found = judge(run(), run())
    assert [v.objective for v in found] == ["top1_pct", "size_bytes", "latency_ms_p50"]
    assert {v.verdict for v in found} == {"equal"}
    assert found[0].note == "the same logits"


@pytest.mark.parametrize("name", ["size_bytes", "params", "macs"])
def test_exact_numbers_must_be_equal(name: str) -> None:
    row = run(**{name: 1000.0})
    assert verdict(name, run(**{name: 1000.0}), row).verdict == "equal"
    assert verdict(name, run(**{name: 1001.0}), row).verdict == "outside"


@pytest.mark.parametrize(
    ("here", "expected"), [(84.9, "outside"), (85.0, "inside"), (93.0, "inside"), (93.1, "outside")]
)
def test_another_accuracy_has_to_lie_in_the_rows_interval(here: float, expected: str) -> None:
    found = verdict("top1_pct", run(top1_pct=here, predictions={"top1_pct": "ff01"}, logits={"top1_pct": "l2"}))
    assert found.verdict == expected


def test_the_same_accuracy_with_other_images_right_is_not_equal() -> None:
    assert verdict("top1_pct", run(predictions={"top1_pct": "00ff"})).verdict == "inside"
    found = verdict("top1_pct", run(logits={"top1_pct": "l2"}))
    assert (found.verdict, found.note) == ("equal", "the same examples are right")


def test_speeds_are_compared_by_their_ratio_and_both_intervals() -> None:
    """Half widths of 3 % and 4 % allow 5 % between the two."""
    wide = {"latency_ms_p50_low": 20.0 / 1.04, "latency_ms_p50_high": 20.0 * 1.04, "latency_ms_p50": 20.0}
    allowed = math.exp(math.hypot(math.log(1.03), math.log(1.04)))
    inside = verdict("latency_ms_p50", run(latency_ms_p50_ratio=0.5 * allowed * 0.9999, **wide))
    outside = verdict("latency_ms_p50", run(latency_ms_p50_ratio=0.5 * allowed * 1.0001, **wide))
    assert (inside.verdict, outside.verdict) == ("inside", "outside")
    assert inside.compared == "latency_ms_p50_ratio"
    assert inside.row == 0.5
    assert inside.row_low == pytest.approx(0.5 / 1.03)
    assert inside.row_high == pytest.approx(0.5 * 1.03)


def test_an_absolute_time_alone_says_nothing() -> None:
    """The machine may be busy now: another unit, the same ratio."""
    slow = {k: 10 * METRICS[k] for k in ("latency_ms_p50", "latency_ms_p50_low", "latency_ms_p50_high")}
    assert verdict("latency_ms_p50", run(**slow)).verdict == "equal"


def test_another_way_of_running_the_baseline_is_named() -> None:
    found = verdict("latency_ms_p50", run(latency_ms_p50_ratio=0.7, ways={"latency": "fp32"}))
    assert (found.verdict, found.note) == ("outside", "the strong baseline was bf16 there, fp32 here")


@pytest.mark.parametrize("other", [{"device_name": "Another CPU"}, {"device": "cuda"}])
def test_speed_and_memory_on_another_device_are_not_judged(other: dict[str, Any]) -> None:
    memory = {"peak_memory_bytes": 9.0, "peak_memory_bytes_ratio": 0.9}
    row, here = run(**memory), run(latency_ms_p50_ratio=5.0, peak_memory_bytes_ratio=4.0, **other)
    found = {v.objective: v for v in judge(row, here)}
    for name in ("latency_ms_p50", "peak_memory_bytes"):
        assert found[name].verdict == "not judged"
        assert "measured on" in found[name].note
    assert found["top1_pct"].verdict == found["size_bytes"].verdict == "equal"


def test_a_number_that_one_side_lacks_is_outside() -> None:
    metrics = {k: v for k, v in METRICS.items() if k != "size_bytes"}
    assert verdict("size_bytes", run(metrics=metrics)).verdict == "outside"


def test_memory_without_an_interval_has_to_be_equal() -> None:
    row = run(peak_memory_bytes=9.0, peak_memory_bytes_ratio=0.9)
    assert verdict("peak_memory_bytes", run(peak_memory_bytes=9.0, peak_memory_bytes_ratio=0.9), row).verdict == "equal"
    assert (
        verdict("peak_memory_bytes", run(peak_memory_bytes=9.1, peak_memory_bytes_ratio=0.91), row).verdict == "outside"
    )


def test_nothing_is_judged_where_a_run_failed() -> None:
    assert judge(run(), run(status="error", metrics={})) == []


def test_half_widths() -> None:
    assert half_width((2.0, None, None)) == 0
    assert half_width((2.0, 1.0, 4.0)) == pytest.approx(math.log(2))
    assert half_width((2.0, 0.0, 4.0)) == math.inf


def test_differences_of_provenance() -> None:
    row = {
        "versions": {"torch": "2.14", "numpy": "2"},
        "git_commit": "a",
        "git_dirty": False,
        "threads": 2,
        "seeds": {},
    }
    here = {
        "versions": {"torch": "2.15", "numpy": "2", "timm": "1"},
        "git_commit": "b",
        "git_dirty": False,
        "threads": 2,
    }
    assert [(d.what, d.row, d.here) for d in differences(row, here)] == [
        ("torch", "2.14", "2.15"),
        ("timm", "not recorded", "1"),
        ("git_commit", "a", "b"),
    ]
    assert differences(here, here) == []
    changed = {**here, "git_dirty": True}
    assert [d.what for d in differences(changed, changed)] == ["git_dirty"]  # of one commit, and yet not one code
