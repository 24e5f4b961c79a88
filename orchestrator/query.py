"""Questions to a ledger: the frontier, and read-only SQL through DuckDB.

SQL sees Arrow tables in an in-memory database and nothing else: file access, extensions, variables of the Python
process and temporary files are off and the configuration is locked, before a word of the question is parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator.columns import empty, equals, floats, group_numbers, integers, to_arrow
from orchestrator.frontier import nondominated
from orchestrator.ledger import Ledger, Snapshot
from orchestrator.ledger_schema import ATTEMPTS, MEASUREMENTS
from orchestrator.ledger_trials import DEFAULT_COLUMNS, NUMERIC, TRIALS, feasible
from orchestrator.rows import format_rows
from workers.protocol import OBJECTIVES

__all__ = ["QueryError", "format_rows", "pareto", "sql"]

TABLES = {"trials": TRIALS, "attempts": ATTEMPTS, "measurements": MEASUREMENTS}
"""Tables of :func:`sql`."""

CANDIDATES = TRIALS.append(pa.field("seeds", pa.int64()))
"""Columns that the condition of :func:`pareto` sees."""

MEMORY_LIMIT = "4GB"
"""Of a query, besides the tables; it never spills to disk."""

_ROW = pa.field("_row", pa.int64())
_LOCKED = {
    "enable_external_access": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",  # or FROM would find variables of this process by name
    "temp_directory": "",
    "memory_limit": MEMORY_LIMIT,
}


class QueryError(ValueError):
    """A question that cannot be answered; the text is one line for the person who asked."""


# --- frontier ---------------------------------------------------------------------------------------------------------


def pareto(
    ledger: Ledger,
    objectives: Sequence[str],
    directions: Sequence[str] | None = None,
    where: str | None = None,
    all_rows: bool = False,
) -> pa.Table:
    """Finds the Pareto frontier of a study.

    Rows of one context only are compared (``ledger.context``, or that of the newest trial). Where recipes have several
    seeds, a recipe is one candidate: its numbers are means over the seeds, its other columns those of the lowest seed,
    and ``seeds`` counts. It is left out unless every seed is ok; constraints and the condition judge the means.

    Args:
        objectives: numeric columns of ``trials``.
        directions: ``minimize`` or ``maximize`` for each; None takes those of ``protocol.OBJECTIVES``.
        where: SQL condition on the columns of ``trials`` and ``seeds`` that candidates must meet.
        all_rows: also candidates that break the study's constraints.

    Returns:
        One row a member, best first by the first objective: names, the objectives, the other columns of
        ``ledger_trials.DEFAULT_COLUMNS``, ``seeds``.

    Raises:
        QueryError: for an unknown column, a missing direction, or a condition that is none.
    """
    directions = _directions(objectives, directions)
    used = set() if where is None else _condition_columns(where)
    wanted = {*objectives, *used, "top1_pct_drop", *(c.metric for c in ledger.constraints)}

    def read(snapshot: Snapshot) -> pa.Table:
        candidates = _candidates(snapshot, ledger.context, wanted)
        ok = equals(candidates["status"], "ok")
        keeps = feasible(ok, lambda name: floats(candidates[name]), ledger.constraints)
        candidates = candidates.append_column("feasible", to_arrow(keeps))
        rows = np.flatnonzero(ok if all_rows else keeps)
        if where is not None:
            rows = rows[_matches(_some(candidates.select([*used, "_row"]), rows), where)]
        values = np.stack([floats(candidates[name])[rows] for name in objectives], axis=1)
        return _described(snapshot, _some(candidates, rows[nondominated(values, directions)]), objectives)

    ranks = {"minimize": "ascending", "maximize": "descending"}
    return ledger.consistent(read).sort_by([(o, ranks[d]) for o, d in zip(objectives, directions, strict=True)])


def _directions(objectives: Sequence[str], directions: Sequence[str] | None) -> list[str]:
    if not objectives:
        raise QueryError(f"objectives: name at least one of {', '.join(NUMERIC)}")
    for name in objectives:
        if name not in NUMERIC:
            raise QueryError(
                f"objectives: no numeric column {name!r}{_nearest(name, NUMERIC)}; columns: {', '.join(NUMERIC)}"
            )
    if directions is None:
        lacking = [name for name in objectives if name not in OBJECTIVES]
        if lacking:
            raise QueryError(
                f"objectives: say minimize or maximize for {', '.join(lacking)}; only objectives have a default"
            )
        return [OBJECTIVES[name] for name in objectives]
    if len(directions) != len(objectives) or any(d not in ("minimize", "maximize") for d in directions):
        raise QueryError(
            f"directions: must be minimize or maximize for each of {len(objectives)} objectives, got {directions}"
        )
    return list(directions)


def _candidates(snapshot: Snapshot, context: str | None, wanted: set[str]) -> pa.Table:
    """Returns the trials of one context, one row a recipe, with ``wanted`` columns, ``seeds`` and ``_row``."""
    needed = {"recipe_hash", "seed", "started_at", "status", "context", *wanted} - {"feasible", "seeds"}
    trials = snapshot.trials(sorted(needed))
    if group_numbers(trials["recipe_hash"])[1] < len(trials):  # several seeds: all that is shown is a mean
        trials = snapshot.trials(sorted(needed.union(set(NUMERIC).intersection(DEFAULT_COLUMNS))))
    numbered = trials.append_column(_ROW, to_arrow(np.arange(len(trials))))
    return _mean_over_seeds(_of_context(numbered, context))


def _some(table: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Table:
    """Returns the rows with the given numbers, ascending; unlike ``take`` it copies nothing else."""
    chosen = np.zeros(len(table), np.bool_)
    chosen[rows] = True
    return table.filter(to_arrow(chosen))


def _of_context(trials: pa.Table, context: str | None) -> pa.Table:
    if context is None and len(trials):
        newest = int(np.argmax(integers(trials["started_at"])))
        context = trials["context"][newest].as_py()
    mine = equals(trials["context"], context or "")
    return trials if mine.all() else trials.filter(to_arrow(mine))


def _mean_over_seeds(trials: pa.Table) -> pa.Table:
    recipe, count = group_numbers(trials["recipe_hash"])
    if count == len(trials):
        return trials.append_column("seeds", to_arrow(np.ones(count, np.int64)))
    seed = integers(trials["seed"])
    order = np.lexsort((-integers(trials["started_at"]), seed, recipe))
    newest = np.sort(order[np.r_[True, (np.diff(recipe[order]) != 0) | (np.diff(seed[order]) != 0)]])
    trials, recipe = trials.take(to_arrow(newest)), recipe[newest]
    ok = equals(trials["status"], "ok")
    order = np.lexsort((integers(trials["seed"]), ok, recipe))  # a seed that failed stands for its recipe
    first = order[np.r_[True, np.diff(recipe[order]) != 0]]
    seeds = np.bincount(recipe)
    found = trials.take(to_arrow(first)).append_column("seeds", to_arrow(seeds))
    for name in set(NUMERIC) & set(trials.column_names):
        mean = np.bincount(recipe, weights=floats(trials[name])) / seeds
        found = found.set_column(found.schema.get_field_index(name), TRIALS.field(name), to_arrow(mean))
    return found


def _described(snapshot: Snapshot, members: pa.Table, objectives: Sequence[str]) -> pa.Table:
    """Returns ``members`` with the columns that are read for them only."""
    names = list(dict.fromkeys([*DEFAULT_COLUMNS[:3], *objectives, *DEFAULT_COLUMNS]))
    members = members.sort_by("_row")
    read = snapshot.trials([n for n in names if n not in members.column_names], integers(members["_row"]))
    columns = {name: read[name] if name in read.column_names else members[name] for name in [*names, "seeds"]}
    return pa.table(columns)


def _condition_columns(where: str) -> set[str]:
    """Checks that ``where`` is one Boolean expression; returns the columns that it may use."""
    nothing = {"trials": empty(CANDIDATES)}
    try:
        duckdb.SQLExpression(where)  # parses one expression and nothing around it
        with _connect(nothing) as connection:
            kind = connection.execute(f"DESCRIBE SELECT ({where}\n) FROM trials").fetchall()[0][1]
            used = _used_columns(connection, f"SELECT seeds FROM trials WHERE ({where}\n)") & set(CANDIDATES.names)
    except duckdb.Error as error:
        raise _explained("where", error, CANDIDATES.names) from None
    if kind != "BOOLEAN":
        raise QueryError(f"where: must be a condition such as size_bytes < 4e6, but its type is {kind}")
    return used


def _matches(candidates: pa.Table, where: str) -> npt.NDArray[np.bool_]:
    table = _filled(candidates, CANDIDATES.append(_ROW))
    try:
        with _connect({"trials": table}) as connection:
            found: pa.Table = connection.sql(f"SELECT _row FROM trials WHERE ({where}\n)").to_arrow_table()
    except duckdb.Error as error:
        raise _explained("where", error, CANDIDATES.names) from None
    return np.isin(integers(candidates["_row"]), integers(found["_row"]))


# --- SQL --------------------------------------------------------------------------------------------------------------


def sql(ledger: Ledger, statement: str) -> pa.Table:
    """Answers one SELECT (or WITH, FROM, VALUES, DESCRIBE, SUMMARIZE) over ``trials``, ``attempts`` and
    ``measurements``.

    Raises:
        QueryError: for anything else, and for whatever DuckDB cannot answer.
    """
    names = sorted({name for schema in TABLES.values() for name in schema.names})
    try:
        query = _single_select(statement)
        with _connect({name: empty(schema) for name, schema in TABLES.items()}) as connection:
            used = _used_columns(connection, query)

        def read(snapshot: Snapshot) -> dict[str, pa.Table]:
            readers = {"trials": snapshot.trials, "attempts": snapshot.attempts, "measurements": snapshot.measurements}
            return {
                name: _filled(readers[name]([c for c in schema.names if c in used] or ["trial_id"]), schema)
                for name, schema in TABLES.items()
            }

        with _connect(ledger.consistent(read)) as connection:
            return connection.sql(query).to_arrow_table()
    except duckdb.Error as error:
        raise _explained("query", error, names) from None


def _single_select(statement: str) -> str:
    statements = duckdb.extract_statements(statement)
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        kinds = ", ".join(s.type.name for s in statements) or "nothing"
        raise QueryError(f"query: must be one SELECT statement, which reads and writes no file; got {kinds}")
    return str(statements[0].query)


def _connect(tables: Mapping[str, pa.Table]) -> duckdb.DuckDBPyConnection:
    """Opens an in-memory database that holds ``tables`` and can reach nothing else; its configuration is locked."""
    connection = duckdb.connect(":memory:", config=dict(_LOCKED))
    for name, table in tables.items():
        connection.register(name, table)
    connection.execute("SET lock_configuration = true")
    return connection


def _used_columns(connection: duckdb.DuckDBPyConnection, query: str) -> set[str]:
    """Returns the columns that a plan of ``query`` mentions: those that it reads and perhaps more."""
    plans = connection.execute(f"EXPLAIN (FORMAT json) {query}").fetchall()
    return set(re.findall(r"\w+", json.dumps(plans)))


def _filled(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Returns ``table`` with the columns of ``schema``; those that it lacks, which no plan reads, are null and cost
    nothing."""
    rows, size = len(table), 65_536

    def column(field: pa.Field) -> Any:
        if field.name in table.column_names:
            return table[field.name]
        chunk = pa.nulls(size, field.type)
        return pa.chunked_array([chunk] * (rows // size) + [chunk.slice(0, rows % size)], field.type)

    return pa.Table.from_arrays([column(field) for field in schema], schema=schema)


def _explained(where: str, error: Exception, columns: Sequence[str]) -> QueryError:
    """Returns DuckDB's error as one line, with the nearest column where one is unknown."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    unknown = re.search(r'Referenced column "(\w+)"', text)
    if unknown:
        text = f"no column {unknown[1]!r}{_nearest(unknown[1], columns)}; columns: {', '.join(columns)}"
    elif "Table with name" in text:
        text = f"{text.split('!')[0]}; tables: {', '.join(TABLES)}"
    return QueryError(f"{where}: {text}")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name.lower(), known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
