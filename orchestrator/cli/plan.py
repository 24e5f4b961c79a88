"""The command ``plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.io import STORAGE, RayOption, StorageOption, StudyArgument, reported, say, write


@reported
def plan(
    study: StudyArgument,
    storage: StorageOption = STORAGE,
    address: RayOption = None,
    landscape: Annotated[
        bool, typer.Option("--landscape", help="Also say how large the models would be; seconds to a minute.")
    ] = False,
) -> None:
    """Checks a study and says what would run; runs nothing and starts no Ray. With --address nothing is asked of this machine."""
    from orchestrator.study.load import load_study
    from orchestrator.sweep.plan import describe_plan
    from workers.techniques import left_out  # which imports torch once it is asked

    config = load_study(study, here=address is None)
    for line in describe_plan(config, storage, here=address is None, landscape=landscape):
        write(line)
    for broken in left_out():
        say(str(broken))
