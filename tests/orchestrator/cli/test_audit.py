"""The command ``audit``: rows, formats, and what it says to wrong arguments."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from tests.cli_calls import call, refused
from tests.outcome_tables import PARAMETERS, rows, written

COLUMNS = ("--parameters", ",".join(PARAMETERS), "--objectives", "accuracy:maximize,latency:minimize")
FEW = ("--evaluations", "12", "--seeds", "2")


@pytest.fixture
def table(tmp_path: Path) -> str:
    return str(written(tmp_path, rows()))


def test_a_row_a_sampler_and_seed(table: str) -> None:
    done = call("audit", "--table", table, *COLUMNS, "--sampler", "random,tpe", *FEW, "--format", "json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [(r["sampler"], r["seed"]) for r in found] == [("random", 0), ("random", 1), ("tpe", 0), ("tpe", 1)]
    for row in found:
        assert list(row["curve"]) == ["10", "12"]
        assert row["evaluations"] == 12
        assert 0 < row["curve"]["10"] <= row["curve"]["12"] == row["hypervolume_share"] <= 1
        assert row["ask_ms_p50"] > 0
    first, second = done.stderr.splitlines()
    assert first.startswith("vitpareto: random: ")
    assert "of the exact hypervolume after 12 evaluations (mean of 2 seeds" in second


def test_a_curve_is_columns_where_rows_are_flat(table: str) -> None:
    asked = ("audit", "--table", table, *COLUMNS, "--sampler", "random", *FEW)
    head, *body = list(csv.reader(io.StringIO(call(*asked, "--format", "csv").stdout)))
    assert head[-2:] == ["hypervolume_share_10", "hypervolume_share_12"]
    assert len(body) == 2
    assert "hypervolume_share_10" in call(*asked).stdout.splitlines()[0]


def added(monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    """Stands for an installed package with a sampler of the name ``mine``."""
    point = EntryPoint("mine", f"optuna.samplers:{sampler}", "vitpareto.samplers")
    for module in ("orchestrator.study.scalars", "orchestrator.sampling.samplers"):
        monkeypatch.setattr(f"{module}.entry_points", lambda **_: EntryPoints([point]))


def test_another_package_s_sampler_by_name(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    added(monkeypatch, "NSGAIIISampler")
    done = call("audit", "--table", table, *COLUMNS, "--sampler", "mine", *FEW, "--format", "json")
    assert [r["sampler"] for r in json.loads(done.stdout)] == ["mine", "mine"]


def test_another_package_s_sampler_that_needs_more_than_a_seed(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    added(monkeypatch, "GridSampler")
    said = refused("audit", "--table", table, *COLUMNS, "--sampler", "mine", *FEW)
    assert "sampler mine: must be made with a seed and nothing else" in said
    assert "search_space" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sampler", "tpe,nsga"), "--sampler: must be one of"),
        (("--sampler", "tpe,nsga"), "got 'nsga'; did you mean nsga2?"),
        (("--sampler", "tpe,,random"), "--sampler: must be different names with commas between them"),
        (("--known", "speed"), "--known: must be among --objectives, got 'speed'"),
        (("--known", "latency,accuracy"), "--known: must leave an objective to be found out"),
        (("--categorical", "widht"), "--categorical: must be among --parameters, got 'widht'; did you mean width?"),
        (("--evaluations", "241"), "--evaluations: must be at most the table's 240 rows, got 241"),
        (("--evaluations", "0"), "--evaluations"),
        (("--seeds", "0"), "--seeds"),
        (
            ("--objectives", "accuracy,latency"),
            "NAME:minimize or NAME:maximize, got 'accuracy'; for example accuracy:minimize",
        ),
        (("--objectives", "accuracy:max"), "got 'accuracy:max'"),
        (("--objectives", "accuracy:maximize,accuracy:minimize"), "must be different names, 'accuracy' is there twice"),
        (("--objectives", "accuracy:maximize,width:minimize"), "must not be parameters too, got width"),
        (("--objectives", "accuracy:maximize"), "does not, so there is no hypervolume"),
        (("--parameters", "first,second,first"), "--parameters: must be different names"),
        (("--parameters", "first,second,width"), "a configuration must have one row, rows 0 and 1 are equal"),
        (("--parameters", "first,second,width,droput"), "no droput (did you mean dropout?)"),
        (("--table", "nowhere.parquet"), "nowhere.parquet: there is no such file"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], said: str, table: str) -> None:
    text = refused("audit", "--table", table, *COLUMNS, *FEW, *arguments)
    assert said in text


def test_a_table_needs_neither_torch_nor_ray(table: str) -> None:
    code = (
        "import sys\nfrom orchestrator.cli import app\n"
        f"app({['audit', '--table', table, *COLUMNS, *FEW, '--format', 'json']!r}, standalone_mode=False)\n"
        "print({'torch', 'ray', 'timm'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "set()"
