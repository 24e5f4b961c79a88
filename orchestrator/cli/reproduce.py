"""The command ``reproduce``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.io import (
    STORAGE,
    Format,
    FormatOption,
    NameArgument,
    StorageOption,
    UsageError,
    reported,
    say,
    write,
    write_dicts,
)

if TYPE_CHECKING:
    from orchestrator.export.reproduce import Reproduction
    from orchestrator.frontier.verdicts import Difference


@reported
def reproduce(
    name: NameArgument,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="Trial id, or the start of it.")],
    storage: StorageOption = STORAGE,
    keep: Annotated[
        Path | None, typer.Option(help="Folder to run in and to leave, instead of a temporary one.")
    ] = None,
    format_: FormatOption = Format.table,
) -> None:
    """Runs a trial again from its row alone and says whether its numbers fall inside its intervals; exit status 1 if not."""
    from orchestrator.ledger.studies import open_ledger

    ledger = open_ledger(name, storage)
    from orchestrator.export.reproduce import ReproduceRefused
    from orchestrator.export.reproduce import reproduce as run_again

    try:
        done = run_again(ledger, trial, keep=keep, say=say)
    except (ReproduceRefused, LookupError) as error:
        raise UsageError(str(error)) from None
    if format_ is Format.json:
        print(json.dumps({**asdict(done), "reproduced": done.reproduced}, indent=2))
    else:
        _print(done, format_)
    if not done.reproduced:
        raise typer.Exit(1)


def _print(done: Reproduction, format_: Format) -> None:
    """Prints the verdicts; what a table of other formats cannot hold goes to stderr."""
    people = format_ is Format.table
    if done.verdicts:
        write_dicts(
            [_line(v) for v in map(asdict, done.verdicts)] if people else list(map(asdict, done.verdicts)), format_
        )
    out = sys.stdout if people else sys.stderr
    same = "as in the row" if done.status == done.row_status else f"but {done.row_status} in the row"
    write(f"status: {done.status}, {same}" + (f": {done.failure}" if done.failure else ""), out)
    for difference in done.differences:
        write(_difference(difference), out)
    print(f"reproduced: {'yes' if done.reproduced else 'no'}", file=out)
    if done.folder is not None:
        say(f"the run is left in {done.folder}")


def _line(verdict: dict[str, Any]) -> dict[str, Any]:
    from orchestrator.words.units import format_value

    def value(which: str) -> str:
        middle, low, high = (verdict[f"{which}{end}"] for end in ("", "_low", "_high"))
        text = format_value(verdict["compared"], middle).strip()
        return text if low is None else f"{text} ({low:.4g} to {high:.4g})"

    return {
        "compared": verdict["compared"],
        "row": value("row"),
        "here": value("here"),
        "verdict": verdict["verdict"],
        "note": verdict["note"] + _digits(verdict),
    }


def _digits(verdict: dict[str, Any]) -> str:
    """Returns both values in full where an exact one differs: rounded they may look alike."""
    row, here = verdict["row"], verdict["here"]
    exact = verdict["row_low"] is None and verdict["here_low"] is None
    if verdict["verdict"] != "outside" or not exact or row is None or here is None:
        return ""
    return f": {row:,.0f} in the row, {here:,.0f} here"


def _difference(difference: Difference) -> str:
    row, here = difference.row, difference.here
    if difference.what == "cpu_flags":  # a long list each, of which few words matter
        flags = set(row.split()), set(here.split())
        row, here = (" ".join(sorted(one - other)) or "no more" for one, other in (flags, flags[::-1]))
    return f"differs: {difference.what}: {row} in the row, {here} here"
