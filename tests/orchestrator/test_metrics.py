"""A line in the table of metrics is enough for schema, study, frontier, report, model card and commands to know a metric."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from orchestrator.frontier.objective_kinds import source_of
from orchestrator.ledger.schema import ATTEMPTS, BOUNDS, FRONTIER, RATIOS
from orchestrator.ledger.trials import DEFAULT_COLUMNS, NUMERIC, TRIALS
from orchestrator.report.data import TITLES
from orchestrator.study import constraints
from orchestrator.words.units import format_value, unit_of
from tests.made_up_metrics import NAMES
from tests.places import ROOT
from workers.metrics import ACCURACIES, INTERVALS, METRICS, OBJECTIVES, Metric
from workers.tasks import KINDS

MEASURED = ("top5_pct", "first_answer_us", "scratch_mib")
DETAIL = "first_answer_us_p99"

Found = dict[str, Any]


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_every_metric_has_columns_title_and_unit(metric: Metric) -> None:
    name = metric.name
    assert name in ATTEMPTS.names
    assert name in NUMERIC
    assert TITLES[name] == metric.title
    assert unit_of(name) == metric.unit
    assert unit_of(f"x_{name}") in ("", metric.unit), "the ending of its name says another unit"
    assert (
        format_value(name, 1.5)
        == f"{1.5:.{2 if metric.unit == '%' else 1}f} {metric.unit.replace('bytes', 'B')}".strip()
    )
    assert set(metric.tasks) <= {kind.task for kind in KINDS.values()}
    documented = f"`{name}`" in (ROOT / "README.md").read_text()
    assert documented, "README.md lists the columns"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_a_column_a_constraint_and_in_the_documents(name: str) -> None:
    told = {f"{name}_ratio", *([f"{name}_drop"] if name in ACCURACIES else [])}
    assert {name, *told} <= set(constraints.METRICS)
    assert {name, *told} <= set(TRIALS.names)
    assert {name, f"{name}_drop"} & set(TRIALS.names) <= set(DEFAULT_COLUMNS)
    assert name in FRONTIER.names
    assert f"{name}_ratio" in RATIOS
    assert (f"{name}_low" in BOUNDS) == (f"{name}_high" in BOUNDS) == (name in INTERVALS)
    assert all(source_of(one)[0] == name for one in (name, *told))
    documented = f"`{name}`" in (ROOT / "search_spaces/README.md").read_text()
    assert documented, "search_spaces/README.md lists the objectives"


# --- one line more ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    command = [sys.executable, "-m", "tests.made_up_metrics", str(tmp_path_factory.mktemp("made_up"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_study_may_ask_for_it(found: Found) -> None:
    assert found["study"] == {n: "maximize" if n == "top5_pct" else "minimize" for n in NAMES if n != DETAIL}
    assert found["accuracies"] == ["top1_pct", "top5_pct"]


@pytest.mark.parametrize("name", NAMES)
def test_the_ledger_has_its_columns(found: Found, name: str) -> None:
    assert found["stored"][name] > 0
    assert {f"{name}_low", f"{name}_high"} & set(found["attempts"]) == (
        {f"{name}_low", f"{name}_high"} if name in MEASURED else set()
    )
    assert (f"{name}_ratio" in found["attempts"]) == (name != DETAIL)
    assert (name in found["frontier"]) == (name in found["default_columns"]) == (name != DETAIL)
    assert (f"{name}_drop" in found["default_columns"]) == (name == "top5_pct")


def test_the_report_says_what_it_is_and_what_was_gained(found: Found) -> None:
    titles = {
        "top5_pct": ["top-5 accuracy", "%", "maximize"],
        "top5_pct_drop": ["top-5 drop", "percentage points", None],
        "energy_j": ["energy of one image", "J", "minimize"],
        "kernels": ["kernel launches", "", "minimize"],
        "first_answer_us": ["first answer, cold", "us", "minimize"],
        "first_answer_us_p99": ["first answer, 99th percentile", "us", None],
        "scratch_mib": ["scratch memory", "MiB", "minimize"],
    }
    assert found["titles"].items() >= titles.items()
    names = "top-5 accuracy, energy of one image, kernel launches, first answer and scratch memory"
    gains = "needs 4.0x less energy, launches 5.0x fewer kernels, answers 3.0x sooner and needs 4.0x less scratch"
    assert f"on the frontier of {names}." in found["verdict"]
    assert f"the best {gains} (tome(" in found["verdict"]


@pytest.mark.parametrize(
    "row",
    [
        "| Top-5 accuracy, search split | 98.50 % | 97.52 % to 99.48 % | -0.50 points |",
        "| Energy an image | 2 J | - | 0.250 times |",
        "| Kernel launches | 40 | - | 0.200 times |",
        "| First answer | 300 us | 297 us to 303 us | 0.333 times |",
        "| First answer, 99th percentile | 330 us | - | - |",
        "| Scratch memory | 16 MiB | 15.84 MiB to 16.16 MiB | 0.250 times |",
    ],
)
def test_the_model_card_has_its_row(found: Found, row: str) -> None:
    assert row in found["card"]


def test_the_commands_tell_it(found: Found) -> None:
    told = {
        "top5_pct": "98.5 % (97.5..99.5)",
        "energy_j": "2 J",
        "kernels": "40",
        "first_answer_us": "300.0 us (297.0..303.0) 3.00x",
        "scratch_mib": "16.00 MiB (15.84..16.16)",
    }
    assert found["pareto"] == told
    assert {f"  {name}: {text}" for name, text in told.items()} <= set(found["show"])
    assert "  first_answer_us_p99: 330 us" in found["show"]
    assert {*told} <= set(found["compared"])
