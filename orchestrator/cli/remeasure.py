"""The command ``remeasure``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from orchestrator.cli.io import STORAGE, NameArgument, RayOption, StorageOption, open_study, reported


@reported
def remeasure(
    name: NameArgument,
    times: Annotated[int, typer.Option(min=1, help="Most measurements; fewer where the frontier is decided.")] = 8,
    storage: StorageOption = STORAGE,
    address: RayOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Measures frontier members again whose place rests on noise, one at a time, alone on the device."""
    from orchestrator.study.load import stored_study

    ledger, stored = open_study(name, storage)
    config = stored_study(stored, ledger.folder)
    from orchestrator.sweep.keeper import remeasure_study

    spent = remeasure_study(config, times=times, storage=storage, address=address, quiet=quiet)
    rest = "" if spent else ": no place on the frontier rests on the noise of a speed"
    print(f"measured again {spent} times{rest}; `vitpareto pareto {name}` shows what is known now", file=sys.stderr)
