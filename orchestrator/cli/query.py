"""The command ``query``."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.io import (
    STORAGE,
    Format,
    FormatOption,
    NameArgument,
    StorageOption,
    open_study,
    reported,
    write_table,
)


@reported
def query(
    name: NameArgument,
    statement: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT over trials, attempts, measurements.")],
    storage: StorageOption = STORAGE,
    format_: FormatOption = Format.table,
) -> None:
    """Runs read-only SQL over the ledger; it can read and write nothing else."""
    from orchestrator.frontier import query as queries

    ledger, _ = open_study(name, storage)
    write_table(queries.sql(ledger, statement), format_)
