"""The table of metrics: every record is complete, and no other file lists metrics again."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.places import ROOT
from workers.metrics import INTERVALS, METRICS, SPEEDS, Metric


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_a_record_is_complete(metric: Metric) -> None:
    assert metric.title
    assert metric.card
    assert (metric.direction is None) == (metric.kind == "detail"), "all but a detail say what is better"
    assert bool(metric.record) == (metric.name in INTERVALS), "what is measured, and nothing else, has records"
    assert bool(metric.tasks) == (metric.kind == "accuracy"), "an accuracy, and nothing else, is a task's"
    told = metric.kind not in ("accuracy", "detail")
    assert bool(metric.gain) == told, "a multiple of the baseline's is told of sizes, speeds and memory"
    if told:
        assert metric.gain.format(2.04) == metric.gain.replace("{:.1f}", "2.0")
    if metric.kind == "accuracy":
        assert metric.unit == "%"
        assert metric.card.endswith(", search split")


def test_the_kind_of_records_names_one_speed() -> None:
    assert len(SPEEDS) == sum(metric.kind == "speed" for metric in METRICS.values())


# --- one place --------------------------------------------------------------------------------------------------------

LISTED_ELSEWHERE = {
    "orchestrator/sweep/landscape.py": "what a trade-off before any training is between: the two that always can be told",
    "workers/rung.py": "what a paused structure tells without a value: each is counted by a function of its own",
    "workers/structure.py": "the same of a structure that was never trained",
    "workers/trial.py": "the default of a field: a spec of images that asks for nothing that must be timed",
}
"""File to the reason why it may list metrics by name."""


def lists_of_metrics(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Dict | ast.Tuple | ast.List | ast.Set):
            texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            if len(named := sorted(texts & METRICS.keys())) > 1:
                yield f"line {node.lineno} lists {', '.join(named)}"


@pytest.mark.parametrize("folder", ["orchestrator", "workers"])
def test_no_other_file_lists_metrics(folder: str) -> None:
    """A second list is what a new metric would be missing from: derive it from ``workers.metrics``."""
    found = {p.relative_to(ROOT).as_posix(): list(lists_of_metrics(p)) for p in sorted((ROOT / folder).rglob("*.py"))}
    found = {file: lines for file, lines in found.items() if lines}
    allowed = {"workers/metrics.py", *LISTED_ELSEWHERE}
    assert found.keys() == {file for file in allowed if file.startswith(folder)}, found
