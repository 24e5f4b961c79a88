"""Tables of outcomes: what becomes a parameter of which kind, what is refused, and the space that samplers see."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from orchestrator.sampling.suggestions import NearSuggest, RandomSuggest
from orchestrator.sampling.tables import OutcomeTable, TableError, TableFacts, TableSpace, read_outcomes
from orchestrator.study.axes import Choices, Grid
from tests.outcome_tables import OBJECTIVES, PARAMETERS, rows, written
from workers.trial import Recipe, Step


@pytest.fixture
def table(tmp_path: Path) -> OutcomeTable:
    return read_outcomes(written(tmp_path, rows()), PARAMETERS, OBJECTIVES)


def recipe(**config: Any) -> Recipe:
    return Recipe((Step("table", config),))


def test_text_is_categorical_and_numbers_are_ordered_by_rank(table: OutcomeTable) -> None:
    assert table.axes == {
        "first": Choices(("conv", "none", "pool", "skip")),
        "second": Choices(("conv", "none", "pool", "skip")),
        "width": Grid(0, 4, 1),
        "dropout": Grid(0, 2, 1),
    }
    assert len(table) == 240
    asked = recipe(first="skip", second="pool", width=3, dropout=1)
    (row,) = [r for r in rows() if (r["first"], r["second"], r["width"], r["dropout"]) == ("skip", "pool", 64, 0.25)]
    assert table.outcome(asked) == {name: pytest.approx(row[name]) for name in OBJECTIVES}


def test_bool_dictionaries_and_named_numbers_are_categorical(tmp_path: Path) -> None:
    data = pa.table(
        {
            "bias": pa.array([True, False, True]),
            "kind": pa.array(["b", "a", "a"]).dictionary_encode(),
            "kernel": pa.array([7, 3, 5], pa.int8()),
            "cost": pa.array([1, 2, 3]),
        }
    )
    found = read_outcomes(written(tmp_path, data), ["bias", "kind", "kernel"], {"cost": "minimize"}, ["kernel"])
    assert found.axes == {
        "bias": Choices((False, True)),
        "kind": Choices(("a", "b")),
        "kernel": Choices(("3", "5", "7")),
    }
    assert found.outcome(recipe(bias=True, kind="a", kernel="5")) == {"cost": 3.0}


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("width", [8, None, 16], "every value must be there and finite, width is None in row 1 (1 such rows)"),
        ("width", [8.0, 16.0, float("nan")], "width is nan in row 2"),
        ("first", ["a", None, None], "first is None in row 1 (2 such rows)"),
        ("cost", [1.0, float("nan"), 2.0], "cost is nan in row 1"),
        ("cost", [1.0, 2.0, float("inf")], "cost is inf in row 2"),
        ("cost", ["1", "2", "3"], "an objective must be numbers, the column cost is string"),
        ("cost", [True, False, True], "an objective must be numbers, the column cost is bool"),
        ("width", [[1], [2], [3]], "a parameter must be text, bool or numbers, the column width is list"),
        ("width", [8, 8, 16], "a configuration must have one row, rows 0 and 1 are equal in width, first"),
    ],
)
def test_what_is_no_table_of_outcomes(column: str, values: list[Any], said: str, tmp_path: Path) -> None:
    whole: dict[str, list[Any]] = {"width": [8, 16, 24], "first": ["a", "a", "a"], "cost": [1.0, 2.0, 3.0]}
    if said.startswith("first"):
        whole["width"] = [8, 8, 16]
    file = written(tmp_path, pa.table({**whole, column: values}))
    with pytest.raises(TableError) as error:
        read_outcomes(file, ["width", "first"], {"cost": "minimize"})
    assert said in str(error.value)
    assert str(file) in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"PAR1 and then no Parquet")
    for name, said in (
        ("junk", "must be a Parquet file"),
        ("nowhere", "there is no such file"),
        (".", "must be a Parquet file"),
    ):
        with pytest.raises(TableError, match=said):
            read_outcomes(tmp_path / name, ["a"], {"b": "minimize"})
    file = written(tmp_path, rows())
    with pytest.raises(TableError, match=r"it has no widht \(did you mean width\?\); no acc"):
        read_outcomes(file, ["widht"], {"acc": "maximize"})
    with pytest.raises(TableError, match="it has no rows"):
        read_outcomes(
            written(tmp_path, pa.table({"a": pa.array([], pa.int64()), "b": pa.array([], pa.int64())})),
            ["a"],
            {"b": "minimize"},
        )


def test_what_is_drawn_enumerated_and_answered_is_one_space(table: OutcomeTable) -> None:
    space = TableSpace(table)
    everything = {r.hash: r for r in space.enumerate()}
    assert len(everything) == space.size() == 240
    generator = random.Random(0)
    drawn = [space.sample(RandomSuggest(generator)) for _ in range(2000)]
    assert {r.hash for r in drawn} == set(everything)
    for one in drawn[:50]:
        params = space.params_of(one)
        assert space.sample(NearSuggest(_Always(), params)) == one
        assert space.fault(one) is None


class _Always(random.Random):
    """Keeps every answer that :class:`NearSuggest` may keep."""

    def random(self) -> float:
        return 0.0


def test_what_the_grid_lacks_is_infeasible(tmp_path: Path) -> None:
    kept = [r for r in rows() if not (r["first"] == "conv" and r["width"] > 16)]
    table = read_outcomes(written(tmp_path, kept), PARAMETERS, OBJECTIVES)
    space = TableSpace(table)
    missing = recipe(first="conv", second="pool", width=3, dropout=1)
    assert space.fault(missing) == "the table has no row of this configuration"
    assert TableFacts(table, ["latency"]).of(missing) is None
    assert len(list(space.enumerate())) == space.size() == len(kept)
    with pytest.raises(KeyError):
        table.outcome(missing)


def test_facts_are_the_named_objectives_only(table: OutcomeTable) -> None:
    facts = TableFacts(table, ["latency"])
    assert facts.names == {"latency"}
    for one in list(TableSpace(table).enumerate())[::37]:
        assert facts.of(one) == {"latency": table.outcome(one)["latency"]}


def test_a_parameter_with_one_value_is_never_asked_for(tmp_path: Path) -> None:
    table = read_outcomes(
        written(tmp_path, [r for r in rows() if r["width"] == 8 and r["first"] == "pool"]), PARAMETERS, OBJECTIVES
    )
    space = TableSpace(table)
    drawn = space.sample(RandomSuggest(random.Random(0)))
    assert set(space.params_of(drawn)) == {"table.second", "table.dropout"}
    assert (drawn.steps[0].config["first"], drawn.steps[0].config["width"]) == ("pool", 0)
    assert np.isfinite(list(table.outcome(drawn).values())).all()
