"""What the report says of the search itself, from the record that a driver leaves."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.report.outlook import predictions_text, prospects_text

RECIPE = '[{"config":{"r":2},"technique":"tome"}]'
SEARCHED = {"tome": {"r": [1, 2, 3]}}


def record(**told: Any) -> dict[str, Any]:
    return {"foresight": told}


def test_rank_correlations_are_told_with_how_many_they_rest_on() -> None:
    told = record(
        predictions={
            "top1_pct": {"count": 12, "rank_correlation": 0.876},
            "size_bytes": {"count": 9, "rank_correlation": None},
        }
    )
    assert predictions_text(told).endswith("with what they gave: top1_pct 0.88 (12)")


def test_what_would_come_next_is_told_with_its_worth_and_the_command() -> None:
    prospects = [
        {"recipe": RECIPE, "expected": {"top1_pct": [97.25, 0.5], "size_bytes": [2048.0, 0.0]}, "gain": 0.02},
        {"recipe": RECIPE, "expected": {"top1_pct": [96.0, 0.5], "size_bytes": [1024.0, 0.0]}, "gain": 0.013},
    ]
    text = prospects_text(record(prospects=prospects), SEARCHED, "digits")
    assert text.startswith("tome(r=2) (97.25 % ± 0.50 %, 2.048 kB)")
    assert text.endswith("`vitpareto resume digits --trials +2` is expected to add 3.3% to the hypervolume")


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"foresight": None},
        {"foresight": []},
        record(prospects="x", predictions=3),
        record(prospects=[1], predictions={"top1_pct": 2}),
        record(prospects=[{"recipe": "no JSON", "expected": {}, "gain": 1}]),
        record(prospects=[{"recipe": RECIPE, "expected": {"top1_pct": [1]}, "gain": 1}]),
        record(prospects=[{"recipe": RECIPE, "expected": {"top1_pct": ["a", "b"]}, "gain": None}]),
    ],
)
def test_a_record_without_it_or_a_damaged_one_says_nothing(told: dict[str, Any]) -> None:
    assert predictions_text(told) == ""
    assert prospects_text(told, SEARCHED, "digits") == ""
