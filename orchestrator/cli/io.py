"""What the commands take and give: options, formats, and errors as one line and an exit status."""

from __future__ import annotations

import enum
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from orchestrator.words.printable import printable

if TYPE_CHECKING:
    import pyarrow as pa

    from orchestrator.ledger import Ledger


class Format(enum.StrEnum):
    """How rows come out."""

    table = "table"
    json = "json"
    csv = "csv"
    parquet = "parquet"


StorageOption = Annotated[
    str, typer.Option(help="Folder or URL of an object store of the results.", envvar="VITPARETO_STORAGE")
]
FormatOption = Annotated[Format, typer.Option("--format", help="How rows come out.")]
AddressOption = Annotated[str, typer.Option(help="Address of the head's dashboard.", envvar="RAY_API_SERVER_ADDRESS")]
TrialsOption = Annotated[int | None, typer.Option(min=1, help="Trials in total, in place of the study's own budget.")]
BudgetOption = Annotated[str | None, typer.Option(help="Wall time after which no trial is started: 90s, 30m, 2h.")]
RayOption = Annotated[str | None, typer.Option(help="A running Ray: auto, HOST:PORT; default: a local one.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the study.")]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY.yaml", help="A study file, or a study that ships: quick.")]
STORAGE = "results"

SIGNALLED = 128
"""Added to a signal's number: the exit status after it, as shells have it."""


class UsageError(Exception):
    """The command was asked for something that does not exist or does not fit; exit status 2."""


INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the signal's number."""

_STATUS = {
    "UsageError": 2,
    "StudyError": 2,
    "StudyRefused": 2,
    "StudyNotFound": 2,
    "StorageError": 2,
    "QueryError": 2,
    "SubmitRefused": 2,
    "TaskError": 2,
    "TableError": 2,
    "AuditError": 2,
    "ModelError": 2,
    "SubmitError": 1,
    "StudyFailed": 1,
    "StudyBusy": 1,
    "LeaseLost": 1,
    "LedgerError": 1,
    "OSError": 1,
}
"""Exit status of the errors that a user can cause, by name: importing their modules would take seconds."""


def reported(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns the errors a user can cause into lines on stderr and an exit status; others keep their traceback.

    What was told without rows that are known to be missing is followed by a line a file and ends with status 1, whatever else.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        with _missing_rows() as missing:
            try:
                told(*args, **kwargs)
            except typer.Exit as done:
                raise typer.Exit(1 if missing else done.exit_code) from None
        if missing:
            raise typer.Exit(1)

    def told(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever reads our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt as interrupt:
            say(str(interrupt)) if str(interrupt) else interrupted()
            raise typer.Exit(SIGNALLED + getattr(interrupt, "signal", signal.SIGINT)) from None
        except Exception as error:
            status = next((_STATUS[k.__name__] for k in type(error).__mro__ if k.__name__ in _STATUS), None)
            if status is None:
                raise
            for line in _text(error).splitlines():
                say(line)
            raise typer.Exit(status) from None

    return run


@cache
def interrupted() -> int:
    """Says so, once a process, and returns the exit status."""
    say("interrupted")
    return INTERRUPTED


@contextmanager
def _missing_rows() -> Iterator[set[str]]:
    """Says each warning of a ledger once, and gives what was said."""
    from orchestrator.ledger import LedgerWarning

    said: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", LedgerWarning)
        show = warnings.showwarning

        def say_once(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, LedgerWarning):
                show(message, category, *place, **more)
            elif str(message) not in said:
                said.add(str(message))
                say(str(message))

        warnings.showwarning = say_once
        yield said


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def say(line: str) -> None:
    """Writes a line to stderr, after the program's name."""
    write(f"vitpareto: {line}", sys.stderr)


def write(line: str, out: TextIO | None = None) -> None:
    """Writes a line for people, which a terminal shows and does not obey, to ``out`` (None: stdout)."""
    print(printable(line), file=out, flush=True)


def open_study(name: str, storage: str) -> tuple[Ledger, dict[str, Any]]:
    """Returns a study's ledger and its stored record."""
    from orchestrator.ledger.studies import open_ledger

    ledger = open_ledger(name, storage)
    return ledger, ledger.study_record() or {}


# --- rows and durations -----------------------------------------------------------------------------------------------


def write_table(table: pa.Table, format_: Format) -> None:
    """Writes rows to stdout; Parquet never to a terminal."""
    from orchestrator.ledger import parquet_bytes  # pyarrow, which `vitpareto --help` need not wait for
    from orchestrator.words.rows import TABLE_ROWS, format_rows

    if format_ is Format.table and len(table) > TABLE_ROWS:
        raise UsageError(
            f"--format table: must have at most {TABLE_ROWS:,} rows, there are {len(table):,}; ask for less, or --format csv"
        )
    if format_ is not Format.parquet:
        format_rows(table, format_.value, sys.stdout)
        return
    if sys.stdout.isatty():
        raise UsageError("--format parquet: must not go to a terminal; redirect it to a file")
    sys.stdout.flush()
    sys.stdout.buffer.write(parquet_bytes(table))
    sys.stdout.buffer.flush()


def write_dicts(rows: list[dict[str, Any]], format_: Format) -> None:
    """Writes rows to stdout; nested values stay as they are in JSON and are JSON text elsewhere."""
    import pyarrow as pa

    from orchestrator.words.rows import plain

    rows = plain(rows)
    if format_ is Format.json:
        print(json.dumps(rows, indent=2))
        return
    flat = [{k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()} for row in rows]
    write_table(pa.Table.from_pylist(flat), format_)


def duration_s(text: str | None, option: str = "time-budget") -> float | None:
    """Returns the duration of an option in seconds."""
    from orchestrator.study.load import parse_duration_s

    try:
        return None if text is None else parse_duration_s(text, option)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def memory_bytes(text: str | None, option: str = "memory") -> int | None:
    """Returns the memory of an option in bytes."""
    from orchestrator.study.load import parse_size_bytes

    try:
        return None if text is None else parse_size_bytes(text, option)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
