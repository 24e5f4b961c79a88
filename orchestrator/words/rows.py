"""Prints a table of rows: for people, or as JSON or CSV for programs."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, TextIO

import pyarrow as pa

from orchestrator.words.printable import printable
from orchestrator.words.units import format_value, unit_of
from workers.metrics import METRICS

FORMATS = ("table", "json", "csv")

TABLE_ROWS = 100_000
"""Most rows of a table for people, whose columns are as wide as their widest row."""

_BATCH = 10_000

_WIDTH = 60
"""Characters of a long text that the table for people shows; labels are shown whole."""


def format_rows(table: pa.Table, fmt: str, out: TextIO | None = None) -> None:
    """Writes ``table`` to ``out`` (None: stdout).

    Args:
        fmt: ``table`` (sizes in kB or MB, times with unit), ``json`` (one array of objects; NaN is null, times are ISO
            8601 in UTC) or ``csv`` (with a header; null is empty, lists are JSON).

    Raises:
        ValueError: for another format, and for more than ``TABLE_ROWS`` rows in a table.
    """
    out = out or sys.stdout
    if fmt == "json":
        _write_json(table, out)
    elif fmt == "csv":
        _write_csv(table, out)
    elif fmt == "table":
        _write_table(table, out)
    else:
        raise ValueError(f"format: must be one of {', '.join(FORMATS)}, got {fmt!r}")


def plain(value: Any) -> Any:
    """Returns a value that JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime):
        utc = value.astimezone(UTC) if value.tzinfo else value
        return utc.isoformat().replace("+00:00", "Z")
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if isinstance(value, date) else _known(value)


def _known(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _rows(table: pa.Table) -> Iterator[list[Any]]:
    for batch in table.to_batches(_BATCH):  # as Python objects rows take many times their memory
        # By position, since SQL may name two columns alike.
        columns = [[plain(v) for v in column.to_pylist()] for column in batch.columns]
        yield from map(list, zip(*columns, strict=True))


def _write_json(table: pa.Table, out: TextIO) -> None:
    before = "[\n"
    for row in _rows(table):
        out.write(before + json.dumps(dict(zip(table.column_names, row, strict=True)), allow_nan=False))
        before = ",\n"
    out.write("\n]\n" if before == ",\n" else "[]\n")


def _write_csv(table: pa.Table, out: TextIO) -> None:
    if not table.num_columns:
        return
    writer = csv.writer(out, lineterminator="\n")
    shown = printable if out.isatty() else str  # a program gets a text as it is
    writer.writerow(map(shown, table.column_names))
    for row in _rows(table):
        cells = [json.dumps(v) if isinstance(v, list | dict) else v for v in row]
        writer.writerow([shown(v) if isinstance(v, str) else v for v in cells])


def _write_table(table: pa.Table, out: TextIO) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not table.num_columns:
        return
    if len(table) > TABLE_ROWS:
        raise ValueError(
            f"format table: must have at most {TABLE_ROWS:,} rows, there are {len(table):,}; take another format"
        )
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="")
    for field in table.schema:
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        text = pa.types.is_string(field.type)  # on a narrow terminal, text is folded before numbers are
        shown.add_column(
            Text(printable(field.name)), justify="right" if number else "left", overflow="fold", no_wrap=not text
        )
    for row in _rows(table):
        shown.add_row(*[Text(human(name, value)) for name, value in zip(table.column_names, row, strict=True)])
    console = Console(file=out, width=None if out.isatty() else 100_000)  # a file or pipe gets whole lines
    with console.capture() as captured:
        console.print(shown)
    out.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


def human(name: str, value: Any) -> str:
    """Returns ``value`` as a person reads it, in the unit that the column's name states."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return format_value(name, value).strip() if unit_of(name) or name in METRICS else f"{value:.6g}"
    text = json.dumps(value) if isinstance(value, list | dict) else str(value)
    if name.endswith("_at"):
        return text[:19].replace("T", " ")
    text = printable(text)
    return text if len(text) <= _WIDTH or name == "label" else text[: _WIDTH - 1] + "…"
