"""Frontiers and SQL over a ledger: right answers, one-line errors, and no way out of the database."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.frontier import query
from orchestrator.frontier.query import QueryError, pareto, sql
from orchestrator.ledger import Ledger
from orchestrator.ledger.trials import DEFAULT_COLUMNS, TRIALS
from tests.ledger_rows import STUDY, make_row
from tests.orchestrator.frontier.test_dominance import reference_frontier
from workers.node.storage import LocalStorage, open_storage

BOTH = ["top1_pct", "size_bytes"]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """Recipes 0 to 9: top-1 98 - n, size 1000 - n, so all are on the frontier; 7 failed; half of it compacted."""
    made = Ledger(LocalStorage(tmp_path_factory.mktemp("storage")), STUDY, ["top1_pct_drop <= 5"])
    for n in range(10):
        made.write_attempt(make_row(n, status="timeout" if n == 7 else "ok"))
        if n == 5:
            made.compact()
    return made


def numbers(table: pa.Table) -> list[int | None]:
    return table["number"].to_pylist()


# --- frontier ---------------------------------------------------------------------------------------------------------


def test_members_are_feasible_unless_asked(ledger):
    assert numbers(pareto(ledger, BOTH)) == [None, 1, 2, 3, 4, 5]
    assert numbers(pareto(ledger, BOTH, all_rows=True)) == [None, 1, 2, 3, 4, 5, 6, 8, 9]
    found = pareto(ledger, ["size_bytes"], ["minimize"])
    assert numbers(found) == [5]
    standing = {"probability", "certain", "members", "slower_than_baseline", "simulated"}
    assert set(found.column_names) == {*DEFAULT_COLUMNS, "seeds", *standing}


def test_directions_can_be_turned(ledger):
    assert numbers(pareto(ledger, BOTH, ["minimize", "maximize"])) == [5, 4, 3, 2, 1, None]
    assert numbers(pareto(ledger, ["top1_pct_drop", "size_bytes"], ["minimize", "minimize"])) == [None, 1, 2, 3, 4, 5]
    with pytest.raises(QueryError, match="minimize or maximize for top1_pct_drop"):
        pareto(ledger, ["top1_pct_drop"])


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("size_bytes < 998 and top1_pct_drop <= 4", [3, 4]),
        ("SIZE_BYTES < 998 AND top1_pct_drop <= 4 -- a remark", [3, 4]),
        ("label like '%r=2%' or number is null", [None, 2]),
        ("recipe->>'$[0].technique' = 'tome' and number < 3", [1, 2]),
        ("size_bytes = (select max(size_bytes) from trials)", [None]),
        ("is_baseline or 1 = 2", [None]),
        ("1 = 1 or latency_ms_p50 < 3", [None, 1, 2, 3, 4, 5]),
        ("latency_ms_p50 < 3", []),
        ("started_at >= '1970-01-01 00:16:44+00'", [4, 5]),
        ("feasible and seeds = 1 and status = 'ok'", [None, 1, 2, 3, 4, 5]),
        ("size_bytes in (996, 995)", [4, 5]),
    ],
)
def test_conditions(ledger, where, expected):
    assert numbers(pareto(ledger, BOTH, where=where)) == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("sizebytes < 4", r"no column 'sizebytes' \(did you mean size_bytes\?\); columns: trial_id, "),
        ("size_bytes", "must be a condition.*DOUBLE"),
        ("size_bytes <", "syntax error"),
        ("", "without selection list"),
        ("true; drop table trials", "more than one statement"),
        ("true) union select 1 from trials where (true", "syntax error"),
        ("true) or (true", "syntax error"),
        ("true, true", "single expression"),
        ("max(size_bytes) > 3", "aggregate"),
        ("exists(select * from read_text('/etc/passwd'))", "disabled"),
        ("length(getenv('HOME')) > 0", "getenv"),
    ],
)
def test_what_is_no_condition_is_refused_in_one_line(ledger, where, message):
    with pytest.raises(QueryError, match=message) as caught:
        pareto(ledger, BOTH, where=where)
    assert "\n" not in str(caught.value)


def test_objectives_are_checked(ledger):
    with pytest.raises(QueryError, match="did you mean top1_pct"):
        pareto(ledger, ["top1pct"])
    with pytest.raises(QueryError, match="no numeric column 'label'"):
        pareto(ledger, ["label"], ["minimize"])
    with pytest.raises(QueryError, match="at least one"):
        pareto(ledger, [])
    with pytest.raises(QueryError, match="for each of 2"):
        pareto(ledger, BOTH, ["minimize"])


def test_an_empty_ledger_has_an_empty_frontier(tmp_path):
    assert pareto(Ledger(LocalStorage(tmp_path), STUDY), BOTH).num_rows == 0
    assert sql(Ledger(LocalStorage(tmp_path), STUDY), "select count(*) as n from trials").to_pylist() == [{"n": 0}]


def test_several_seeds_count_as_their_mean(tmp_path):
    ledger = Ledger(LocalStorage(tmp_path), STUDY, ["size_bytes < 500"])
    for seed, top1, size in [(2, 90.0, 100.0), (1, 94.0, 200.0)]:
        ledger.write_attempt(make_row(1, seed=seed, metrics={"top1_pct": top1, "size_bytes": size, "macs": size}))
    ledger.write_attempt(
        make_row(2, metrics={"top1_pct": 91.0, "size_bytes": 50.0})
    )  # dominates one seed, not the mean
    ledger.write_attempt(make_row(3, metrics={"top1_pct": 99.0, "size_bytes": 10.0}))
    ledger.write_attempt(make_row(3, seed=1, status="error"))
    for seed, size in [(0, 400.0), (1, 700.0)]:
        ledger.write_attempt(make_row(4, seed=seed, metrics={"top1_pct": 98.0, "size_bytes": size}))
    rows = pareto(ledger, BOTH).to_pylist()
    assert [(r["number"], r["seed"], r["seeds"], r["top1_pct"], r["size_bytes"]) for r in rows] == [
        (1, 1, 2, 92.0, 150.0),
        (2, 0, 1, 91.0, 50.0),
    ]
    assert (rows[0]["macs"], rows[1]["macs"]) == (150.0, None)
    assert numbers(pareto(ledger, BOTH, all_rows=True)) == [4, 1, 2]
    assert numbers(pareto(ledger, BOTH, where="size_bytes > 100")) == [1]


def test_a_newer_run_of_a_recipe_and_seed_replaces_the_older(tmp_path):
    ledger = Ledger(LocalStorage(tmp_path), STUDY)
    for name, time, size in [("new", 9.0, 500.0), ("old", 3.0, 100.0)]:  # as after a technique's version changed
        row = make_row(1, attempt=name, started_at=time, metrics={"top1_pct": 90.0, "size_bytes": size})
        ledger.write_attempt({**row, "trial_id": f"{name}trial"})
    rows = pareto(ledger, BOTH).to_pylist()
    assert [(r["trial_id"], r["seeds"], r["size_bytes"]) for r in rows] == [("newtrial", 1, 500.0)]


def test_contexts_do_not_mix(tmp_path):
    storage = LocalStorage(tmp_path)
    ledger = Ledger(storage, STUDY)
    old, new = make_row(1, context="old", started_at=1.0), make_row(2, context="new", started_at=2.0)
    ledger.write_attempt(old)
    ledger.write_attempt(new)
    assert numbers(pareto(ledger, BOTH)) == [2]
    assert numbers(pareto(Ledger(storage, STUDY, context=old["context"]), BOTH)) == [1]


def test_against_the_slow_reference(tmp_path):
    ledger, rng = Ledger(LocalStorage(tmp_path), STUDY), np.random.default_rng(0)
    values = np.round(rng.random((60, 3)), 1)
    names = ["top1_pct", "size_bytes", "latency_ms_p50"]
    for n, row in enumerate(values):
        ledger.write_attempt(make_row(n + 1, metrics=dict(zip(names, row.tolist(), strict=True))))
    ledger.compact()
    expected = np.flatnonzero(reference_frontier(values, ["maximize", "minimize", "minimize"])) + 1
    assert sorted(numbers(pareto(ledger, names))) == expected.tolist()


def test_the_frontier_can_be_kept(ledger):
    members = pareto(ledger, BOTH)
    ledger.write_frontier(members, 0.1, 9, objectives=BOTH, reference=[0.0, 1.1])
    assert ledger.frontier()["trial_id"].to_pylist() == members["trial_id"].to_pylist()


# --- SQL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("select count(*) as n from trials", [{"n": 10}]),
        (
            "select status, count(*) as n from attempts group by all order by n",
            [{"status": "timeout", "n": 1}, {"status": "ok", "n": 9}],
        ),
        ("with best as (select number from trials where feasible) select max(number) as m from best;", [{"m": 5}]),
        (
            "select t.number, m.unit from trials t join measurements m using (trial_id) where t.number = 2",
            [{"number": 2, "unit": "ms"}],
        ),
        ("from (select number from trials where failure is not null)", [{"number": 7}]),
        ("select recipe->'$[0].config.r' as r from trials where number = 3", [{"r": "3"}]),
        ("select number from trials order by started_at desc limit 1", [{"number": 9}]),
        ("select strftime(started_at, '%H:%M:%S') as t from trials where number = 1", [{"t": "00:16:41"}]),
    ],
)
def test_sql_answers(ledger, statement, expected):
    assert sql(ledger, statement).to_pylist() == expected


def test_star_has_every_column_and_every_value(ledger):
    assert sql(ledger, "select * from trials").column_names == TRIALS.names
    row = sql(ledger, "select t from trials t where number = 2").to_pylist()[0]["t"]
    assert row["label"] == "tome(r=2)"
    assert row == sql(ledger, "select * from trials where number = 2").to_pylist()[0]
    assert "recipe" not in sql(ledger, "select * exclude (recipe) from trials").column_names
    assert sql(ledger, "select columns('size.*') from trials where number = 2").to_pylist()[0]["size_bytes"] == 998.0
    assert {r["column_name"] for r in sql(ledger, "describe trials").to_pylist()} == set(TRIALS.names)
    assert next(r for r in sql(ledger, "summarize trials").to_pylist() if r["column_name"] == "number")["max"] == "9"


ESCAPES = [
    "copy trials to '{folder}/out.csv'",
    "copy (select 1) to '{folder}/out.parquet' (format parquet)",
    "copy trials from '{folder}/secret.txt'",
    "select * from read_text('{folder}/secret.txt')",
    "select * from read_blob('{folder}/secret.txt')",
    "select * from read_csv('{folder}/secret.txt')",
    "select * from read_csv_auto('{folder}/secret.txt')",
    "select * from read_json('{folder}/secret.txt')",
    "select * from read_parquet('{folder}/*.parquet')",
    "select * from parquet_metadata('{folder}/x.parquet')",
    "select * from parquet_scan('{folder}/x.parquet')",
    "select * from sniff_csv('{folder}/secret.txt')",
    "select * from '{folder}/secret.txt'",
    'select * from "{folder}/secret.txt"',
    "select * from '{folder}/x.parquet'",
    "select * from glob('{folder}/*')",
    "select * from read_text('file://{folder}/secret.txt')",
    "select * from read_text('https://example.com')",
    "select * from query('select * from read_text(''{folder}/secret.txt'')')",
    "select * from query('copy (select 1) to ''{folder}/out.csv''')",
    "select * from query_table('{folder}/secret.txt')",
    "select * from json_execute_serialized_sql(json_serialize_sql('select * from read_text(''{folder}/secret.txt'')'))",
    "with a as (select * from read_text('{folder}/secret.txt')) select * from a",
    "with a as (insert into trials values (1) returning *) select * from a",
    "with a as materialized (select content from read_text('{folder}/secret.txt')) from a",
    "select (select content from read_text('{folder}/secret.txt'))",
    "attach '{folder}/other.db'",
    "attach '{folder}/other.db' as other (type sqlite)",
    "create table x as select 1",
    "create temp macro f() as 1",
    "create secret (type s3, key_id 'a', secret 'b')",
    "install httpfs",
    "load httpfs",
    "load '{folder}/evil.duckdb_extension'",
    "set enable_external_access = true",
    "set lock_configuration = false",
    "set temp_directory = '{folder}'",
    "reset enable_external_access",
    "set variable a = 1",
    "pragma enable_profiling",
    "pragma database_list",
    "export database '{folder}/out'",
    "import database '{folder}/out'",
    "call pragma_version()",
    "call enable_logging(storage = 'file', storage_path = '{folder}')",
    "select * from enable_logging(storage = 'file', storage_path = '{folder}')",
    "select * from duckdb_secrets()",
    "select getenv('HOME')",
    "select getvariable('HOME') from nowhere",
    "select * from ledger",
    "select * from table_of_this_test",
    "select 1; select 2",
    "select 1; copy (select 1) to '{folder}/out.csv'",
    "explain analyze select 1",
    "prepare p as select 1",
    "execute p",
    "begin",
    "checkpoint",
    "vacuum",
    "use memory",
    "drop view trials",
    "delete from trials",
    "update trials set seed = 1",
    "alter table trials add column a int",
    "",
    "-- nothing",
    "nonsense",
    "select * from range(1000000000000) r order by random()",
]


@pytest.mark.parametrize("statement", ESCAPES)
def test_sql_can_read_and_write_nothing_else(ledger, tmp_path, statement, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table_of_this_test = pa.table({"secret": ["found"]})
    (tmp_path / "secret.txt").write_text("a,b\n1,found")
    pq.write_table(table_of_this_test, tmp_path / "x.parquet")
    folders = (tmp_path, ledger.storage.root)
    before = {p: p.stat().st_mtime_ns for folder in folders for p in folder.rglob("*")}
    with pytest.raises(QueryError) as caught:
        sql(ledger, statement.format(folder=tmp_path), query.Limits(memory_bytes=200_000_000))
    assert "\n" not in str(caught.value)
    assert "found" not in str(caught.value).replace("not found", "")
    assert {p: p.stat().st_mtime_ns for folder in folders for p in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("statement", "seconds", "said"),
    [
        ("select count(*) from range(100000000000) a, range(1000) b", 0.5, "must be answered within 0.5 s"),
        ("with recursive r as (select 1 as n union all select n + 1 from r) select max(n) from r", 0.5, "within 0.5 s"),
        (
            "select a.range + b.range from range(100000000) a, range(1000) b",
            60,
            "must take at most 10 MB, has more after",
        ),
        ("select list(range) from range(1000000000)", 60, "Out of Memory"),
    ],
)
def test_a_question_has_a_time_and_a_memory(ledger, statement, seconds, said):
    with pytest.raises(QueryError, match=said):
        sql(ledger, statement, query.Limits(seconds, memory_bytes=10_000_000))


def test_a_plan_works_nothing_out(ledger):
    """Constants of a plan were worked out without a limit, and no interrupt ended it."""
    assert sql(ledger, "describe select repeat('x', 3000000000) as a").to_pylist()[0]["column_type"] == "VARCHAR"
    with pytest.raises(QueryError, match="where"):
        pareto(ledger, BOTH, where="length(repeat('x', 3000000000000)) > 3")


def test_harmless_introspection_shows_no_file(ledger):
    assert {r["name"] for r in sql(ledger, "show tables").to_pylist()} == {"trials", "attempts", "measurements"}
    settings = {r["name"]: r["value"] for r in sql(ledger, "select name, value from duckdb_settings()").to_pylist()}
    assert settings["enable_external_access"] == "false"
    assert settings["lock_configuration"] == "true"
    assert settings["python_enable_replacements"] == "false"
    assert settings["temp_directory"] in ("", None)


def test_an_unknown_name_gets_the_nearest(ledger):
    with pytest.raises(QueryError, match=r"no column 'size_byte' \(did you mean size_bytes"):
        sql(ledger, "select size_byte from trials")
    with pytest.raises(QueryError, match="tables: trials, attempts, measurements"):
        sql(ledger, "select * from trails")
    with pytest.raises(QueryError, match=r"must be one SELECT.*COPY"):
        sql(ledger, "copy trials to 'x'")


def test_it_works_on_object_storage():
    ledger = Ledger(open_storage("memory://query-test"), STUDY)
    ledger.write_attempt(make_row(1))
    ledger.compact()
    assert numbers(pareto(ledger, BOTH)) == [1]
    assert sql(ledger, "select number from trials").to_pylist() == [{"number": 1}]
