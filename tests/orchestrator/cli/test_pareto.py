"""The commands ``pareto`` and ``compare`` over a ledger of measured rows: marks, groups, choices, verdicts, and refusals."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.frontier.compare import BETTER, OPEN, SAME, WORSE, compare
from orchestrator.frontier.query import candidates, pareto, uncertain
from orchestrator.ledger import Ledger
from orchestrator.study.load import load_study
from tests.ledger_rows import STUDY, make_row
from tests.measured import measure_again, measured_row
from tests.studies import tiny_study
from workers.node.storage import LocalStorage

OBJECTIVES = ["top1_pct", "size_bytes", "latency_ms_p50"]


def right(wrong: range | list[int], images: int = 287):
    found = np.ones(images, np.bool_)
    found[list(wrong)] = False
    return found


ROWS = {
    0: measured_row(0, right=right(range(5)), ratio=1.0, size_bytes=9000.0),
    1: measured_row(1, right=right(range(5)), ratio=0.60, size_bytes=4000.0),  # surely on the frontier
    2: measured_row(2, right=right(range(5)), ratio=0.61, size_bytes=4000.0),  # cannot be told from 1
    3: measured_row(
        3, right=right(range(40)), ratio=0.585, size_bytes=3999.5
    ),  # the size is the same within its resolution
    4: measured_row(4, right=right(range(60)), ratio=0.50, size_bytes=1000.0),  # surely, too
    5: measured_row(5, right=right(range(80)), ratio=0.49, size_bytes=1100.0),  # rests on noise: faster than 4 perhaps
    6: measured_row(6, right=right(range(90)), ratio=0.90, size_bytes=5000.0),  # hopeless
    7: measured_row(7, right=right(range(90)), ratio=1.30, size_bytes=900.0),  # small, and slower than the baseline
    8: measured_row(8, right=right(range(70)), ratio=0.2, size_bytes=2000.0, simulated=True),  # claims no speed
}
ID = {n: row["trial_id"] for n, row in ROWS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("storage")
    made = Ledger(LocalStorage(folder), STUDY)
    config = load_study(tiny_study(STUDY, objectives=OBJECTIVES)).to_dict()
    made.write_study({"config": config, "token": "t", "context": ROWS[0]["context"]})
    for row in ROWS.values():
        made.write_attempt(row)
    made.write_attempt(make_row(9, status="error"))
    return folder


@pytest.fixture(scope="module")
def ledger(folder):
    return Ledger(LocalStorage(folder), STUDY)


def call(folder, *arguments):
    return CliRunner().invoke(cli.app, [arguments[0], STUDY, *arguments[1:], "--storage", str(folder)])


def rows_of(folder, *arguments):
    result = call(folder, *arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(folder, *arguments, stdout=""):
    result = call(folder, *arguments)
    assert (result.exit_code, result.stdout) == (2, stdout), result.output
    assert "Traceback" not in result.stderr
    return result.stderr


# --- pareto -----------------------------------------------------------------------------------------------------------


def test_certain_ones_come_first_then_those_that_may_belong(folder):
    rows = rows_of(folder, "pareto")
    standing = [(row["trial_id"], row["certain"]) for row in rows]
    assert standing == [(ID[1], True), (ID[4], True), (ID[7], True), *((ID[n], False) for n in (3, 5))]
    assert all(row["certain"] == (row["probability"] >= 0.95) for row in rows)
    assert all(row["probability"] >= 0.05 for row in rows)


def test_probabilities_are_those_of_two_normal_speeds(folder):
    """The accuracy of 5 is surely worse than that of 4, its size too: it is on the frontier if it is faster."""
    chance = {row["trial_id"]: row["probability"] for row in rows_of(folder, "pareto")}
    z = np.log(0.50 / 0.49) / (0.02 * np.sqrt(2))
    expected = 0.5 + 0.5 * np.tanh(
        0.7988 * z * (1 + 0.04417 * z**2)
    )  # of the normal distribution, within 2e-4 (Page 1977)
    assert chance[ID[5]] == pytest.approx(expected, abs=3.5 * 0.5 / np.sqrt(1000))


def test_what_noise_does_not_tell_apart_is_one_group_with_its_members(folder):
    row = rows_of(folder, "pareto")[0]
    assert sorted(row["members"]) == sorted([ID[1], ID[2]])
    assert row["members"][0] == row["trial_id"]
    text = call(folder, "pareto")
    assert "+1" in text.stdout
    assert "+n more that noise does not tell apart" in text.stderr
    assert row["members"][1] not in text.stdout
    assert row["members"][1] in call(folder, "pareto", "--members").stdout


def test_the_table_marks_the_possible_and_shows_intervals(folder):
    result = call(folder, "pareto")
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert " ? " in lines[ID[5]]
    assert " ? " not in lines[ID[4]]
    assert "98.3 % (96.0..99.3)" in lines[ID[1]]
    assert "1.67x" in lines[ID[1]]
    assert "slower" in lines[ID[7]]
    assert "slower" not in lines[ID[1]]
    assert "? may belong to the frontier" in result.stderr


def test_no_speed_counts_where_no_integer_kernel_ran_or_that_is_slower(folder, ledger):
    """8 would be the fastest by far; 7 stays by its size, and would not by its speed alone."""
    everyone = {row["trial_id"]: row for row in candidates(ledger, OBJECTIVES).to_pylist()}
    assert len(everyone) == 9
    assert everyone[ID[8]]["simulated"]
    assert everyone[ID[8]]["probability"] == everyone[ID[6]]["probability"] == 0
    assert [n for n, trial in ID.items() if everyone[trial]["slower_than_baseline"]] == [7]
    by_speed = {row["trial_id"] for row in pareto(ledger, ["top1_pct", "latency_ms_p50"]).to_pylist()}
    assert not {ID[7], ID[8]} & by_speed


def test_other_formats_have_every_column(folder, tmp_path):
    rows = rows_of(folder, "pareto")
    read = list(csv.DictReader(io.StringIO(call(folder, "pareto", "--format", "csv").stdout)))
    assert [row["trial_id"] for row in read] == [row["trial_id"] for row in rows]
    assert set(read[0]) == set(rows[0])
    table = pq.read_table(io.BytesIO(call(folder, "pareto", "--format", "parquet").stdout_bytes))
    assert table["probability"].to_pylist() == [row["probability"] for row in rows]


def test_the_knee_is_one_certain_member(folder):
    rows = rows_of(folder, "pareto", "--knee")
    assert [row["trial_id"] for row in rows] == [ID[4]]
    assert "knee of 3 certain members: gives up" in call(folder, "pareto", "--knee").stderr


def test_a_budget_has_the_best_within_and_the_nearest_beyond(folder):
    rows = rows_of(folder, "pareto", "--budget", "size_bytes<=2e3", "--budget", "latency_ms_p50 < 3")
    assert [(row["choice"], row["trial_id"]) for row in rows] == [("best within", ID[4]), ("nearest beyond", ID[3])]
    both = rows_of(folder, "pareto", "--budget", "size_bytes<=2e3 and latency_ms_p50 < 3")
    assert both == rows
    table = call(folder, "pareto", "--budget", "top1_pct_drop <= 1", "--budget", "params < 5")
    assert table.exit_code == 2  # nothing has params
    assert table.stderr == "vitpareto: --budget: no trial keeps top1_pct_drop <= 1 and params < 5; allow more\n"


def test_a_budget_that_nothing_keeps_shows_the_nearest_and_fails(folder):
    result = call(folder, "pareto", "--budget", "size_bytes<=10", "--format", "json")
    assert result.exit_code == 2
    assert [row["trial_id"] for row in json.loads(result.stdout)] == [ID[7]]
    assert "no trial keeps size_bytes <= 10; what comes nearest is shown; allow more" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "size_byte<=3"], "did you mean size_bytes"),
        (["--budget", "size_bytes<=6MB"], "must be a metric, one of <= >= < >, and a number"),
        (["--budget", ""], "must be a metric"),
        (["--budget", "size_bytes<=3", "--knee"], "must not go together"),
        (["--objectives", "latency"], "no numeric column 'latency'"),
        (["--where", "size_bytes <"], "syntax error"),
    ],
)
def test_what_cannot_be_asked(folder, arguments, message):
    assert message in refused(folder, "pareto", *arguments)


def test_measuring_again_decides(tmp_path, ledger):
    assert {ID[4], ID[5]} <= set(uncertain(ledger, OBJECTIVES))
    again = Ledger(LocalStorage(tmp_path), STUDY)
    for row in ROWS.values():
        again.write_attempt(row)
    for _ in range(60):
        for n, ratio in ((4, 0.50), (5, 0.49)):
            measure_again(again, ROWS[n], ratio)
    chance = {row["trial_id"]: row["certain"] for row in pareto(again, OBJECTIVES).to_pylist()}
    assert chance[ID[5]]
    assert not {ID[4], ID[5]} & set(uncertain(again, OBJECTIVES))


# --- compare ----------------------------------------------------------------------------------------------------------


def verdicts(ledger, first, other):
    return {m.name: m.against[0] for m in compare(ledger, [ID[first], ID[other]]).metrics}


def test_exact_numbers_are_better_or_worse_and_noisy_ones_only_beyond_the_floor(ledger):
    found = verdicts(ledger, 4, 5)
    assert {name: one.verdict for name, one in found.items()} == {
        "top1_pct": WORSE,
        "size_bytes": WORSE,
        "latency_ms_p50": OPEN,
    }
    assert found["size_bytes"].ratio == pytest.approx(1.1)
    assert found["size_bytes"].probability is None
    speed = found["latency_ms_p50"]
    assert speed.ratio == pytest.approx(0.98)
    wide = np.exp(1.96 * 0.02 * np.sqrt(2))
    assert (speed.low, speed.high) == (pytest.approx(0.98 / wide, rel=0.01), pytest.approx(0.98 * wide, rel=0.01))
    assert 0.5 < speed.probability < 0.95


def test_accuracies_are_compared_image_by_image(ledger):
    accuracy = verdicts(ledger, 4, 5)["top1_pct"]
    assert (accuracy.only_first, accuracy.only_this) == (20, 0)
    assert accuracy.p_value == pytest.approx(2 * 0.5**20 / 2)
    assert accuracy.difference == pytest.approx(-100 * 20 / 287)
    assert accuracy.low < accuracy.difference < accuracy.high < 0
    assert accuracy.probability < 0.005
    assert verdicts(ledger, 1, 2)["top1_pct"].verdict == SAME


def test_a_difference_turns_with_the_order(ledger):
    there, back = verdicts(ledger, 4, 1), verdicts(ledger, 1, 4)
    assert there["latency_ms_p50"].verdict == WORSE
    assert back["latency_ms_p50"].verdict == BETTER
    assert there["latency_ms_p50"].probability == pytest.approx(1 - back["latency_ms_p50"].probability)
    assert there["latency_ms_p50"].low == pytest.approx(1 / back["latency_ms_p50"].high)


def test_the_command_says_it_in_words(folder):
    text = call(folder, "compare", ID[4], ID[5]).stdout
    assert "times 0.980 (0.9" in text
    assert "cannot be told apart" in text
    assert "probability of better" in text
    assert "20 lost, 0 won" in text
    assert "tome.r" in text
    rows = list(csv.DictReader(io.StringIO(call(folder, "compare", ID[4], ID[5], ID[1], "--format", "csv").stdout)))
    assert rows[1] == {"what": "  tome.r", ID[4]: "4", ID[5]: "5", ID[1]: "1"} | {
        f"{ID[n]} against the first": "" for n in (5, 1)
    }
    found = rows_of(folder, "compare", ID[4], ID[5])
    assert found["trials"] == [ID[4], ID[5]]
    assert found["recipe"] == {"tome.r": [4, 5]}


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        ([ID[1], ID[1]], "must name two or more different trials"),
        ([ID[1]], "must name two or more different trials"),
        ([ID[1], "nosuch"], "TRIAL 'nosuch': no trial has an id that starts so"),
        ([ID[1], make_row(9)["trial_id"]], "must be ok to have numbers, but its status is error"),
    ],
)
def test_what_cannot_be_compared(folder, trials, message):
    assert message in refused(folder, "compare", *trials)
