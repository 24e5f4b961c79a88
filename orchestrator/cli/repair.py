"""The command ``repair``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.io import STORAGE, NameArgument, StorageOption, reported

if TYPE_CHECKING:
    from orchestrator.ledger.repair import Repair


@reported
def repair(
    name: NameArgument,
    storage: StorageOption = STORAGE,
    apply: Annotated[bool, typer.Option("--apply", help="Does it; without, says what would be done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="What was found, as JSON.")] = False,
) -> None:
    """Says what is left of a damaged study, and with --apply goes on with that; deletes nothing.

    Damaged files move to damaged/ in the study's folder. What is lost is run again by resume.
    """
    from orchestrator.ledger.repair import repair as mend
    from orchestrator.ledger.studies import find_damaged

    done = mend(find_damaged(name, storage), name, apply=apply)
    if as_json:
        print(json.dumps(asdict(done), indent=2))
        return
    for line in _lines(done):
        print(line)


def _lines(done: Repair) -> Iterator[str]:
    if not done.needed:
        yield f"study {done.study}: nothing to repair, {done.trials} trials"
        return
    for file, reason in done.aside.items():
        yield f"{'moved' if done.applied else 'moves'} to {done.folder}: {file}: {reason}"
    for file, reason in done.gone.items():
        yield f"gone: {file}: {reason}"
    yield f"kept: {done.trials} trials; {done.recovered} attempts taken out of files that are damaged or out of use"
    if done.null_columns:
        yield f"empty in some of them, since it could not be read: {', '.join(done.null_columns)}"
    if done.without_records:
        yield f"without the single measurements that their numbers rest on: {', '.join(done.without_records)}"
    if done.asks:
        yield f"written anew from the attempts: {done.asks} records of what was asked for"
    if done.lost:
        yield f"lost: {len(done.lost)} trials: {', '.join(done.lost)}; `vitpareto resume {done.study}` runs them again"
    if not done.applied:
        yield "nothing was changed; do it with --apply"
