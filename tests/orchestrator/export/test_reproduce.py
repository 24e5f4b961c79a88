"""Reproducing a row: from its spec alone, with nothing cached and no Ray, and an honest verdict on every number."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.export.reproduce import reproduce
from orchestrator.ledger import Ledger, attempt_row
from orchestrator.study.load import load_study
from tests.processes import environment
from tests.studies import tiny_study
from workers.node.storage import LocalStorage
from workers.run import run_trial
from workers.techniques import registry, versions
from workers.trial import Recipe, Step, TrialSpec, trial_id

FAST = {"window_s": 0.0, "latency_pairs": 5, "warmup": 1, "noise_runs": 1, "threads": 1}
LATENCY = {
    "latency_ms_p50": 4.0,
    "latency_ms_p50_ratio": 0.8,
    "latency_ms_p50_low": 3.8,
    "latency_ms_p50_high": 4.2,
}
"""As if it had been measured; how fast this machine is just now is no matter of a test."""

PRUNE = ("magnitude_prune", {"mlp_ratio": 0.5, "head_ratio": 0.0})
ROWS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "timed": (PRUNE, ("tome", {"r": 1}), ("dynamic_int8", {})),
    "plain": (("precision", {}),),
    "infeasible": (("nystrom", {"landmarks": 128}),),
}


def recipe(steps: tuple[tuple[str, dict[str, Any]], ...]) -> Recipe:
    known = registry()
    return Recipe(tuple(Step(name, asdict(known[name].Config(**config))) for name, config in steps))


def copied(row: Mapping[str, Any], identity: str, **changes: Any) -> dict[str, Any]:
    """A row as if it had been another trial's, with other numbers; ``spec`` is changed, all else replaced."""
    found = copy.deepcopy(dict(row))
    found["spec"] |= {"trial_id": identity, **changes.pop("spec", {})}
    return {**found, "trial_id": identity, "attempt_id": f"of-{identity}", **changes}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of real trials, and some that say something else than what was found."""
    folder = LocalStorage(tmp_path_factory.mktemp("results"))
    config = load_study(tiny_study("tiny", measurement=FAST))
    context = config.context()
    ledger = Ledger(folder, "tiny", [], context.digest)
    ledger.write_study({"config": config.to_dict(), "token": "t", "context": context.digest})
    rows = {}
    for name, steps in ROWS.items():
        made = recipe(steps)
        objectives = ("top1_pct", "size_bytes")
        spec = TrialSpec(
            "tiny",
            trial_id(made, 0, context, versions()),
            made,
            0,
            context,
            folder.url,
            "t",
            objectives,
            timeout_s=300.0,
        )
        rows[name] = attempt_row(spec, run_trial(spec), None)
        if name == "timed":
            rows[name]["metrics"] |= LATENCY
            rows[name]["spec"]["objectives"].append("latency_ms_p50")
        ledger.write_attempt(copied(rows[name], name))
    plain = rows["plain"]
    metrics = {**plain["metrics"], "size_bytes": plain["metrics"]["size_bytes"] + 1}
    ledger.write_attempt(copied(plain, "larger", metrics=metrics))
    metrics = {"top1_pct": 1.0, "top1_pct_low": 0.5, "top1_pct_high": 1.5, "size_bytes": plain["metrics"]["size_bytes"]}
    older = {
        **plain["provenance"],
        "versions": {**plain["provenance"]["versions"], "torch": "1.0"},
        "device_name": "Another CPU",
        "cpu_flags": plain["provenance"]["cpu_flags"] + " of_another",
    }
    ledger.write_attempt(copied(plain, "worse", metrics=metrics, measurements=[], provenance=older))
    data = {**plain["spec"]["context"]["data"], "kind": "imagefolder", "path": "/gone/images"}
    ledger.write_attempt(copied(plain, "nodata", spec={"context": {**plain["spec"]["context"], "data": data}}))
    data = {**plain["spec"]["context"]["data"], "digest": "0123456789abcdef"}
    ledger.write_attempt(copied(plain, "otherdata", spec={"context": {**plain["spec"]["context"], "data": data}}))
    cuda = {"context": {**plain["spec"]["context"], "device": "cuda"}, "objectives": ["top1_pct", "latency_ms_p50"]}
    ledger.write_attempt(copied(plain, "cuda", metrics={**plain["metrics"], **LATENCY}, spec=cuda))
    model = {**plain["spec"]["context"]["model"], "checkpoint": "/gone/m.safetensors", "checkpoint_digest": "0"}
    ledger.write_attempt(copied(plain, "nocheckpoint", spec={"context": {**plain["spec"]["context"], "model": model}}))
    return Path(folder.url)


def call(storage: Path, trial: str, *more: str) -> Result:
    return CliRunner().invoke(cli.app, ["reproduce", "tiny", trial, "--storage", str(storage), *more])


IN_A_PROCESS = """
import sys
from orchestrator.cli import app
try:
    app(sys.argv[1:])
except SystemExit as error:
    code = error.code
print([m for m in ("ray", "optuna") if m in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def test_a_row_is_run_again_from_nothing_and_judged(storage: Path, tmp_path: Path) -> None:
    before = sorted(p for p in storage.rglob("*"))
    arguments = [
        "reproduce",
        "tiny",
        "timed",
        "--storage",
        str(storage),
        "--keep",
        str(tmp_path / "kept"),
        "--format",
        "json",
    ]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    assert (found["row_status"], found["status"], found["failure"]) == ("ok", "ok", None)
    verdicts = {v["objective"]: v for v in found["verdicts"]}
    assert list(verdicts) == ["top1_pct", "size_bytes", "params", "macs", "latency_ms_p50"]
    assert verdicts["top1_pct"]["note"] == "the same logits"
    assert {verdicts[n]["verdict"] for n in ("top1_pct", "size_bytes", "params", "macs")} == {"equal"}
    speed = verdicts["latency_ms_p50"]
    assert [speed["row"], speed["row_low"], speed["row_high"]] == pytest.approx([0.8, 0.76, 0.84])
    assert speed["verdict"] in ("inside", "outside")
    assert speed["here_low"] < speed["here"] < speed["here_high"]
    assert found["reproduced"] == (speed["verdict"] == "inside") == (done.returncode == 0)
    assert {d["what"] for d in found["differences"]} <= {"git_commit", "git_dirty", "techniques"}
    words = done.stderr
    assert words.splitlines()[-1] == "[]"
    assert [w for w in ("baseline", "surgery", "recovery", "conversion") if f"{w} done after" in words] == [
        "baseline",
        "surgery",
        "recovery",
        "conversion",
    ]
    assert len(list((tmp_path / "kept" / "stages").iterdir())) == 4
    assert sorted(p for p in storage.rglob("*")) == before


def test_people_read_what_was_compared(storage: Path) -> None:
    done = call(storage, "plain")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "status: ok, as in the row" in lines
    assert lines[-1] == "reproduced: yes"
    size = next(line for line in lines if "size_bytes" in line)
    assert "equal" in size
    assert "kB" in size


def test_another_size_is_outside(storage: Path) -> None:
    done = call(storage, "larger")
    assert done.exit_code == 1
    line = next(line for line in done.stdout.splitlines() if "size_bytes" in line)
    row, here = (int(n.replace(",", "")) for n in re.findall(r"must be equal: (\S+) in the row, (\S+) here", line)[0])
    assert row == here + 1
    assert re.search(r"differs: techniques: other versions in the row, precision \d+ here", done.stdout)
    assert done.stdout.splitlines()[-1] == "reproduced: no"


def test_another_accuracy_is_outside_and_older_versions_are_named(storage: Path) -> None:
    done = call(storage, "worse", "--format", "csv")
    assert done.exit_code == 1
    header, *lines = done.stdout.splitlines()
    verdicts = {line.split(",")[0]: dict(zip(header.split(","), line.split(","), strict=True)) for line in lines}
    assert verdicts["top1_pct"]["verdict"] == "outside"
    assert verdicts["size_bytes"]["verdict"] == "equal"
    assert f"differs: torch: 1.0 in the row, {torch.__version__} here" in done.stderr
    assert "differs: device_name: Another CPU in the row" in done.stderr
    assert "differs: cpu_flags: of_another in the row, no more here" in done.stderr


def test_a_row_of_a_gpu_runs_on_the_cpu_and_its_speed_is_not_judged(storage: Path) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "reproduce", "tiny", "cuda", "--storage", str(storage)]
    env = environment(CUDA_VISIBLE_DEVICES="")  # this machine may have one
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "which this machine has not: it is run on cpu, speed and memory are not judged" in done.stderr
    assert "not judged   measured on cuda, run here on cpu" in done.stdout


def test_a_failure_is_reproduced_by_failing_alike(storage: Path) -> None:
    done = call(storage, "infeasible")
    assert done.exit_code == 0, done.output
    assert "status: infeasible, as in the row: Infeasible: nystrom: landmarks=128" in done.stdout


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        ("none", "no trial has an id that starts so"),
        ("", "trials match"),
        ("nodata", "/gone/images"),
        ("otherdata", "digits: content must be the study's"),
        ("nocheckpoint", "/gone/m.safetensors"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(storage: Path, trial: str, words: str) -> None:
    done = call(storage, trial)
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_study_that_is_not_there(storage: Path) -> None:
    done = CliRunner().invoke(cli.app, ["reproduce", "tinny", "plain", "--storage", str(storage)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "there is no study 'tinny'" in done.stderr


def test_a_folder_in_use_is_not_run_in(storage: Path) -> None:
    done = call(storage, "plain", "--keep", str(storage))
    assert done.exit_code == 2
    assert "must be an empty folder or none yet" in done.stderr


def test_a_recipe_of_a_package_that_is_gone(storage: Path) -> None:
    ledger = Ledger(LocalStorage(storage), "tiny")
    row = next(r for r in ledger.attempts().to_pylist() if r["trial_id"] == "plain")
    spec = TrialSpec.from_dict(json.loads(row["spec"]))
    gone = replace(spec, trial_id="gone", recipe=Recipe((Step("of_another_package", {}),)))
    ledger.write_attempt(attempt_row(gone, run_trial(gone), None))
    done = call(storage, "gone")
    assert done.exit_code == 2
    assert "of_another_package, which is not installed here" in done.stderr


def test_from_python(storage: Path) -> None:
    lines: list[str] = []
    done = reproduce(Ledger(LocalStorage(storage), "tiny"), "plain", say=lines.append)
    assert done.reproduced
    assert done.folder is None
    assert lines[0].startswith("trial plain of tiny, seed 0: precision(")
    place = next(line for line in lines if "from nothing in" in line).rsplit(" ", 1)[1]
    assert not Path(place).exists()
