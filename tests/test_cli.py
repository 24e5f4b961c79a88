"""The command line: what every command prints where, exit statuses, and errors of one line that say what to do."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer.main
import yaml
from click.testing import Result
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.labels import short_label
from orchestrator.rows import format_rows
from orchestrator.units import format_seconds
from tests.processes import environment
from tests.studies import tiny_study
from workers.protocol import STATUSES, Recipe, Step

RECIPES = [["precision"], ["dynamic_int8"], [{"magnitude_prune": {"mlp_ratio": 0.5}}, "precision"]]


def call(*arguments: str, storage: Path | None = None) -> Result:
    """Runs a command in this process."""
    options = [] if storage is None else ["--storage", str(storage)]
    return CliRunner().invoke(cli.app, [*arguments, *options])


def refused(*arguments: str, storage: Path | None = None, status: int = 2) -> str:
    """Runs a command that must fail with nothing on stdout; returns what it says on stderr, without a traceback."""
    result = call(*arguments, storage=storage)
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    assert "Traceback" not in result.stderr
    return result.stderr


def process(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(),
        timeout=200,
        check=False,
    )


# --- a real run, read by everything below -----------------------------------------------------------------------------


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
    file.write_text(yaml.safe_dump(tiny_study(recipes=RECIPES, trials=3)))
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
    assert (found.exit_code, found.stderr.count("\n")) == (0, 1)
    assert "tiny/attempts/0.1.json" in found.stderr


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
    assert (found.exit_code, "tiny    done" in found.stdout) == (0, True)
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


# --- without a study --------------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, ...]]:
    group = typer.main.get_command(cli.app)
    names = list(group.commands)  # type: ignore[attr-defined]
    return [(), *((name,) for name in names), *(("jobs", name) for name in group.commands["jobs"].commands)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_help_has_an_example(command: tuple[str, ...]) -> None:
    text = " ".join(call(*command, "--help").stdout.split())
    assert f"Example: vitpareto {' '.join(command)}".rstrip() in text


def test_plan_says_what_would_run() -> None:
    lines = call("plan", "quick").stdout.splitlines()
    assert lines[0].startswith("study quick: 16 recipes towards top1_pct (maximize), size_bytes (minimize)")
    assert any(re.match(r"search space: [\d,]+ recipes of up to 3 techniques", line) for line in lines)
    assert any(line.startswith("  excluded: ") for line in lines)
    assert any(line.startswith("each trial: 1 CPU") for line in lines)
    assert lines[-1].startswith("time: at most ")


def test_plan_of_a_space_without_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(tiny_study(techniques={"nystrom": {"landmarks": 64}})))
    done = call("plan", str(file), storage=tmp_path)
    assert (done.exit_code, "search space: 0 recipes" in done.stdout) == (2, True)
    assert "none of its techniques can work on vit" in done.stderr


def test_techniques() -> None:
    rows = json.loads(call("techniques", "--format", "json").stdout)
    tome = next(r for r in rows if r["name"] == "tome")
    assert tome["family"] == "token_reduction"
    assert tome["parameters"][0]["range"] == {"low": 0, "high": 64, "step": 1}
    table = call("techniques").stdout.splitlines()
    assert table[0].split() == ["technique", "family", "parameter", "searched", "default", "meaning"]
    assert len(call("techniques", "--format", "csv").stdout.splitlines()) == len(rows) + 1


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"kind": "parquet", "path": "nowhere.parquet"}}, "data.path (line "),
        ({"data": {"kind": "parquet", "path": "junk"}}, "must be a Parquet file"),
        ({"model": {"name": "vit_tinny_patch16_224"}}, "did you mean vit_tiny_patch16_224?"),
        ({"model": {"name": "resnet18"}}, "must be a plain vision transformer"),
        ({"model": {"create": {}, "checkpoint": "junk"}}, "model.checkpoint"),
        ({"name": "a/b"}, "for example a-b"),
    ],
)
def test_faults_of_a_study_are_said_before_anything_starts(
    command: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "junk").write_bytes(b"PAR1 and then no Parquet")
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(tiny_study(**change)))
    text = refused(command, str(file), "--quiet" if command == "run" else "--storage=results", storage=tmp_path / "out")
    assert said in text
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "quik"), "did you mean quick?"),
        (("run", "quick", "--trials", "0"), "--trials"),
        (("run", "quick", "--time-budget", "nonsense"), "for example 30m"),
        (("run", "quick", "--time-budget", "0s"), "must be above 0"),
        (("run", "quick", "--name", "a/b"), "for example a-b"),
        (("run", "quick", "--address", "nonsense"), "must be auto, or HOST:PORT of a running Ray"),
        (("resume", "nosuch"), "there is no study 'nosuch'"),
        (("pareto", "nosuch"), "there is no study 'nosuch'"),
        (("pareto", "nosuch", "--format", "xml"), "'xml'"),
        (("nonsense",), "No such command"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITPARETO_STORAGE", str(tmp_path / "results"))
    assert said in refused(*arguments)


def test_a_ray_that_does_not_answer(tmp_path: Path) -> None:
    said = refused("run", "quick", "--address", "127.0.0.1:1", storage=tmp_path / "results", status=1)
    assert "--address 127.0.0.1:1: no Ray answers there" in said
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "arguments", [("status",), ("status", "x"), ("pareto", "x"), ("run", "quick"), ("plan", "quick")]
)
def test_a_storage_that_is_a_file(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for storage in (tmp_path / "file", tmp_path / "file" / "below"):
        said = refused(*arguments, storage=storage)
        assert f"must be a folder, but {tmp_path}/file is a file; name another one with --storage" in said


def test_no_studies(tmp_path: Path) -> None:
    done = call("status", storage=tmp_path / "none")
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == f"vitpareto: there are no studies in {tmp_path}/none\n"
    assert json.loads(call("status", "--format", "json", storage=tmp_path).stdout) == []


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--address", "nonsense", "--storage", "/s"), 2, "write it like http://HEAD:8265"),
        (("--address", "http://127.0.0.1:1", "--storage", "results"), 2, "must be an absolute path"),
        (("--address", "http://127.0.0.1:1", "--storage", "/s", "--name", "a/b"), 2, "for example a-b"),
        (("--address", "http://127.0.0.1:1", "--storage", "/s", "--time-budget", "x"), 2, "for example 30m"),
        (("--address", "http://127.0.0.1:1", "--storage", "/s"), 1, "nothing answers at http://127.0.0.1:1"),
    ],
)
def test_submit_refuses(
    arguments: tuple[str, ...], status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(tiny_study()))
    assert said in refused("submit", str(file), "--working-dir", str(tmp_path), *arguments, status=status)


@pytest.mark.parametrize("command", [("status",), ("logs", "x"), ("stop", "x")])
def test_jobs_without_a_head(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    said = refused("jobs", *command, "--address", "http://127.0.0.1:1", status=1)
    assert "nothing answers at http://127.0.0.1:1" in said
    assert "write it like http://HEAD:8265" in refused("jobs", *command, "--address", "ray://head", status=2)


# --- what people read -------------------------------------------------------------------------------------------------


def snapshot(**changes: Any) -> Any:
    from orchestrator.sweep import Snapshot

    best = {"top1_pct": (97.123, "tome(r=2)"), "throughput_images_per_s": (12345.6, "a" * 200)}
    values = {"done": 7, "budget": 16, "running": 2, "failed": Counter({"timeout": 1}), "best": best}
    return Snapshot(**{**values, "hypervolume": 0.35, "elapsed_s": 65.0, "left_s": 130.0, **changes})


def test_progress_says_what_is_going_on() -> None:
    from orchestrator.progress import describe

    head, values, recipes = describe(snapshot(), has_baseline=True)
    assert head == "[1 min 05 s] 7/16 trials, 2 running, failed: 1 timeout, about 2 min 10 s left, hypervolume 0.3500"
    assert values == "best top1_pct 97.12 %, throughput_images_per_s 12,346 images/s"
    assert recipes[0] == "best top1_pct 97.12 %: tome(r=2)"
    assert describe(snapshot(), has_baseline=False)[0] == "[1 min 05 s] making and measuring the baseline"
    assert "stopping: interrupted" in describe(snapshot(note="interrupted"), has_baseline=True)[0]


def test_a_line_in_a_log_is_short_and_rare(capsys: pytest.CaptureFixture[str]) -> None:
    from orchestrator.progress import Progress

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
