"""Accuracies other than top-1: VQA accuracy and recalls go wherever top-1 goes, told apart by the name that their records state."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from orchestrator.export.model_card import _metrics
from orchestrator.frontier.compare import BETTER, OPEN, SAME, WORSE, Comparison, compare, paired_test
from orchestrator.frontier.estimates import LEVELS, example_scores
from orchestrator.frontier.query import candidates, pareto, sql, within_budget
from orchestrator.frontier.verdicts import Run, judge
from orchestrator.ledger import Ledger
from orchestrator.ledger.show import describe_trial, find_trial
from orchestrator.report.data import TITLES
from orchestrator.report.read import read_report
from orchestrator.report.sentences import verdict
from orchestrator.study.constraints import DROPS, METRICS, derived, parse
from orchestrator.study.load import load_study
from orchestrator.study.schema import model_info
from orchestrator.sweep.opening import open_sweep
from orchestrator.words.units import unit_of
from tests.ledger_rows import STUDY, make_row
from tests.measured import record
from tests.studies import tiny_study
from workers.evaluation import wilson
from workers.metrics import ACCURACIES, OBJECTIVES
from workers.node.storage import LocalStorage
from workers.techniques import versions

Row = dict[str, Any]
RECALLS = ["text_recall1_pct", "image_recall1_pct"]


def accuracy(kind: str, name: str, scores: npt.NDArray[Any]) -> Row:
    """Returns the record of an accuracy: ``scores`` are bool, or levels 0 to 4."""
    if scores.dtype == np.bool_:
        shares, stated = scores.astype(float), {"correct_bits": np.packbits(scores).tobytes().hex()}
        low, high = wilson(int(scores.sum()), len(scores))
    else:
        shares, stated = LEVELS[scores].astype(float), {"levels": "".join(map(str, scores))}
        half = 1.96 * shares.std() / len(shares) ** 0.5
        low, high = shares.mean() - half, shares.mean() + half
    ends = {"wilson_low_pct": 100 * low, "wilson_high_pct": 100 * high}
    conditions = {"metric": name, "images": len(scores), "correct": float(shares.sum()), **ends, **stated}
    return record(kind, 100 * float(shares.mean()), "percent", conditions)


def made(n: int, size: float, **scores: npt.NDArray[Any]) -> Row:
    """Recipe ``n`` (0: the baseline) with its accuracies."""
    row = make_row(n, metrics={"size_bytes": size})
    row["measurements"] = [accuracy("accuracy_search", name, values) for name, values in scores.items()]
    for found in row["measurements"]:
        name, stated = found["conditions"]["metric"], found["conditions"]
        ends = {f"{name}_low": stated["wilson_low_pct"], f"{name}_high": stated["wilson_high_pct"]}
        row["metrics"] |= {name: found["value"], **ends}
    return row


def ledger_of(folder: Path, objectives: list[str], rows: list[Row], constraints: tuple[str, ...] = ()) -> Ledger:
    ledger = Ledger(LocalStorage(folder), STUDY, constraints, rows[0]["context"])
    config = load_study(tiny_study(STUDY)).to_dict() | {
        "objectives": dict.fromkeys(objectives, "maximize") | {"size_bytes": "minimize"},
        "constraints": list(constraints),
    }
    ledger.write_study({"config": config, "token": "t", "context": rows[0]["context"]})
    for row in rows:
        ledger.write_attempt(row)
    return ledger


def wrong(count: int, of: int, start: int = 0) -> npt.NDArray[np.bool_]:
    found = np.ones(of, np.bool_)
    found[start : start + count] = False
    return found


def levels(*runs: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Levels by runs of (level, length)."""
    return np.concatenate([np.full(length, level) for level, length in runs])


VQA = [
    made(0, 1000, vqa_pct=levels((4, 300), (0, 100))),
    made(1, 500, vqa_pct=levels((4, 294), (2, 6), (0, 100))),  # 6 answers that fewer annotators gave
    made(2, 400, vqa_pct=levels((4, 200), (1, 100), (0, 100))),
    made(3, 450, vqa_pct=levels((4, 200), (1, 100), (0, 100))),
    made(4, 300, vqa_pct=levels((4, 201), (1, 98), (2, 1), (0, 100))),  # little better than 2
]
RETRIEVAL = [
    made(0, 1000, text_recall1_pct=wrong(10, 100), image_recall1_pct=wrong(100, 500)),
    made(1, 500, text_recall1_pct=wrong(10, 100), image_recall1_pct=wrong(200, 500)),
    made(2, 400, text_recall1_pct=wrong(40, 100), image_recall1_pct=wrong(101, 500)),
    made(3, 300, text_recall1_pct=wrong(10, 100), image_recall1_pct=wrong(102, 500)),
]


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return ledger_of(tmp_path_factory.mktemp("vqa"), ["vqa_pct"], VQA, ("vqa_pct_drop <= 20",))


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return ledger_of(tmp_path_factory.mktemp("retrieval"), RECALLS, RETRIEVAL)


def scores_of(ledger: Ledger, name: str, rows: list[Row]) -> Any:
    """Returns the scores of the trials in the order of ``rows``."""
    at = {one: i for i, one in enumerate(ids(rows))}

    def read(snapshot: Any) -> Any:
        trials = snapshot.trials(["trial_id", "attempt_id"])
        found = example_scores(name, snapshot, trials)
        return None if found is None else found[np.argsort([at[one] for one in trials["trial_id"].to_pylist()])]

    return ledger.consistent(read)


def ids(rows: list[Row]) -> list[str]:
    return [row["trial_id"] for row in rows]


# --- names, constraints, columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACCURACIES)
def test_every_accuracy_has_a_drop_that_constraints_know(name: str) -> None:
    drop = f"{name}_drop"
    assert (DROPS[drop], unit_of(name), unit_of(drop)) == (name, "%", "percentage points")
    assert {drop, name, f"{name}_ratio"} <= set(METRICS)
    assert {name, drop, f"report_{name}"} <= set(TITLES)
    assert derived({name: 60.0}, {name: 61.5})[drop] == 1.5
    assert parse(f"{drop} <= 1").satisfied({drop: 0.5})


def test_drops_are_of_the_studys_own_accuracies(vqa: Ledger, retrieval: Ledger) -> None:
    found = {row["trial_id"]: row for row in vqa.trials(["trial_id", *DROPS, "feasible"]).to_pylist()}
    rows = [found[one] for one in ids(VQA)]
    assert [row["vqa_pct_drop"] for row in rows] == pytest.approx([0, 0.6, 17.5, 17.5, 17.25])
    assert all(row[drop] is None for row in rows for drop in DROPS if drop != "vqa_pct_drop")
    assert [row["feasible"] for row in rows] == [True] * 5
    row = next(r for r in retrieval.trials(["number", *DROPS]).to_pylist() if r["number"] == 2)
    assert (row["text_recall1_pct_drop"], row["image_recall1_pct_drop"]) == (pytest.approx(30), pytest.approx(0.2))
    assert row["top1_pct_drop"] is None
    assert sql(vqa, "SELECT count(*) AS n FROM trials WHERE vqa_pct > 60")["n"].to_pylist() == [2]


def test_a_constraint_on_a_drop_asks_for_its_accuracy(tmp_path: Path) -> None:
    config = load_study(tiny_study(objectives=["size_bytes"], constraints=["top1_pct_drop <= 1", "macs_ratio < 1"]))
    context, place = config.context(), {"storage_url": str(tmp_path), "token": "t", "versions": versions()}
    sweep = open_sweep(config, context, model_info(context), Ledger(LocalStorage(tmp_path), "tiny"), **place)
    assert sweep.baseline_spec().objectives == ("size_bytes", "top1_pct", "macs")


# --- example by example -----------------------------------------------------------------------------------------------


def test_records_of_several_accuracies_are_told_apart(retrieval: Ledger) -> None:
    names = [*RECALLS, "top1_pct", "vqa_pct"]
    text, image, top1, answers = (scores_of(retrieval, name, RETRIEVAL) for name in names)
    assert (text.shape, image.shape) == ((4, 100), (4, 500))
    assert text.sum(axis=1).tolist() == [90, 90, 60, 90]
    assert image.sum(axis=1).tolist() == [400, 300, 399, 398]
    assert top1 is None
    assert answers is None


def test_levels_are_shares_of_a_question(vqa: Ledger) -> None:
    scores = scores_of(vqa, "vqa_pct", VQA)
    assert np.unique(scores).tolist() == pytest.approx([0.0, 0.3, 0.6, 1.0])
    assert (100 * scores.mean(axis=1)).tolist() == pytest.approx([row["metrics"]["vqa_pct"] for row in VQA])


@pytest.mark.parametrize("broken", [{"levels": "012"}, {"levels": "0123456789"}, {"correct_bits": "zz"}, {}])
def test_a_record_that_cannot_be_read_says_nothing(tmp_path: Path, broken: Row) -> None:
    row = made(0, 1.0, vqa_pct=levels((4, 10)))
    stated = row["measurements"][0]["conditions"]
    row["measurements"][0]["conditions"] = {k: v for k, v in stated.items() if k != "levels"} | broken
    ledger = ledger_of(tmp_path, ["vqa_pct"], [row])
    assert scores_of(ledger, "vqa_pct", [row]) is None
    assert pareto(ledger, ["vqa_pct", "size_bytes"])["vqa_pct"].to_pylist() == [100.0]


def test_the_frontier_pairs_questions_and_groups_equal_answers(vqa: Ledger) -> None:
    rows = {row["trial_id"]: row for row in candidates(vqa, ["vqa_pct", "size_bytes"]).to_pylist()}
    assert all(rows[one]["vqa_pct_low"] < rows[one]["vqa_pct"] < rows[one]["vqa_pct_high"] for one in rows)
    probability = [rows[one]["probability"] for one in ids(VQA)]
    assert probability[0] > 0.95  # worse by 6 answers, each lower: paired, that is beyond noise
    assert probability[1] == 1
    assert probability[3] == 0  # the same answers as 2, and larger
    assert probability[4] == 1
    assert 0.05 < probability[2] < 0.5  # answers one question worse than 4, which is smaller


def test_a_budget_may_name_a_drop(vqa: Ledger) -> None:
    rows, choice = within_budget(vqa, ["size_bytes"], [parse("vqa_pct_drop <= 1")])
    assert dict(zip(choice, rows["trial_id"].to_pylist(), strict=True)) == {
        "best within": VQA[1]["trial_id"],
        "nearest beyond": VQA[4]["trial_id"],
    }


# --- side by side -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gains", [[], [4, -4], [3, 3, -6], [1, 1, 1, 6, -4], [10, 10, 10, -10, 10], [3, 3, 3, 3, 3, 10, -1]]
)
def test_the_paired_test_counts_every_choice_of_signs(gains: list[int]) -> None:
    sums = [abs(sum(s * g for s, g in zip(signs, gains, strict=True))) for signs in product((1, -1), repeat=len(gains))]
    seen = abs(sum(gains))
    expected = np.mean([(s > seen) + 0.5 * (s == seen) for s in sums]) if seen else 1.0
    found, name = paired_test(np.array([0, *gains, 0]))
    assert found == pytest.approx(expected)
    assert name == ("McNemar" if {abs(g) for g in gains} <= {10} else "sign flips")


def test_many_questions_are_tested_by_the_normal_distribution() -> None:
    rng = np.random.default_rng(0)
    gains = rng.choice([3, 6, 10], 6000) * rng.choice([1, -1], 6000, p=[0.51, 0.49])
    few, many = paired_test(gains[:4999])[0], paired_test(gains[:5001])[0]
    assert 0.001 < many < 0.9
    assert few == pytest.approx(many, rel=0.05)


def against(found: Comparison) -> dict[str, Any]:
    return {metric.name: metric.against[0] for metric in found.metrics}


def test_vqa_is_compared_question_by_question(vqa: Ledger) -> None:
    first = ids(VQA)
    one = against(compare(vqa, [first[0], first[1]]))["vqa_pct"]
    assert (one.verdict, one.only_first, one.only_this, one.test) == (WORSE, 6, 0, "sign flips")
    assert one.p_value == pytest.approx(0.5**6)
    assert one.difference == pytest.approx(-0.6)
    assert against(compare(vqa, [first[1], first[0]]))["vqa_pct"].verdict == BETTER
    assert against(compare(vqa, [first[2], first[3]]))["vqa_pct"].verdict == SAME
    assert against(compare(vqa, [first[2], first[4]]))["vqa_pct"].verdict == OPEN


def test_each_recall_has_its_own_verdict(retrieval: Ledger) -> None:
    first = ids(RETRIEVAL)
    found = against(compare(retrieval, [first[0], first[1]]))
    assert [found[name].verdict for name in RECALLS] == [SAME, WORSE]
    assert (found[RECALLS[1]].only_first, found[RECALLS[1]].test) == (100, "McNemar")


def test_a_run_again_is_judged_by_each_accuracy() -> None:
    metrics = {"vqa_pct": 60.0, "vqa_pct_low": 58.0, "vqa_pct_high": 62.0}
    row = Run("ok", None, metrics, "cpu", None, {"vqa_pct": "0142"}, {"vqa_pct": "l"}, {})

    def found(value: float, answers: str) -> str:
        here = Run("ok", None, {"vqa_pct": value}, "cpu", None, {"vqa_pct": answers}, {"vqa_pct": "m"}, {})
        (one,) = judge(row, here)
        return one.verdict

    assert [found(60.0, "0142"), found(61.0, "0143"), found(63.0, "0144")] == ["equal", "inside", "outside"]


# --- what people read -------------------------------------------------------------------------------------------------


def test_a_report_shows_both_recalls_and_close_means_close_in_both(retrieval: Ledger) -> None:
    trial, recipe = RETRIEVAL[3]["trial_id"], RETRIEVAL[3]["recipe_hash"]
    split = [accuracy("accuracy_report", name, wrong(20, 100)) for name in RECALLS]
    retrieval.write_report(trial, recipe, *split)
    report = read_report(retrieval)
    names = [metric.name for metric in report.metrics]
    assert names[:3] == [*RECALLS, "size_bytes"]
    assert not any("top1" in name or "vqa" in name for name in names)
    candidate = next(c for c in report.candidates if c.id == trial)
    for name in RECALLS:
        where = names.index(f"report_{name}")
        assert (candidate.value[where], candidate.low[where]) == (80.0, pytest.approx(100 * wilson(80, 100)[0]))
    headline, detail = verdict(report)
    assert "on the frontier of text recall@1, image recall@1 and artefact size" in headline
    assert detail == "Within 1 point of the baseline's accuracy, the best is 3.3× smaller (tome(r=3))."
    card = list(_metrics(find_trial(retrieval, trial), [m | {"attempt_id": None} for m in split]))
    low, high = (100 * end for end in wilson(398, 500))
    assert f"| Image recall@1, search split | 79.60 % | {low:.2f} % to {high:.2f} % | -0.40 points |" in card
    assert sum(line.startswith("| Text recall@1, report split (100 examples) | 80.00 %") for line in card) == 1


def test_show_has_the_accuracy_with_its_drop_and_no_levels(vqa: Ledger) -> None:
    text = "\n".join(describe_trial(find_trial(vqa, VQA[2]["trial_id"]), vqa, STUDY, "results"))
    assert "vqa_pct: 57.5 % (53.2..61.8)" in text
    assert "vqa_pct_drop: 17.50 points" in text
    assert "444444" not in text


def test_a_ledger_from_before_has_no_other_accuracy(tmp_path: Path) -> None:
    """Rows and records that know no accuracy but top-1, and say no name for it."""
    row = made(0, 1000, top1_pct=wrong(10, 100))
    del row["measurements"][0]["conditions"]["metric"]
    ledger = ledger_of(tmp_path, ["top1_pct"], [row, made(1, 500, top1_pct=wrong(12, 100))])
    found = against(compare(ledger, ids([row, made(1, 500, top1_pct=wrong(12, 100))])))
    assert list(found) == ["top1_pct", "size_bytes"]
    assert found["top1_pct"].only_first == 2
    assert all(ledger.trials([name])[name].null_count == 2 for name in OBJECTIVES if name in ACCURACIES[1:])
