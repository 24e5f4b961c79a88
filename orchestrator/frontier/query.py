"""Questions to a ledger: the frontier and how sure it is, what a budget allows, and read-only SQL through DuckDB.

SQL sees Arrow tables in an in-memory database and nothing else: file access, extensions, variables of the Python
process and temporary files are off and the configuration is locked, before a word of the question is parsed. A question has
a time and a memory (:class:`Limits`), its answer included.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from threading import Timer
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator.frontier import choosing
from orchestrator.frontier.candidates import ROW
from orchestrator.frontier.certainty import Condition, Question, judge, to_measure_again
from orchestrator.ledger import Ledger, Snapshot
from orchestrator.ledger.columns import empty, floats, integers
from orchestrator.ledger.schema import ATTEMPTS, MEASUREMENTS
from orchestrator.ledger.trials import NUMERIC, TRIALS
from orchestrator.study.constraints import Constraint
from orchestrator.words.rows import format_rows
from orchestrator.words.units import format_value
from workers.metrics import OBJECTIVES

__all__ = ["Limits", "QueryError", "candidates", "format_rows", "pareto", "sql", "uncertain", "within_budget"]

TABLES = {"trials": TRIALS, "attempts": ATTEMPTS, "measurements": MEASUREMENTS}
"""Tables of :func:`sql`."""

CANDIDATES = TRIALS.append(pa.field("seeds", pa.int64()))
"""Columns that the condition of :func:`pareto` sees."""


@dataclass(frozen=True)
class Limits:
    """What a question may take.

    Attributes:
        seconds: from its first word to its last row. DuckDB looks at the time between two steps of its work.
        memory_bytes: besides the tables, of DuckDB, which never spills to disk, and then of the answer.
    """

    seconds: float = 60.0
    memory_bytes: int = min(4 * 10**9, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


LIMITS = Limits()


_BATCH = 100_000
"""Rows after which the size of an answer is looked at."""

_LOCKED = {
    "enable_external_access": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",  # or FROM would find variables of this process by name
    "temp_directory": "",
    # These two work out constant expressions while a plan is made, which neither time nor memory stops: repeat('x', 3e9).
    "disabled_optimizers": "expression_rewriter,statistics_propagation",
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
    """Finds the Pareto frontier of a study, and how sure it is.

    Rows of one context only are compared (``ledger.context``, or that of the newest trial). Where recipes have several
    seeds, a recipe is one candidate: its numbers are means over the seeds, its other columns those of the lowest seed,
    and ``seeds`` counts. It is left out unless every seed is ok; constraints and the condition judge the means that the rows
    state. Candidates that noise does not tell apart are one group (docs/choosing.md).

    Args:
        objectives: numeric columns of ``trials``.
        directions: ``minimize`` or ``maximize`` for each; None takes those of ``metrics.OBJECTIVES``.
        where: SQL condition on the columns of ``trials`` and ``seeds`` that candidates must meet.
        all_rows: also candidates that break the study's constraints.

    Returns:
        One row a group that is non-dominated with a probability of 0.05 or more: certain ones (0.95 or more) first, then the
        best by the first objective. Of its representative, the simplest member: names, the objectives (repeated measurements
        pooled) with ``<objective>_low`` and ``_high`` where they are measured (null: exact) and ``_ratio`` of speeds, the
        other columns of ``trials.DEFAULT_COLUMNS``, ``seeds``; then ``probability``, ``certain``, ``members`` (trial
        ids, representative first), ``slower_than_baseline`` and ``simulated`` (told only where a speed is asked for).

    Raises:
        QueryError: for an unknown column, a missing direction, or a condition that is none.
    """
    question = _question(objectives, directions, where, all_rows)

    def read(snapshot: Snapshot) -> pa.Table:
        found = judge(snapshot, ledger.context, ledger.constraints, question)
        return found.described(snapshot, found.frontier)

    return ledger.consistent(read)


def candidates(
    ledger: Ledger,
    objectives: Sequence[str],
    where: str | None = None,
    all_rows: bool = False,
    directions: Sequence[str] | None = None,
) -> pa.Table:
    """Returns every candidate with the columns of :func:`pareto`, in its order: one row a recipe, not a group.

    ``probability`` is that of the candidate's group, and 0 with ``members`` naming it alone where it belongs to none, since
    others are better in every draw.

    Raises:
        QueryError: as :func:`pareto` does.
    """
    question = _question(objectives, directions, where, all_rows)

    def read(snapshot: Snapshot) -> pa.Table:
        found = judge(snapshot, ledger.context, ledger.constraints, question)
        return found.described(snapshot, np.arange(len(found.candidates)))

    return ledger.consistent(read)


def uncertain(ledger: Ledger, objectives: Sequence[str], directions: Sequence[str] | None = None) -> list[str]:
    """Returns the trials to measure again so that the frontier gets more certain, the most useful first.

    They belong to groups whose place on the frontier rests on the noise of speeds, and to the groups that decide about it;
    see :func:`certain.to_measure_again`. Empty where nothing of that kind is undecided.

    Raises:
        QueryError: for an unknown column or a missing direction.
    """
    question = _question(objectives, directions, None, False)

    def read(snapshot: Snapshot) -> list[str]:
        return to_measure_again(judge(snapshot, ledger.context, ledger.constraints, question), snapshot)

    return ledger.consistent(read)


def within_budget(
    ledger: Ledger,
    objectives: Sequence[str],
    budget: Sequence[Constraint],
    where: str | None = None,
    all_rows: bool = False,
) -> tuple[pa.Table, list[str]]:
    """Finds the best candidate within a budget by the first objective, and the nearest better one beyond it.

    Args:
        budget: constraints on values as they are shown; see :func:`choosing.within_budget`.

    Returns:
        Up to two rows with the columns of :func:`pareto` and those that the budget names, and for each ``best within`` or
        ``nearest beyond``.

    Raises:
        QueryError: as :func:`pareto` does.
    """
    metrics = [c.metric for c in budget]
    question = _question(objectives, None, where, all_rows, metrics)

    def read(snapshot: Snapshot) -> tuple[pa.Table, list[str]]:
        found = judge(snapshot, ledger.context, ledger.constraints, question)
        costs = np.stack([axis.centre for axis in found.axes], axis=1)
        shown = dict(zip(objectives, (axis.value for axis in found.axes), strict=True))
        values = {name: shown.get(name, floats(found.candidates.table[name])) for name in metrics}
        chosen = choosing.within_budget(costs, values, budget)
        tables = [found.described(snapshot, np.array([row])) for row in chosen.values()]
        return pa.concat_tables(tables or [found.described(snapshot, np.empty(0, np.int64))]), list(chosen)

    return ledger.consistent(read)


def _question(
    objectives: Sequence[str],
    directions: Sequence[str] | None,
    where: str | None,
    all_rows: bool,
    columns: Sequence[str] = (),
) -> Question:
    condition = None if where is None else Condition(_condition_columns(where), partial(_matches, where=where))
    return Question(list(objectives), _directions(objectives, directions), condition, all_rows, columns)


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


def _condition_columns(where: str) -> set[str]:
    """Checks that ``where`` is one Boolean expression; returns the columns that it may use."""
    nothing = {"trials": empty(CANDIDATES)}
    try:
        duckdb.SQLExpression(where)  # parses one expression and nothing around it
        with _connect(nothing, "where") as connection:
            kind = connection.execute(f"DESCRIBE SELECT ({where}\n) FROM trials").fetchall()[0][1]
            used = _used_columns(connection, f"SELECT seeds FROM trials WHERE ({where}\n)") & set(CANDIDATES.names)
    except duckdb.Error as error:
        raise _explained("where", error, CANDIDATES.names) from None
    if kind != "BOOLEAN":
        raise QueryError(f"where: must be a condition such as size_bytes < 4e6, but its type is {kind}")
    return used


def _matches(candidates: pa.Table, where: str) -> npt.NDArray[np.bool_]:
    table = _filled(candidates, CANDIDATES.append(ROW))
    try:
        with _connect({"trials": table}, "where") as connection:
            found: pa.Table = connection.sql(f"SELECT _row FROM trials WHERE ({where}\n)").to_arrow_table()
    except duckdb.Error as error:
        raise _explained("where", error, CANDIDATES.names) from None
    return np.isin(integers(candidates["_row"]), integers(found["_row"]))


# --- SQL --------------------------------------------------------------------------------------------------------------


def sql(ledger: Ledger, statement: str, limits: Limits = LIMITS) -> pa.Table:
    """Answers one SELECT (or WITH, FROM, VALUES, DESCRIBE, SUMMARIZE) over ``trials``, ``attempts`` and
    ``measurements``.

    Raises:
        QueryError: for anything else, for whatever DuckDB cannot answer, and for what takes more than ``limits``.
    """
    names = sorted({name for schema in TABLES.values() for name in schema.names})
    try:
        query = _single_select(statement)
        with _connect({name: empty(schema) for name, schema in TABLES.items()}, "query", limits) as connection:
            used = _used_columns(connection, query)

        def read(snapshot: Snapshot) -> dict[str, pa.Table]:
            readers = {"trials": snapshot.trials, "attempts": snapshot.attempts, "measurements": snapshot.measurements}
            named = query.lower()  # a table that is not asked for is not read, nor missed where it is damaged
            return {
                name: _filled(readers[name]([c for c in schema.names if c in used] or ["trial_id"]), schema)
                if name in named
                else empty(schema)
                for name, schema in TABLES.items()
            }

        with _connect(ledger.consistent(read), "query", limits) as connection:
            return _answer(connection.sql(query), limits)
    except duckdb.Error as error:
        raise _explained("query", error, names) from None


def _single_select(statement: str) -> str:
    statements = duckdb.extract_statements(statement)
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        kinds = ", ".join(s.type.name for s in statements) or "nothing"
        raise QueryError(f"query: must be one SELECT statement, which reads and writes no file; got {kinds}")
    return str(statements[0].query)


@contextmanager
def _connect(
    tables: Mapping[str, pa.Table], where: str, limits: Limits = LIMITS
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Opens an in-memory database that holds ``tables`` and can reach nothing else; its configuration is locked.

    Raises:
        QueryError: the block takes longer than ``limits`` allow.
        KeyboardInterrupt: it was interrupted, which DuckDB says in its own way.
    """
    config: dict[str, Any] = {**_LOCKED, "memory_limit": f"{limits.memory_bytes}B"}
    with duckdb.connect(":memory:", config=config) as connection:
        for name, table in tables.items():
            connection.register(name, table)
        connection.execute("SET lock_configuration = true")
        timer = Timer(limits.seconds, connection.interrupt)
        timer.start()
        try:
            yield connection
        except duckdb.InterruptException:
            raise QueryError(
                f"{where}: must be answered within {limits.seconds:g} s; ask for less, or allow more with --timeout"
            ) from None
        except RuntimeError as error:
            if str(error) != "Query interrupted":
                raise
            raise KeyboardInterrupt from None
        finally:
            timer.cancel()
            timer.join()


def _answer(relation: duckdb.DuckDBPyRelation, limits: Limits) -> pa.Table:
    """Returns the rows of a relation, of which no more are made than fit into the memory of ``limits``."""
    reader = relation.to_arrow_reader(_BATCH)
    found, size = [], 0
    for batch in reader:
        found.append(batch)
        size += batch.nbytes
        if size > limits.memory_bytes:
            raise QueryError(
                f"query: its answer must take at most {format_value('memory_bytes', limits.memory_bytes)}, has more after "
                f"{sum(map(len, found)):,} rows; ask for less (LIMIT), or allow more with --memory"
            )
    return pa.Table.from_batches(found, reader.schema)


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
