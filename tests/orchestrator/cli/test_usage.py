"""Commands without a study: help, plans, faults that are said before anything starts, wrong usage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from orchestrator import cli
from tests.cli_calls import call, refused
from tests.studies import tiny_study


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


@pytest.mark.parametrize("command", ["plan", "run"])
def test_what_a_model_cannot_take_is_said_before_anything_is_trained(command: str, tmp_path: Path) -> None:
    """Tokens of a rotary model cannot be merged: left out where there is more to search, refused where there is not."""
    model = {
        "name": "eva02_tiny_patch14_224",
        "options": {"embed_dim": 32, "depth": 1, "num_heads": 4, "patch_size": 4},
    }
    file, reason = tmp_path / "study.yaml", "excluded: tome: tokens are removed in timm's Block with its Attention"
    file.write_text(yaml.safe_dump(tiny_study(model=model, techniques={"tome": {}})))
    done = call(command, str(file), storage=tmp_path)
    assert (done.exit_code, "none of its techniques can work on eva02_tiny_patch14_224" in done.stderr) == (2, True)
    assert not (tmp_path / "stages").exists()
    if command == "plan":
        assert reason in done.stdout
        file.write_text(yaml.safe_dump(tiny_study(model=model, techniques={"tome": {}, "magnitude_prune": {}})))
        done = call("plan", str(file), storage=tmp_path)
        assert (done.exit_code, reason in done.stdout) == (0, True)
        assert (
            "excluded in part: magnitude_prune, 88% of its configs, most of them as this one: head_ratio="
            in done.stdout
        )


def test_techniques() -> None:
    rows = json.loads(call("techniques", "--format", "json").stdout)
    tome = next(r for r in rows if r["name"] == "tome")
    assert tome["family"] == "token_reduction"
    assert tome["parameters"][0]["range"] == {"low": 0, "high": 288, "step": 1}
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
        (
            {"name": "stages"},
            "must not be stages: the storage keeps the models of all studies in a folder of that name",
        ),
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
        (("run", "quick", "--name", "Stages"), "for example my-Stages"),
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
