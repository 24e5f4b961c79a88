"""The command ``status``."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.io import STORAGE, Format, FormatOption, StorageOption, open_study, reported, say, write_dicts


@reported
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Name of the study; none lists all.")] = None,
    storage: StorageOption = STORAGE,
    format_: FormatOption = Format.table,
) -> None:
    """Says how far studies are, what failed, and which files in their folder cannot be read.

    Reads every byte of the ledger; exit status 1 where rows are known to be missing, or a study cannot be opened.
    """
    from orchestrator.ledger import LedgerError
    from orchestrator.ledger.status import for_people, study_status
    from orchestrator.ledger.studies import find_storage, study_names
    from orchestrator.words.spent_seconds import spent_text

    store = find_storage(storage)
    names = study_names(store) if name is None else [name]
    rows, whole = [], True
    for study in names:
        try:
            rows.append(study_status(open_study(study, storage)[0]))
        except LedgerError as error:  # a damaged study does not hide the others
            if name is not None:
                raise
            say(str(error))
            whole = False
    if not names:
        say(f"there are no studies in {store.url}")
    write_dicts([for_people(r) for r in rows] if format_ is Format.table else rows, format_)
    for row in rows:
        if name is not None and format_ is Format.table and (spent := spent_text(row["seconds"])):
            say(f"{spent}; {row['speeds_taken_over']} speeds taken over from equal structures")
        for problem in row["problems"]:
            say(problem)
        if row["rows_missing"]:
            say(
                f"rows of {row['study']} are missing from these numbers; `vitpareto repair {row['study']}` says what is left"
            )
    if not whole or any(row["rows_missing"] for row in rows):
        raise typer.Exit(1)
