"""Adds a line of each kind to the table of metrics, writes a study's rows, and prints as JSON where the new metrics are met.

A process of its own, since everything derives from the table when it is imported: ``python -m tests.made_up_metrics FOLDER``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.places import ROOT

LINES = """
    _accuracy("top5_pct", "top-5 accuracy", "image_classification"),
    Metric(name="energy_j", kind="exact", direction="minimize", unit="J", title="energy of one image",
           card="Energy an image", gain="needs {:.1f}x less energy", record=""),
    Metric(name="kernels", kind="exact", direction="minimize", unit="", title="kernel launches", card="Kernel launches",
           gain="launches {:.1f}x fewer kernels", record=""),
    Metric(name="first_answer_us", kind="speed", direction="minimize", unit="us", title="first answer, cold",
           card="First answer", gain="answers {:.1f}x sooner", record="first_answer"),
    Metric(name="scratch_mib", kind="memory", direction="minimize", unit="MiB", title="scratch memory",
           card="Scratch memory", gain="needs {:.1f}x less scratch", record="scratch"),
    Metric(name="first_answer_us_p99", kind="detail", direction=None, unit="us", title="first answer, 99th percentile",
           card="First answer, 99th percentile", gain="", record=""),
"""
NAMES = ("top5_pct", "energy_j", "kernels", "first_answer_us", "scratch_mib", "first_answer_us_p99")
BASELINE = dict(zip(NAMES, (99.0, 8.0, 200.0, 900.0, 64.0, 950.0), strict=True))
RECIPE = dict(zip(NAMES, (98.5, 2.0, 40.0, 300.0, 16.0, 330.0), strict=True))


def add_to_the_table(lines: str) -> None:
    """Makes the module as it would be with these lines at the end of its table."""
    source = (ROOT / "workers/metrics.py").read_text()
    end = "\n)\n\nMETRICS:"
    assert source.count(end) == 1
    module = ModuleType("workers.metrics")
    sys.modules["workers.metrics"] = module
    exec(compile(source.replace(end, lines.rstrip() + end), "workers/metrics.py", "exec"), module.__dict__)


def met(folder: Path) -> dict[str, Any]:
    """Returns what schema, study, report, model card and commands say of the new metrics."""
    from orchestrator.export.model_card import _metrics
    from orchestrator.frontier.compare import compare
    from orchestrator.frontier.query import pareto, sql
    from orchestrator.ledger.schema import ATTEMPTS, FRONTIER
    from orchestrator.ledger.show import describe_trial, find_trial
    from orchestrator.ledger.trials import DEFAULT_COLUMNS, TRIALS
    from orchestrator.report.sentences import verdict
    from orchestrator.study.load import load_study
    from orchestrator.study.tasks import accuracies_of
    from orchestrator.words.interval_text import metric_text
    from tests.report_rows import TOME, Rows, recipe
    from tests.studies import tiny_study
    from workers.metrics import INTERVALS, OBJECTIVES

    objectives = [name for name in NAMES if name in OBJECTIVES]
    limits = [f"{name}_ratio < 2" for name in objectives]
    rows = Rows(folder, constraints=[*limits, "top5_pct_drop <= 1"])
    ends = {
        f"{n}_{end}": RECIPE[n] * by
        for n in objectives
        if n in INTERVALS
        for end, by in (("low", 0.99), ("high", 1.01))
    }
    ratios = {f"{n}_ratio": RECIPE[n] / BASELINE[n] for n in ("first_answer_us", "scratch_mib")}
    first = rows.write(recipe(), top1_pct=98.0, **BASELINE)
    trial = rows.write(TOME, top1_pct=97.5, **RECIPE, **ends, **ratios)
    report, row = rows.report(objectives), find_trial(rows.ledger, trial)
    members = {member["trial_id"]: member for member in pareto(rows.ledger, objectives).to_pylist()}
    stored = sql(rows.ledger, f"SELECT {', '.join(NAMES)} FROM trials WHERE NOT is_baseline").to_pylist()
    return {
        "study": dict(load_study(tiny_study(objectives=objectives, constraints=limits)).objectives),
        "accuracies": accuracies_of("image_classification"),
        "attempts": ATTEMPTS.names,
        "frontier": FRONTIER.names,
        "trials": TRIALS.names,
        "default_columns": DEFAULT_COLUMNS,
        "stored": stored[0],
        "titles": {metric.name: [metric.title, metric.unit, metric.better] for metric in report.metrics},
        "verdict": " ".join(verdict(report)),
        "card": list(_metrics(row, [])),
        "show": list(describe_trial(row, rows.ledger, "looks", "results")),
        "pareto": {name: metric_text(name, members[trial]) for name in objectives},
        "compared": [metric.name for metric in compare(rows.ledger, [first, trial]).metrics],
    }


if __name__ == "__main__":
    add_to_the_table(LINES)
    print(json.dumps(met(Path(sys.argv[1]))))
