"""What people read: progress, labels, durations, tables."""

from __future__ import annotations

import io
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from orchestrator.words.labels import short_label
from orchestrator.words.rows import format_rows
from orchestrator.words.spent_seconds import spent_text
from orchestrator.words.units import format_seconds
from workers.trial import STATUSES, Recipe, Step


def snapshot(**changes: Any) -> Any:
    from orchestrator.sweep.work import Snapshot

    best = {"top1_pct": (97.123, "tome(r=2)"), "throughput_images_per_s": (12345.6, "a" * 200)}
    values = {"done": 7, "budget": 16, "running": 2, "waiting": 0, "failed": Counter({"timeout": 1}), "best": best}
    return Snapshot(**{**values, "hypervolume": 0.35, "elapsed_s": 65.0, "left_s": 130.0, **changes})


def test_progress_says_what_is_going_on() -> None:
    from orchestrator.sweep.progress import describe

    head, values, recipes = describe(snapshot(), has_baseline=True)
    assert head == "[1 min 05 s] 7/16 trials, 2 running, failed: 1 timeout, about 2 min 10 s left, hypervolume 0.3500"
    assert values == "best top1_pct 97.12 %, throughput_images_per_s 12,346 images/s"
    assert recipes[0] == "best top1_pct 97.12 %: tome(r=2)"
    assert describe(snapshot(), has_baseline=False)[0] == "[1 min 05 s] making and measuring the baseline"
    assert "stopping: interrupted" in describe(snapshot(note="interrupted"), has_baseline=True)[0]


def test_a_line_in_a_log_is_short_and_rare(capsys: pytest.CaptureFixture[str]) -> None:
    from orchestrator.sweep.progress import Progress

    sweep = SimpleNamespace(baseline={}, snapshot=lambda: snapshot(failed=Counter(dict.fromkeys(STATUSES[1:], 99))))
    for quiet in (True, False):
        with Progress(quiet=quiet) as progress:
            progress.show(sweep)  # type: ignore[arg-type]
            progress.show(sweep)  # type: ignore[arg-type]
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) == 160
    assert line.endswith("…")


def test_short_labels_leave_out_what_the_study_fixes() -> None:
    recipe = Recipe(
        (Step("tome", {"r": 2, "schedule": "constant"}), Step("prune", {"ratio": 0.1 + 0.2}), Step("x", {}))
    )
    searched = {
        "tome": {"r": {"low": 1, "high": 4, "step": 1}, "schedule": ["constant"]},
        "prune": {"ratio": [0.3, 0.5]},
    }
    assert short_label(recipe, searched) == "tome(r=2) + prune(ratio=0.3) + x"
    assert short_label(Recipe(), searched) == "baseline"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (1.44, "1.4 s"), (9.96, "10 s"), (45, "45 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_fits_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    label = " + ".join(["magnitude_prune(head_ratio=0.25, mlp_ratio=0.3)"] * 3)
    table = pa.table({"trial_id": ["0123456789ab"], "top1_pct": [97.0], "label": [label], "failure": ["a\x1b[31m\nb"]})
    monkeypatch.setenv("COLUMNS", "100")
    narrow, whole = Terminal(), io.StringIO()
    format_rows(table, "table", narrow)
    format_rows(table, "table", whole)
    assert max(len(line) for line in narrow.getvalue().splitlines()) <= 100
    assert "0123456789ab" in narrow.getvalue()
    assert label in whole.getvalue()
    assert "\x1b" not in whole.getvalue()
    assert all(line == line.rstrip() for line in whole.getvalue().splitlines())


def test_where_the_time_went() -> None:
    assert spent_text({}) == ""
    text = spent_text({"lane_wait": 23.0, "train": 42.0, "measure": 34.7, "stage_wait": 0.3})
    assert text == "1 min 40 s in trials: training 42 %, measuring 35 %, waiting for the lane 23 %"
