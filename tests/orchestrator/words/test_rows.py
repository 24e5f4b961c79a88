"""Rows of a ledger as they are printed: JSON, CSV, Parquet and a table in units."""

from __future__ import annotations

import csv
import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.cli.io import Format, write_table
from orchestrator.frontier.query import pareto, sql
from orchestrator.words.rows import FORMATS, format_rows, human
from tests.orchestrator.frontier import test_query

BOTH = test_query.BOTH
ledger = test_query.ledger


def printed(table: pa.Table, fmt: str) -> str:
    out = io.StringIO()
    format_rows(table, fmt, out)
    return out.getvalue()


def test_json_is_one_array_of_objects(ledger):
    rows = json.loads(printed(pareto(ledger, BOTH), "json"))
    assert (rows[1]["label"], rows[1]["size_bytes"], rows[1]["latency_ms_p50"]) == ("tome(r=1)", 999.0, None)
    odd = pa.table({"a": pa.array([float("nan"), float("inf")]), "l": [[1.0, float("nan")], []]})
    assert json.loads(printed(odd, "json")) == [{"a": None, "l": [1.0, None]}, {"a": None, "l": []}]
    assert json.loads(printed(odd.slice(0, 0), "json")) == []
    times = sql(
        ledger,
        "select started_at, 1.50::decimal(9, 2) as d, 2::hugeint as h, date '2020-01-02' as day from trials limit 1",
    )
    assert re.fullmatch(r"1970-01-01T00:1\d:\d\dZ", json.loads(printed(times, "json"))[0]["started_at"])
    assert {k: v for k, v in json.loads(printed(times, "json"))[0].items() if k != "started_at"} == {
        "d": 1.5,
        "h": 2,
        "day": "2020-01-02",
    }


def test_csv_reads_back(ledger):
    rows = list(csv.DictReader(io.StringIO(printed(ledger.trials().sort_by("number"), "csv"))))
    assert len(rows) == 10
    assert json.loads(rows[0]["recipe"]) == [{"config": {"r": 1}, "technique": "tome"}]
    assert rows[0]["macs"] == ""
    assert printed(pa.table({"l": [[1, 2]]}), "csv") == 'l\n"[1, 2]"\n'


def test_parquet_goes_out_as_bytes(ledger, capsysbinary):
    write_table(ledger.trials(), Format.parquet)
    assert pq.read_table(io.BytesIO(capsysbinary.readouterr().out)).equals(ledger.trials())


def test_table_speaks_units(ledger):
    text = printed(pareto(ledger, BOTH), "table")
    assert "98.00 %" in text
    assert "tome(r=5)" in text
    assert len({len(line) for line in text.splitlines() if "tome" in line}) == 1


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("size_bytes", 1_234_567.0, "1.235 MB"),
        ("size_bytes", 950.0, "950 B"),
        ("latency_ms_p50", 2.3456, "2.346 ms"),
        ("top1_pct", 97.126, "97.13 %"),
        ("top1_pct_drop", 0.5, "0.50 points"),
        ("macs", 1.5e9, "1.5 G"),
        ("value", 0.25, "0.25"),
        ("number", 7, "7"),
        ("feasible", True, "yes"),
        ("failure", None, "-"),
        ("recipe", "x" * 100, "x" * 59 + "…"),
    ],
)
def test_units(name, value, text):
    assert human(name, value) == text


def test_unknown_format(ledger):
    with pytest.raises(ValueError, match="table, json, csv"):
        format_rows(ledger.trials(), "xml", io.StringIO())
    assert FORMATS[0] == "table"
