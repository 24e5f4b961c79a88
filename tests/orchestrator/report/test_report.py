"""The report: what is read, what is said, what the page holds as text, and the command."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.frontier import query
from orchestrator.report.data import Report
from orchestrator.report.render import embedded, page
from orchestrator.report.sentences import best_close, facts, verdict
from tests.report_rows import HOSTILE, INT8, OBJECTIVES, PRUNE, TOME, Rows, every_kind, recipe


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return every_kind(tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def report(rows: Rows) -> Report:
    return rows.report()


# --- what is read -----------------------------------------------------------------------------------------------------


def test_standings_are_those_of_the_frontier(rows: Rows, report: Report) -> None:
    front = query.pareto(rows.ledger, OBJECTIVES).to_pylist()
    assert {c.id for c in report.frontier("certain")} == {r["trial_id"] for r in front if r["certain"]}
    assert {c.id for c in report.frontier("possible")} == {r["trial_id"] for r in front if not r["certain"]}
    assert {m for r in front for m in r["members"]} == {
        c.id for c in report.frontier("certain", "possible", "member")
    }, "a group is shown whole"
    labels = {c.standing: c.label for c in report.candidates if not c.is_baseline}
    assert labels["broken"] == "magnitude_prune(mlp_ratio=0.5) + dynamic_int8(granularity=per_channel)"
    assert {c.label for c in report.frontier("dominated")} == {
        "magnitude_prune(mlp_ratio=0.5)",
        f"precision(dtype={HOSTILE})",
    }
    assert [c.label for c in report.candidates if c.slower] == [f"precision(dtype={HOSTILE})"]
    assert sum(c.simulated for c in report.candidates) == 1


def test_numbers_come_with_interval_and_ratio(report: Report) -> None:
    fast = next(c for c in report.candidates if c.label == "tome(r=1, schedule=decreasing)")
    found = {m.name: (fast.value[k], fast.low[k], fast.high[k], fast.ratio[k]) for k, m in enumerate(report.metrics)}
    assert found["size_bytes"] == (7.9e5, None, None, pytest.approx(7.9 / 8))
    assert found["throughput_images_per_s"] == pytest.approx((12000.0, 11760.0, 12240.0, 12 / 7), rel=2e-3)
    assert found["report_top1_pct"] == (96.7, 95.1, 98.2, None)
    assert found["macs"][:3] == (2e6, None, None)
    assert [m.name for m in report.metrics if m.objective] == OBJECTIVES
    assert report.parameters == {"magnitude_prune.mlp_ratio": [0.1, 0.6], "tome.r": [1, 2]}
    assert [(n, volume) for n, _, volume in report.history] == [(1, None), (2, 0.1), (3, 0.5), (4, 0.9)]


def test_failures_are_counted_by_class_with_their_reasons(report: Report) -> None:
    infeasible, timeout = report.failures
    assert (infeasible["status"], infeasible["count"]) == ("infeasible", 3)
    assert [(r["text"], r["count"]) for r in infeasible["reasons"]] == [(HOSTILE, 2), ("too few heads", 1)]
    assert (timeout["status"], timeout["reasons"][0]["text"]) == ("timeout", "no reason given")


def test_contribution_of_a_technique(tmp_path: Path) -> None:
    """By hand, in multiples of the baseline, up to 0 and 1.1: 0.1 by itself, with tome (0.9, 0.5), with int8 (1, 0.6)."""
    made = Rows(tmp_path)
    for of, top1, size in ((recipe(), 80.0, 1000.0), (TOME, 72.0, 500.0), (INT8, 80.0, 600.0), (PRUNE, 40.0, 900.0)):
        made.write(of, top1_pct=top1, size_bytes=size, throughput_images_per_s=7000.0)
    report = made.report(["top1_pct", "size_bytes"])
    assert report.volume == pytest.approx(0.9 * 0.1 + 0.5)
    volumes = {t["technique"]: (t["recipes"], pytest.approx(t["volume"])) for t in report.techniques}
    assert volumes == {
        "tome": (1, 0.5),
        "dynamic_int8": (1, 0.9 * 0.6 + 0.1 * 0.1),
        "magnitude_prune": (1, 0.59),
        "precision": (0, 0.59),
    }
    assert report.techniques[0]["technique"] == "tome", "the one that is missed most comes first"


def test_a_study_with_its_own_reference_point(tmp_path: Path) -> None:
    made = Rows(tmp_path, reference_point={"size_bytes": 2000})
    for of, top1, size in ((recipe(), 80.0, 1000.0), (TOME, 80.0, 500.0)):
        made.write(of, top1_pct=top1, size_bytes=size, throughput_images_per_s=7000.0)
    assert made.report(["top1_pct", "size_bytes"]).volume == pytest.approx(1.5)


def test_seeds_are_one_recipe_with_the_means(tmp_path: Path) -> None:
    made = Rows(tmp_path, seeds=[0, 1])
    for seed, top1 in ((0, 97.0), (1, 95.0)):
        made.write(recipe(), seed=seed, top1_pct=98.0, size_bytes=8e5, throughput_images_per_s=7000.0)
        made.write(TOME, seed=seed, top1_pct=top1, size_bytes=4e5, throughput_images_per_s=9000.0 + seed)
    baseline, found = made.report().candidates
    assert (found.seeds, found.value[:2], found.ratio[1]) == (2, [96.0, 4e5], 0.5)
    assert baseline.is_baseline


# --- words ------------------------------------------------------------------------------------------------------------


def test_the_result_in_words(report: Report) -> None:
    headline, detail = verdict(report)
    certain = [c for c in report.frontier("certain") if not c.is_baseline]
    assert headline.startswith(f"{len(certain)} recipes ")
    assert "certainly on the frontier of top-1 accuracy, artefact size and throughput" in headline
    assert "has 1.7× the throughput (tome(r=1, schedule=decreasing))" in detail
    assert re.match(r"Within 1 point of the baseline's accuracy, the best is 4\.0× smaller .* or has 1\.7×", detail)


def test_what_lies_within_the_noise_is_no_gain(report: Report) -> None:
    where = report.position("throughput_images_per_s")
    assert where is not None
    assert best_close(report)["throughput_images_per_s"][1] == pytest.approx(12 / 7, rel=1e-3)
    wide = [replace(c, low=[None, None, 0.5 * (c.value[2] or 0), *c.low[3:]]) for c in report.candidates]
    assert "throughput_images_per_s" not in best_close(replace(report, candidates=wide))
    false = [replace(c, simulated=True) for c in report.candidates]
    assert "throughput_images_per_s" not in best_close(replace(report, candidates=false))


@pytest.mark.parametrize(
    ("statuses", "top1", "said"),
    [
        ([], 0.0, "No trial has ended yet."),
        (["infeasible", "timeout"], 0.0, "No recipe is feasible: 2 failed."),
        (["ok"], 80.0, "No recipe is feasible: 1 breaks a constraint of the study (not top1_pct_drop <= 5)."),
    ],
)
def test_what_is_said_of_nothing(tmp_path: Path, statuses: list[str], top1: float, said: str) -> None:
    made = Rows(tmp_path, constraints=["top1_pct_drop <= 5"])
    made.write(recipe(), top1_pct=98.0, size_bytes=8e5, throughput_images_per_s=7000.0)
    for n, status in enumerate(statuses):
        made.write(recipe(("tome", {"r": n})), status=status, failure="no", top1_pct=top1, size_bytes=1e5)
    assert verdict(made.report()) == (said, "")


def test_facts_name_model_data_device_and_noise(report: Report) -> None:
    from datetime import UTC, datetime

    found = dict(facts(report, datetime(2026, 1, 2, tzinfo=UTC), "1.2"))
    assert found["Model"] == "ViT, width 16, depth 2, 2 heads, patch 4"
    assert found["Data"] == "digits, 8 px, 100 search images"
    assert found["Device"] == "A processor"
    assert found["Trials"] == "12 of 6 done, failed: 3 infeasible, 1 timeout"
    assert found["Baseline throughput"] == "7000 images/s as bf16, batch 64; A/A noise σ 1.0 %"
    assert found["Run"] == "2023-11-14 22:13 UTC, over 12 min 30 s"
    assert found["Report"] == "vitpareto 1.2, 2026-01-02 00:00 UTC"


def test_what_was_said_of_the_data_is_a_fact(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    made = Rows(tmp_path)
    record = made.ledger.study_record()
    assert record is not None
    made.ledger.write_study({**record, "data": {"notes": ["all images are grey"], "warnings": ["3 copies"]}})
    found = dict(facts(made.report(), datetime(2026, 1, 2, tzinfo=UTC), "1.2"))
    assert found["Of the data"] == "Warning: 3 copies; all images are grey"
    made.ledger.write_study({**record, "data": 3})
    assert "Of the data" not in dict(facts(made.report(), datetime(2026, 1, 2, tzinfo=UTC), "1.2"))


# --- the page, as text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [HOSTILE, "<!--<script>", "]]>", "\u2028\u2029", "\ud800", "é", '"\\'])
def test_no_text_leaves_its_script_element(text: str) -> None:
    made = embedded({"a": text})
    assert not set("<>&") & set(made)
    assert made.isascii()
    assert json.loads(made) == {"a": text}


def test_infinities_are_null() -> None:
    assert json.loads(embedded([math.inf, math.nan, 1.5])) == [None, None, 1.5]


def test_the_page_allows_only_its_own_scripts(report: Report) -> None:
    text = page(report)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    script = next(part for part in policy.split(";") if "script-src" in part)
    assert not re.search(r"unsafe|http|\*|self", script)
    assert not re.search(r"<(link|script|img|iframe)[^>]* (src|href)=(?!\"data:)", text.replace("<img src=x", ""))


# --- the command ------------------------------------------------------------------------------------------------------


def call(rows: Rows, *arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["report", *arguments, "--storage", str(rows.folder)])


@pytest.mark.parametrize("suffix", [".html", ".svg", ".PNG", ".pdf"])
def test_the_command_writes_and_replaces(rows: Rows, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"out{suffix}"
    file.write_text("old")
    done = call(rows, "looks", "-o", str(file), "--objectives", "top1_pct,size_bytes")
    assert (done.exit_code, done.stdout) == (0, f"{file}\n"), done.output
    assert file.stat().st_size > 10_000
    assert [p.name for p in tmp_path.iterdir()] == [file.name], "no temporary file stays"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("r.gif", r"must end in \.html \(a page\) or in \.svg, \.png, \.pdf \(a figure\), got \.gif"),
        ("r", "got no suffix"),
        ("folder.html", "is a folder; name a file in it"),
        ("absent/r.html", "there is no folder .*absent; make it first"),
    ],
)
def test_an_output_that_cannot_be_is_refused(rows: Rows, tmp_path: Path, output: str, said: str) -> None:
    (tmp_path / "folder.html").mkdir()
    done = call(rows, "looks", "-o", str(tmp_path / output))
    assert done.exit_code == 2
    assert re.search(said, done.stderr)
    assert done.stdout == ""


def test_wrong_questions_are_usage_errors(rows: Rows, tmp_path: Path) -> None:
    file = str(tmp_path / "r.svg")
    for arguments, said in (
        (("nobody", "-o", file), "there is no study 'nobody'"),
        (("looks", "-o", file, "--objectives", "top1"), "did you mean top1_pct"),
        (("looks", "-o", file, "--objectives", "top1_pct"), "needs two objectives"),
    ):
        done = call(rows, *arguments)
        assert (done.exit_code, said in done.stderr) == (2, True), done.output
    assert not Path(file).exists()


@pytest.mark.parametrize(("suffix", "absent"), [("html", "matplotlib"), ("svg", "plotly")])
def test_the_command_imports_only_what_it_needs(rows: Rows, tmp_path: Path, suffix: str, absent: str) -> None:
    code = (
        "import sys, json\nfrom orchestrator.cli import app\n"
        f"app(['report', 'looks', '-o', r'{tmp_path}/r.{suffix}', '--storage', r'{rows.folder}'], standalone_mode=False)\n"
        f"heavy = ('torch', 'ray', 'scipy', 'sklearn', 'optuna', '{absent}')\n"
        "print(json.dumps([m for m in heavy if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
