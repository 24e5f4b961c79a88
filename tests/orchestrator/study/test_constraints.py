"""Constraints: parsed, judged, and of every metric."""

import pytest

from orchestrator.study.constraints import METRICS, Constraint, ConstraintError, derived, parse, violation
from orchestrator.study.load import load_study
from tests.study_files import minimal
from workers.metrics import OBJECTIVES


def test_constraints_are_parsed_and_judged() -> None:
    assert load_study(minimal(constraints=["size_bytes<4e6"])).parsed_constraints() == (
        Constraint("size_bytes", "<", 4e6),
    )
    limit = parse("top1_pct_drop <= 1")
    metrics = derived({"top1_pct": 96.5, "size_bytes": 50.0}, {"top1_pct": 98.0, "size_bytes": 200.0})
    assert metrics["top1_pct_drop"] == pytest.approx(1.5)
    assert metrics["size_bytes_ratio"] == 0.25
    assert limit.violation(metrics) == pytest.approx(0.5)
    assert not limit.satisfied(metrics)
    assert parse("size_bytes_ratio > 0.25").violation(metrics) > 0, "a strict bound met exactly is broken"
    assert parse("size_bytes_ratio >= 0.25").violation(metrics) <= 0
    assert parse("top1_pct >= 90").violation({"top1_pct": float("nan")}) == float("inf")


@pytest.mark.parametrize("text", ["size_bytes", "size_bytes == 3", "size_bytes < x", "1 < size_bytes", "a < 1", ""])
def test_other_texts_are_no_constraints(text: str) -> None:
    with pytest.raises(ConstraintError):
        parse(text)


def test_every_metric_can_be_constrained() -> None:
    assert set(OBJECTIVES) < set(METRICS)
    for metric in METRICS:
        assert parse(f"{metric} < -1.5e3") == Constraint(metric, "<", -1500.0)


# --- what is known before a trial -------------------------------------------------------------------------------------

BASELINE = {"size_bytes": 800e3, "macs": 4e6, "params": 2e5}


def broken(facts: dict[str, float], *texts: str, baseline: dict[str, float] = BASELINE) -> str | None:
    return violation(facts, baseline, [parse(text) for text in texts])


def test_a_known_number_that_breaks_a_constraint_is_said_with_the_rule() -> None:
    assert broken({"size_bytes": 300e3}, "size_bytes <= 2e5") == (
        "must have size_bytes <= 200000; its structure, known before training, has 300,000"
    )
    assert broken({"size_bytes": 200e3}, "size_bytes <= 2e5") is None
    assert broken({"size_bytes": 200e3}, "size_bytes < 2e5") is not None
    assert broken({"macs": 3e6, "size_bytes": 1.0}, "size_bytes < 2e5", "macs < 2e6") is not None


def test_a_ratio_to_the_baseline_is_known_with_it() -> None:
    half = broken({"macs": 3e6}, "macs_ratio <= 0.5")
    assert half == "must have macs_ratio <= 0.5; its structure, known before training, has 0.75"
    assert broken({"macs": 2e6}, "macs_ratio <= 0.5") is None
    assert broken({"macs": 3e6}, "macs_ratio <= 0.5", baseline={}) is None


def test_what_is_not_known_is_left_for_the_trial() -> None:
    assert broken({}, "size_bytes < 1", "macs_ratio < 0.1") is None
    assert broken({"params": 1.0}, "size_bytes < 1", "top1_pct_drop <= 1", "latency_ms_p50 < 1e-9") is None
