"""JSON of another shape is named as such, whatever value stands where."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.ledger.records import ask_fault, report_fault, row_fault
from tests.ledger_rows import make_row

VALUES: tuple[Any, ...] = (None, True, -7, 1e300, "x", [], [7], {}, {"a": None})
ASK = {"number": 1, "context": "one", "recipe": "[]", "params": {}, "distributions": {"r": "{}"}, "system_attrs": {}}
REPORT = {"schema_version": 1, "trial_id": "a", "recipe_hash": "b", "measurements": [{"kind": "k", "conditions": {}}]}


def attempt() -> dict[str, Any]:
    stage = {"kind": "baseline", "key": "b", "cached": True, "duration_s": 1.0}
    row = {**make_row(1), "stages": [stage], "conditions": {"strong_baseline": {"way": "fp32"}}}
    return dict(json.loads(json.dumps(row)))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from places(inner)


@pytest.mark.parametrize(
    ("fault", "record"),
    [(row_fault, attempt()), (report_fault, REPORT), (ask_fault, ASK)],
    ids=["row", "report", "ask"],
)
def test_every_value_in_every_place_is_judged(fault: Any, record: dict[str, Any]) -> None:
    assert fault(record) is None
    for number in range(len(list(places(record)))):
        for value in VALUES:
            changed = copy.deepcopy(record)
            holder, key = list(places(changed))[number]
            holder[key] = value
            said = fault(changed)
            assert said is None or said.startswith(("is not", "has schema version")), (key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("metrics", [1]),
        ("metrics", {"top1_pct": "x"}),
        ("status", "fine"),
        ("recipe", "{}"),
        ("stages", [{}]),
        ("seconds", {"train": None}),
        ("conditions", [1]),
        ("conditions", {"strong_baseline": 7}),
        ("measurements", [{"kind": "latency", "conditions": [1]}]),
        ("started_at", "yesterday"),
        ("spec", 7),
    ],
)
def test_an_attempt_of_another_type_is_none(key: str, value: Any) -> None:
    assert row_fault({**attempt(), key: value}) == f"is not an attempt record: {key} has another type or value"
