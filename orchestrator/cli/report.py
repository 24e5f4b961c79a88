"""The command ``report``: a study as a page, or its frontier as a figure for a paper."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.io import STORAGE, NameArgument, StorageOption, UsageError, reported, say

PAGES = (".html", ".htm")
FIGURES = (".svg", ".png", ".pdf")


@reported
def report(
    name: NameArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write: .html, .svg, .png or .pdf.")],
    objectives: Annotated[
        str | None,
        typer.Option(help="Comma-separated; default: the study's own. A figure draws the first over the second."),
    ] = None,
    storage: StorageOption = STORAGE,
) -> None:
    """Writes a study as one page that needs no network (.html), or its frontier as a figure (.svg, .png, .pdf)."""
    suffix = _check_output(output)
    from orchestrator.ledger.studies import open_ledger
    from orchestrator.report.read import read_report
    from workers.node.storage import LocalStorage

    wanted = None if objectives is None else list(dict.fromkeys(o.strip() for o in objectives.split(",") if o.strip()))
    found = read_report(open_ledger(name, storage), wanted)
    if suffix in PAGES:
        from orchestrator.report.render import page

        data = page(found, "" if storage == STORAGE else f" --storage {shlex.quote(storage)}").encode()
    else:
        from orchestrator.report.plots import NothingToDraw, frontier_figure

        try:
            data = frontier_figure(found, suffix.removeprefix("."))
        except NothingToDraw as nothing:
            raise UsageError(f"-o {output}: {nothing}") from None
    LocalStorage(output.parent).put_atomic(output.name, data)
    print(output)
    say(f"{len(found.candidates)} recipes of study {name}, {len(data) / 1e6:.1f} MB")


def _check_output(output: Path) -> str:
    """Returns the suffix of a file that can be written, in lower case."""
    suffix = output.suffix.lower()
    if suffix not in (*PAGES, *FIGURES):
        raise UsageError(
            f"-o {output}: must end in .html (a page) or in {', '.join(FIGURES)} (a figure), got {output.suffix or 'no suffix'}"
        )
    if output.is_dir():
        raise UsageError(f"-o {output}: is a folder; name a file in it")
    if not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.parent}; make it first")
    return suffix
