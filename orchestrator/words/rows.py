"""Prints a table of rows: for people, or as JSON or CSV for programs."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, TextIO

import pyarrow as pa

from orchestrator.words.units import format_value, unit_of
from workers.metrics import METRICS

FORMATS = ("table", "json", "csv")

_WIDTH = 60
"""Characters of a long text that the table for people shows; labels are shown whole."""


def format_rows(table: pa.Table, fmt: str, out: TextIO | None = None) -> None:
    """Writes ``table`` to ``out`` (None: stdout).

    Args:
        fmt: ``table`` (sizes in kB or MB, times with unit), ``json`` (one array of objects; NaN is null, times are ISO
            8601 in UTC) or ``csv`` (with a header; null is empty, lists are JSON).

    Raises:
        ValueError: for another format.
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


def _rows(table: pa.Table) -> list[list[Any]]:
    # By position, since SQL may name two columns alike.
    columns = [[plain(v) for v in column.to_pylist()] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def _write_json(table: pa.Table, out: TextIO) -> None:
    lines = [json.dumps(dict(zip(table.column_names, row, strict=True)), allow_nan=False) for row in _rows(table)]
    out.write("[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")


def _write_csv(table: pa.Table, out: TextIO) -> None:
    if not table.num_columns:
        return
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.column_names)
    for row in _rows(table):
        writer.writerow([json.dumps(v) if isinstance(v, list | dict) else v for v in row])


def _write_table(table: pa.Table, out: TextIO) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not table.num_columns:
        return
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="")
    for field in table.schema:
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        text = pa.types.is_string(field.type)  # on a narrow terminal, text is folded before numbers are
        shown.add_column(Text(field.name), justify="right" if number else "left", overflow="fold", no_wrap=not text)
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
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= _WIDTH or name == "label" else text[: _WIDTH - 1] + "…"
