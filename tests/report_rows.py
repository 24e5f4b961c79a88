"""A study's rows for tests of its report, without training or timing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.frontier import query
from orchestrator.ledger import Ledger, attempt_row
from orchestrator.ledger.studies import open_ledger
from orchestrator.report.data import Report
from orchestrator.report.read import read_report
from orchestrator.report.render import page
from orchestrator.study.load import load_study
from tests.studies import tiny_study
from workers.node.storage import open_storage
from workers.trial import Context, Measurement, Recipe, Step, TrialResult, TrialSpec, trial_id

CONTEXT = Context({"name": "m"}, {"kind": "digits"}, {}, {})
OBJECTIVES = ["top1_pct", "size_bytes", "throughput_images_per_s"]
HOSTILE = (
    "</script><script>document.title='owned'</script><!-- <img src=x onerror=\"document.title='owned'\"> & 'quoted'"
)
TOP1_HALF, SPEED_HALF = 0.3, 0.02
"""Half widths of the intervals below: points, and share."""


def recipe(*steps: tuple[str, dict[str, Any]]) -> Recipe:
    return Recipe(tuple(Step(name, config) for name, config in steps))


TOME = recipe(("tome", {"r": 1, "schedule": "decreasing"}))
INT8 = recipe(("dynamic_int8", {"granularity": "per_channel"}))
PRUNE = recipe(("magnitude_prune", {"mlp_ratio": 0.5}))
SLOW = recipe(("precision", {"dtype": HOSTILE}))


class Rows:
    """Writes trials of a study without running them."""

    def __init__(self, folder: Path, name: str = "looks", **changes: Any) -> None:
        config = load_study(tiny_study(name, objectives=OBJECTIVES, **changes))
        self.folder, self.name, self.count = folder, name, 0
        self.ledger = Ledger(open_storage(folder), name, config.constraints, CONTEXT.digest)
        self.ledger.write_study({"config": config.to_dict(), "token": "t", "context": CONTEXT.digest})

    def write(self, of: Recipe, *, status: str = "ok", failure: str | None = None, seed: int = 0, **values: Any) -> str:
        """``values``: metrics, or ``conditions``; accuracy and throughput get an interval."""
        conditions = {"resolution": 8, "search_images": 100, **values.pop("conditions", {})}
        metrics = dict(values)
        for name, half in (("top1_pct", TOP1_HALF), ("throughput_images_per_s", SPEED_HALF)):
            if name not in values or (name != "top1_pct" and not of.steps):
                continue
            low, high = (-half, half) if name == "top1_pct" else (-half * values[name], half * values[name])
            metrics |= {f"{name}_low": values[name] + low, f"{name}_high": values[name] + high}
        if "throughput_images_per_s" in values:
            metrics["throughput_images_per_s_ratio"] = values["throughput_images_per_s"] / 7000
        key = trial_id(of, seed, CONTEXT, dict.fromkeys(of.techniques, 1))
        spec = TrialSpec(self.name, key, of, seed, CONTEXT, "/nowhere")
        result = TrialResult(key, f"a{self.count}", status, failure, metrics, 1.7e9 + 60 * self.count, 30.0, conditions)
        self.ledger.write_attempt(attempt_row(spec, result, {"number": self.count} if of.steps else None))
        self.count += 1
        return key

    def report(self, objectives: list[str] | None = None) -> Report:
        return read_report(open_ledger(self.name, self.folder), objectives)

    def page(self, objectives: list[str] | None = None) -> Path:
        file = self.folder / f"{self.name}.html"
        file.write_text(page(self.report(objectives), f" --storage {self.folder}"), encoding="utf-8")
        return file


def every_kind(folder: Path) -> Rows:
    """Writes a study with a recipe of every standing, hostile texts, a report split and a history."""
    made = Rows(folder, constraints=["top1_pct_drop <= 5"])
    strong = {"throughput": {"way": "bf16", "value": 7000.0, "unit": "images/s", "batch": 64, "ways": {"bf16": 7000.0}}}
    noise = {"noise": {"throughput": {"sigma": 0.01, "dof": 3, "ratios": [1.0]}}, "device_name": "A processor"}
    made.write(
        recipe(),
        top1_pct=98.0,
        size_bytes=8e5,
        throughput_images_per_s=7000.0,
        conditions={"strong_baseline": strong | noise},
    )
    fast = made.write(TOME, top1_pct=97.0, size_bytes=7.9e5, macs=2e6, throughput_images_per_s=12000.0)
    made.write(INT8, top1_pct=97.5, size_bytes=2e5, macs=3e6, throughput_images_per_s=7600.0)
    made.write(PRUNE, top1_pct=95.0, size_bytes=5e5, throughput_images_per_s=7300.0)
    made.write(SLOW, top1_pct=94.0, size_bytes=4e5, throughput_images_per_s=5000.0)
    made.write(recipe(*_steps(PRUNE), *_steps(INT8)), top1_pct=92.0, size_bytes=1e5, throughput_images_per_s=9000.0)
    false = recipe(*_steps(INT8), ("precision", {"dtype": "bf16"}))
    made.write(false, top1_pct=97.4, size_bytes=2.1e5, throughput_images_per_s=7000.0, conditions={"simulated": True})
    twin = recipe(("dynamic_int8", {"granularity": "per_tensor"}))
    made.write(twin, top1_pct=97.5, size_bytes=2e5, throughput_images_per_s=7605.0)
    near = recipe(*_steps(TOME), *_steps(INT8))
    made.write(near, top1_pct=97.3, size_bytes=1.99e5, throughput_images_per_s=7500.0)
    for n, text in enumerate((HOSTILE, HOSTILE + "\nTraceback", "\n too few heads\nmore")):
        made.write(recipe(("tome", {"r": 10 + n})), status="infeasible", failure=text)
    made.write(recipe(("tome", {"r": 20})), status="timeout", failure=None)
    split = {"images": 100, "wilson_low_pct": 95.1, "wilson_high_pct": 98.2}
    report = Measurement("accuracy_report", "k", "cpu", 64, 8, "quick", 96.7, "percent", conditions=split)
    made.ledger.write_report(fast, TOME.hash, vars(report))
    for n, volume in enumerate((None, 0.1, 0.5, 0.9)):
        made.ledger.write_frontier(query.pareto(made.ledger, OBJECTIVES), volume, n + 1, objectives=OBJECTIVES)
    return made


def _steps(of: Recipe) -> list[tuple[str, dict[str, Any]]]:
    return [(s.technique, dict(s.config)) for s in of.steps]


def study_of(kind: str, folder: Path) -> tuple[Rows, list[str] | None]:
    made = Rows(folder, kind.replace(" ", "-"), constraints=["top1_pct_drop <= 5"])
    objectives = None
    if kind == "nothing":
        return made, None
    made.write(recipe(), top1_pct=98.0, size_bytes=8e5, throughput_images_per_s=7000.0)
    if kind == "all failed":
        made.write(TOME, status="error", failure="boom")
    elif kind == "none feasible":
        made.write(TOME, top1_pct=50.0, size_bytes=1e5, throughput_images_per_s=9000.0)
    elif kind == "one objective":
        made.write(TOME, top1_pct=97.0, size_bytes=1e5, throughput_images_per_s=9000.0)
        objectives = ["size_bytes"]
    elif kind == "no speed":
        made.write(TOME, top1_pct=97.0, size_bytes=1e5)
        objectives = ["top1_pct", "size_bytes"]
    elif kind == "no number":
        made.write(TOME, top1_pct=97.0, size_bytes=1e5, throughput_images_per_s=9000.0)
        objectives = ["top1_pct", "latency_ms_p50"]
    return made, objectives
