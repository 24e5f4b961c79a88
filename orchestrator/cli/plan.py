"""The command ``plan``."""

from __future__ import annotations

from orchestrator.cli.io import STORAGE, StorageOption, StudyArgument, reported, say


@reported
def plan(study: StudyArgument, storage: StorageOption = STORAGE) -> None:
    """Checks a study and says what would run; runs nothing and starts no Ray."""
    from orchestrator.study.load import load_study
    from orchestrator.sweep.plan import describe_plan
    from workers.techniques import left_out  # which imports torch once it is asked

    for line in describe_plan(load_study(study), storage):
        print(line, flush=True)  # before a refusal, which goes to stderr
    for broken in left_out():
        say(str(broken))
