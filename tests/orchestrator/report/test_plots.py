"""Figures of a frontier: text stays text, groups are drawn once, and what cannot be drawn is said."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from orchestrator.report import plots
from orchestrator.report.data import Report
from orchestrator.report.plots import NothingToDraw, frontier_figure, short_texts, staircase
from tests.report_rows import Rows, every_kind, study_of


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return every_kind(tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def report(rows: Rows) -> Report:
    return rows.report()


def test_a_vector_figure_keeps_text_as_text_and_is_the_same_twice(rows: Rows) -> None:
    report = rows.report(["top1_pct", "size_bytes"])
    drawn = frontier_figure(report, "svg")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn.decode())
    assert {"top-1 accuracy (%)", "artefact size", "certainly on the frontier", "uncompressed baseline"} <= set(texts)
    assert frontier_figure(report, "svg") == drawn
    assert frontier_figure(report, "pdf") == frontier_figure(report, "pdf")


@pytest.mark.parametrize(("fmt", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figures_with_a_third_objective(report: Report, fmt: str, magic: bytes) -> None:
    assert frontier_figure(report, fmt).startswith(magic)


def test_a_figure_draws_groups_once_and_intervals(rows: Rows) -> None:
    report = rows.report(["top1_pct", "size_bytes"])
    axes = Figure().add_subplot()
    plots._draw(axes, [c for c in report.candidates if c.standing != "broken"], None)
    points = sum(len(c.get_offsets()) for c in axes.collections if hasattr(c, "get_sizes"))
    assert points == sum(c.standing not in ("broken", "member") or c.is_baseline for c in report.candidates)


def test_labels_say_what_sets_recipes_apart(report: Report) -> None:
    made = [c for c in report.candidates if c.steps]
    one, two = replace(made[0]), replace(made[0], steps=[("tome", {"r": 2, "schedule": "decreasing"})])
    assert short_texts([one, two]) == ["tome (r 1)", "tome (r 2)"]
    assert short_texts([one]) == ["tome"]


@pytest.mark.parametrize(
    ("directions", "expected"),
    [
        (["minimize", "maximize"], [(1, 1), (2, 1), (2, 3)]),
        (["minimize", "minimize"], [(1, 1)]),
        (["maximize", "maximize"], [(2, 3), (2, 2), (4, 2)]),
        (["maximize", "minimize"], [(1, 1), (1, 2), (4, 2)]),
    ],
)
def test_the_staircase_bounds_what_is_dominated(directions: list[str], expected: list[tuple[int, int]]) -> None:
    points = np.array([[1, 1], [2, 3], [4, 2], [2, 3]], dtype=float)
    assert [tuple(p) for p in staircase(points, directions)] == expected
    assert staircase(points[:0], directions).shape == (0, 2)


@pytest.mark.parametrize("kind", ["nothing", "none feasible"])
def test_nothing_to_draw_is_said(tmp_path: Path, kind: str) -> None:
    made, _ = study_of(kind, tmp_path)
    report = made.report(["top1_pct", "latency_ms_p50"])
    with pytest.raises(NothingToDraw, match="has no feasible recipe with top1_pct and latency_ms_p50 yet"):
        frontier_figure(report, "svg")
    with pytest.raises(NothingToDraw, match="needs two objectives, got top1_pct; name them: --objectives"):
        frontier_figure(made.report(["top1_pct"]), "svg")
