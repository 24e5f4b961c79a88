"""The command ``query``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Annotated

import typer

from orchestrator.cli.io import (
    STORAGE,
    Format,
    FormatOption,
    NameArgument,
    StorageOption,
    duration_s,
    memory_bytes,
    open_study,
    reported,
    say,
    write_table,
)

GRACE_S = 10.0
"""After the timeout, for DuckDB to notice it: a single step of its work is not interrupted."""


@reported
def query(
    name: NameArgument,
    statement: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT over trials, attempts, measurements.")],
    storage: StorageOption = STORAGE,
    format_: FormatOption = Format.table,
    timeout: Annotated[str | None, typer.Option(help="Most time for the answer: 90s, 5m; default: 60s.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Most memory for it: 500MB, 8GB; default: 4GB, or half of the machine's.")
    ] = None,
) -> None:
    """Runs read-only SQL over the ledger; it can read and write nothing else."""
    seconds, size = duration_s(timeout, "timeout"), memory_bytes(memory)
    from orchestrator.frontier import query as queries

    standing = queries.LIMITS
    limits = queries.Limits(seconds or standing.seconds, size or standing.memory_bytes)
    ledger, _ = open_study(name, storage)
    with _ended_after(limits.seconds + GRACE_S):
        rows = queries.sql(ledger, statement, limits)
    write_table(rows, format_)


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Ends the process where the block does not end, deaf to interrupts, inside a library."""

    def end() -> None:
        say(f"query: gave no answer within {seconds:g} s and did not heed the end of its time; ask for less")
        os._exit(1)

    timer = Timer(seconds, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
