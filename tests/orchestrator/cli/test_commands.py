"""The command line on a study that was really run: what it prints, in every format, and what it refuses."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.cli_calls import call, process, refused
from tests.processes import environment
from tests.studies import ONE_WORKER, tiny_study

RECIPES = [["precision"], ["dynamic_int8"], [{"magnitude_prune": {"mlp_ratio": 0.5}}, "precision"]]


@dataclass(frozen=True)
class Run:
    """What `vitpareto run` printed, and where its results are."""

    stdout: str
    stderr: str
    storage: Path
    file: Path

    def rows(self, *arguments: str) -> list[dict[str, Any]]:
        return list(json.loads(self.read(*arguments, "--format", "json")))

    def read(self, *arguments: str) -> str:
        result = call(*arguments, storage=self.storage)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        return result.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny study, run once by the command itself."""
    folder = tmp_path_factory.mktemp("cli")
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_study(recipes=RECIPES, trials=3, resources=ONE_WORKER)))
    command = ["-m", "orchestrator.cli", "run", str(file), "--storage", "results"]
    done = process(*command, folder=folder)
    assert done.returncode == 0, done.stderr
    return Run(done.stdout, done.stderr, folder / "results", file)


@pytest.mark.ray
def test_run_prints_the_frontier_and_where_it_is(run: Run) -> None:
    lines = run.stdout.splitlines()
    assert lines[0].split() == ["trial_id", "top1_pct", "size_bytes", "top1_pct_drop", "probability", "label"]
    assert lines[-1] == f"results: {run.storage}/tiny"
    assert {r["trial_id"] for r in run.rows("pareto", "tiny")} == {line.split()[0] for line in lines[2:-1]}
    assert lines[0].index("label") <= 80, (
        "the numbers of two objectives fit a narrow terminal; labels are as long as they are"
    )


@pytest.mark.ray
def test_run_says_how_it_goes_on_stderr(run: Run) -> None:
    lines = run.stderr.splitlines()
    assert lines[0] == f"study tiny: up to 3 trials on a local Ray, results in {run.storage}/tiny"
    assert re.fullmatch(r"3 of 3 trials after .*, failed: none, hypervolume 0\.\d{4}", lines[-1])
    assert any("making and measuring the baseline" in line for line in lines)
    assert all(len(line) <= 160 for line in lines)


@pytest.mark.ray
def test_what_was_said_of_the_data_is_kept(run: Run) -> None:
    record = json.loads((run.storage / "tiny" / "study.json").read_text())
    assert record["data"] == {"notes": [], "warnings": []}


@pytest.mark.ray
def test_run_again_runs_nothing(run: Run) -> None:
    before = run.rows("query", "tiny", "SELECT * FROM attempts")
    done = call("run", str(run.file), "--quiet", storage=run.storage)
    assert done.exit_code == 0, done.output
    assert done.stdout == run.stdout
    assert run.rows("query", "tiny", "SELECT * FROM attempts") == before


@pytest.mark.ray
def test_a_changed_study_of_the_same_name_is_refused(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_study(objectives=["top1_pct", "params"])))
    said = refused("run", str(file), storage=run.storage)
    assert "holds another study of the name tiny: they differ in objectives, recipes; use another --name" in said
    assert call("plan", str(file), storage=run.storage).exit_code == 2


@pytest.mark.ray
def test_plan_knows_what_is_done(run: Run) -> None:
    assert "time: 3 trials are done, 0 are left" in run.read("plan", str(run.file))


@pytest.mark.ray
def test_status(run: Run) -> None:
    (row,) = run.rows("status")
    assert row == run.rows("status", "tiny")[0]
    assert (row["study"], row["state"], row["done"], row["budget"], row["failed"]) == ("tiny", "done", 3, 3, {})
    assert row["problems"] == []
    assert 0 < row["hypervolume"] < 1
    assert "tiny    done    3/3" in run.read("status")


@pytest.mark.ray
def test_status_names_bad_files_and_goes_on(run: Run) -> None:
    foreign = run.storage / "tiny" / "attempts" / "0.1.json"
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("{")
    try:
        found = call("status", "tiny", storage=run.storage)
    finally:
        foreign.unlink()
    assert (found.exit_code, found.stderr.count("\n")) == (1, 3)
    assert "speeds taken over from equal structures" in found.stderr
    assert "tiny/attempts/0.1.json" in found.stderr
    assert "`vitpareto repair tiny` says what is left" in found.stderr


@pytest.mark.ray
def test_status_of_a_damaged_study_does_not_hide_the_others(run: Run) -> None:
    damaged = run.storage / "damaged" / "study.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    try:
        found = call("status", storage=run.storage)
        assert "damaged/study.json is damaged" in refused("status", "damaged", storage=run.storage, status=1)
    finally:
        shutil.rmtree(damaged.parent)
    assert (found.exit_code, "tiny    done" in found.stdout) == (1, True)
    assert "vitpareto: damaged/study.json is damaged" in found.stderr


@pytest.mark.ray
def test_show_has_recipe_units_conditions_and_the_way_to_rerun(run: Run) -> None:
    prune = run.rows("query", "tiny", "SELECT trial_id FROM trials WHERE techniques LIKE '%prune%'")[0]["trial_id"]
    text = run.read("show", "tiny", prune[:8])
    assert f"trial {prune} of tiny, seed 0" in text
    assert re.search(r"  1\. magnitude_prune\(.*mlp_ratio=0\.5, round_to=1\)\n  2\. precision\(dtype=bf16\)", text)
    for pattern in (
        r"top1_pct: [\d.]+ % \([\d.]+\.\.[\d.]+\)",
        r"size_bytes: [\d.]+ kB \(\d+ bytes\)",
        r"macs: [\d.]+ k \(\d+\)",
        r"images 100",
    ):
        assert re.search(pattern, text), pattern
    assert f"--storage {run.storage} --spec > spec.json && python -m workers spec.json" in text
    row = json.loads(run.read("show", "tiny", prune, "--json"))
    assert row["spec"]["trial_id"] == prune
    assert row["started_at"].endswith("Z")


@pytest.mark.ray
def test_a_shown_spec_reruns_alone(run: Run, tmp_path: Path) -> None:
    member = run.rows("pareto", "tiny")[0]
    (tmp_path / "spec.json").write_text(run.read("show", "tiny", member["trial_id"], "--spec"))
    done = process("-m", "workers", "spec.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "ok"
    assert (result["metrics"]["top1_pct"], result["metrics"]["size_bytes"]) == (
        member["top1_pct"],
        member["size_bytes"],
    )


@pytest.mark.ray
def test_show_of_none_or_several(run: Run) -> None:
    assert "no trial has an id that starts so; list them with" in refused("show", "tiny", "zz", storage=run.storage)
    assert "4 trials match: " in refused("show", "tiny", "", storage=run.storage)


@pytest.mark.ray
def test_pareto_in_every_format(run: Run) -> None:
    rows = run.rows("pareto", "tiny")
    csv = run.read("pareto", "tiny", "--format", "csv").splitlines()
    assert len(csv) == len(rows) + 1
    assert csv[0].split(",")[0] == "trial_id"
    binary = call("pareto", "tiny", "--format", "parquet", storage=run.storage).stdout_bytes
    assert pq.read_table(io.BytesIO(binary)).to_pylist() == rows
    labels = [line.split(maxsplit=7)[-1] for line in run.read("pareto", "tiny").splitlines()[2:]]
    assert all("skip_head" not in label for label in labels), "what the study fixes is left out"


@pytest.mark.ray
def test_pareto_of_other_objectives_and_conditions(run: Run) -> None:
    (best,) = {r["params"] for r in run.rows("pareto", "tiny", "--objectives", "params")}
    assert best == min(r["params"] for r in run.rows("query", "tiny", "SELECT params FROM trials"))
    few = run.rows("pareto", "tiny", "--where", "size_bytes < 2e4 and top1_pct_drop <= 100", "--all")
    assert few
    assert all(r["size_bytes"] < 2e4 for r in few)
    none = call("pareto", "tiny", "--where", "size_bytes < 1", storage=run.storage)
    assert (none.exit_code, none.stderr) == (0, "vitpareto: the frontier is empty: no trial meets the condition\n")


@pytest.mark.ray
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pareto", "tiny", "--objectives", "top1"), "did you mean top1_pct?"),
        (("pareto", "tiny", "--objectives", ""), "objectives: name at least one of top1_pct"),
        (("pareto", "tiny", "--objectives", "duration_s"), "say minimize or maximize for duration_s"),
        (("pareto", "tiny", "--where", "size_byte < 3"), "no column 'size_byte' (did you mean size_bytes?)"),
        (("pareto", "tiny", "--where", "size_bytes"), "must be a condition such as size_bytes < 4e6"),
        (("query", "tiny", "SELECT top1 FROM trials"), "no column 'top1' (did you mean top1_pct?)"),
        (("query", "tiny", "DELETE FROM attempts"), "must be one SELECT statement"),
        (("query", "tiny", "SELECT * FROM 'x.csv'"), "query: "),
        (("query", "tiny", ""), "must be one SELECT statement"),
        (("resume", "tiny", "--trials", "+0"), "--trials +0: must be a number of trials, 20, or how many more, +5"),
        (("resume", "tiny", "--trials", "many"), "--trials many: must be a number of trials"),
        (("resume", "tiny", "--time-budget", "soon"), "--time-budget: must be a number with one of the units"),
        (("status", "nosuch"), "there is no study 'nosuch' in "),
        (("status", "../tiny"), "there is no study '../tiny' in "),
    ],
)
def test_wrong_questions_are_answered_in_one_line(run: Run, arguments: tuple[str, ...], said: str) -> None:
    text = refused(*arguments, storage=run.storage)
    assert said in text
    assert text.startswith("vitpareto: ")
    assert text.count("\n") == 1


@pytest.mark.ray
def test_query_with_units_for_people_and_plain_numbers_for_programs(run: Run) -> None:
    counted = "SELECT status, count(*) AS n FROM trials GROUP BY status"
    assert run.rows("query", "tiny", counted) == [{"status": "ok", "n": 4}]
    assert "kB" in run.read("query", "tiny", "SELECT size_bytes FROM trials")
    assert "kB" not in run.read("query", "tiny", "SELECT size_bytes FROM trials", "--format", "csv")


READING = """
import sys
from orchestrator import cli
try:
    cli.app(sys.argv[1:])
finally:
    print(*sorted({"torch", "timm", "ray", "optuna", "sklearn"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.ray
@pytest.mark.parametrize(
    "arguments", [("status",), ("show", "tiny", ""), ("pareto", "tiny"), ("query", "tiny", "SELECT * FROM trials")]
)
def test_commands_that_only_read_import_little(run: Run, arguments: tuple[str, ...]) -> None:
    if arguments[0] == "show":
        arguments = (*arguments[:2], run.rows("pareto", "tiny")[0]["trial_id"])
    done = process("-c", READING, *arguments, "--storage", str(run.storage), folder=run.storage)
    assert (done.returncode, done.stderr) == (0, "\n")
    assert done.stdout


@pytest.mark.ray
def test_a_reader_that_stops_early_is_no_error(run: Run) -> None:
    command = f"{sys.executable} -m orchestrator.cli query tiny 'SELECT * FROM range(200000)' --format csv"
    shell = f"set -o pipefail; {command} --storage {run.storage} | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "range\n", "")
