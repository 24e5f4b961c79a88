"""The command ``show``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from orchestrator.cli.io import STORAGE, NameArgument, StorageOption, UsageError, open_study, reported, write


@reported
def show(
    name: NameArgument,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="Trial id, or the start of it.")],
    storage: StorageOption = STORAGE,
    as_json: Annotated[bool, typer.Option("--json", help="The whole row as JSON.")] = False,
    spec: Annotated[bool, typer.Option("--spec", help="Only what `python -m workers` needs to rerun it.")] = False,
) -> None:
    """Prints a trial: recipe, metrics with unit and conditions, provenance, and how to rerun it alone."""
    from orchestrator.ledger.show import describe_trial, find_trial
    from orchestrator.words.rows import plain

    ledger, _ = open_study(name, storage)
    try:
        row = find_trial(ledger, trial)
    except LookupError as error:
        raise UsageError(str(error)) from None
    if spec:
        print(json.dumps(row["spec"], indent=2))
    elif as_json:
        print(json.dumps(plain(row), indent=2))
    else:
        for line in describe_trial(row, ledger, name, storage):
            write(line)
