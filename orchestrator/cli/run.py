"""The commands ``run`` and ``resume``."""

from __future__ import annotations

import shlex
import socket
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.io import (
    SIGNALLED,
    STORAGE,
    BudgetOption,
    NameArgument,
    RayOption,
    StorageOption,
    StudyArgument,
    TrialsOption,
    UsageError,
    duration_s,
    open_study,
    reported,
    say,
    write,
)
from orchestrator.cli.pareto import frontier

if TYPE_CHECKING:
    from orchestrator.ledger import Ledger
    from orchestrator.study.schema import StudyConfig
    from orchestrator.sweep.outcome import StudyRun


@reported
def run(
    study: StudyArgument,
    storage: StorageOption = STORAGE,
    name: Annotated[str | None, typer.Option(help="Name of the study, in place of the file's.")] = None,
    trials: TrialsOption = None,
    time_budget: BudgetOption = None,
    address: RayOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Runs a study; the same study again goes on where it stopped."""
    from orchestrator.study.load import check_study_name, load_study

    config = load_study(study, here=address is None)
    changes: dict[str, Any] = {"name": check_study_name(name)} if name is not None else {}
    _run(config.model_copy(update=changes), storage, trials, time_budget, address, quiet)


@reported
def resume(
    name: NameArgument,
    storage: StorageOption = STORAGE,
    trials: TrialsOption = None,
    time_budget: BudgetOption = None,
    address: RayOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
    retry: Annotated[
        list[str] | None,
        typer.Option(
            help="Ask again what ended so: error, timeout, ...; several with commas. The recipes stay the same."
        ),
    ] = None,
    finish: Annotated[
        list[str] | None,
        typer.Option(help="Bring this trial to its end, which was stopped early; may be given several times."),
    ] = None,
) -> None:
    """Goes on with an interrupted study, or extends a finished one with a larger --trials."""
    from orchestrator.study.load import stored_study

    again = _failure_classes(retry or [])
    ledger, stored = open_study(name, storage)
    ends = _stopped_trials(ledger, finish or [])
    _run(stored_study(stored, ledger.folder), storage, trials, time_budget, address, quiet, again, ends)


def _stopped_trials(ledger: Ledger, starts: list[str]) -> tuple[str, ...]:
    """Returns the ids of trials that were stopped early, each given by the start of its id."""
    from orchestrator.ledger.show import find_trial

    try:
        found = [find_trial(ledger, start) for start in starts]
    except LookupError as error:
        raise UsageError(f"--finish: {error}") from None
    wrong = [f"{row['trial_id']} is {row['status']}" for row in found if row["status"] != "stopped"]
    if wrong:
        remedy = f"list them with: vitpareto query {ledger.study} \"SELECT trial_id, label FROM trials WHERE status = 'stopped'\""
        raise UsageError(f"--finish: must be a trial that was stopped early; {', '.join(wrong)}; {remedy}")
    return tuple(row["trial_id"] for row in found)


def _failure_classes(texts: list[str]) -> tuple[str, ...]:
    from workers.trial import STATUSES

    allowed = [status for status in STATUSES if status not in ("ok", "stopped")]
    named = [name.strip() for text in texts for name in text.split(",")]
    unknown = [name for name in named if name not in allowed]
    if unknown:
        raise UsageError(f"--retry {', '.join(unknown)}: must be of {', '.join(allowed)}")
    return tuple(dict.fromkeys(named))


def _run(
    config: StudyConfig,
    storage: str,
    trials: int | None,
    time_budget: str | None,
    address: str | None,
    quiet: bool,
    retry: tuple[str, ...] = (),
    finish: tuple[str, ...] = (),
) -> None:
    from orchestrator.ledger import Ledger
    from orchestrator.ledger.studies import find_storage
    from orchestrator.study.load import check_runs_here, check_same_study

    if address is None:
        check_runs_here(config)  # of a study that goes on, perhaps on another machine
    if trials is not None:
        config = config.model_copy(update={"trials": trials})
    seconds = duration_s(time_budget)
    if seconds is not None:
        config = config.model_copy(update={"budget": config.budget.model_copy(update={"time": seconds})})
    if address is not None:
        _check_ray(address)
    ledger = Ledger(find_storage(storage), config.name)
    stored = ledger.study_record()
    if stored is not None:  # the driver asks again, after seconds of imports
        check_same_study(config, stored["config"], ledger.folder)
        if trials is not None:
            _check_trials(trials, config.name, storage)
    if not quiet:
        where = f"Ray at {address}" if address else "a local Ray"
        print(
            f"study {config.name}: up to {config.trials} trials on {where}, results in {ledger.folder}", file=sys.stderr
        )
    from orchestrator.sweep.keeper import run_study

    done = run_study(config, storage=storage, address=address, quiet=quiet, retry=retry, finish=finish)
    _print_run(done, storage, address)
    if done.signal is not None and not done.complete:
        raise typer.Exit(SIGNALLED + done.signal)
    if not done.complete and not done.reason.startswith("time budget"):
        raise typer.Exit(1)


def _check_trials(trials: int, name: str, storage: str) -> None:
    """Refuses a budget that is overspent: nothing would be run, and the study would count as done with fewer than it has."""
    from orchestrator.ledger.status import done_recipes

    done = done_recipes(open_study(name, storage)[0])
    if trials < done:
        raise UsageError(
            f"--trials {trials}: must not be less than the {done} trials that study {name} has already; ask for more, or "
            "leave it out to keep the study's own budget"
        )


def _check_ray(address: str) -> None:
    """Refuses an address at which no Ray answers: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto" or "://" in address:  # the driver's matter
        return
    if not host or not port.isdigit():
        raise UsageError(f"--address {address}: must be auto, or HOST:PORT of a running Ray, such as 127.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"--address {address}: no Ray answers there ({error}); `ray status` knows more") from None


def _print_run(done: StudyRun, storage: str, address: str | None) -> None:
    from orchestrator.ledger import LedgerError
    from orchestrator.ledger.status import format_failures
    from orchestrator.words.units import format_seconds

    try:
        frontier(done.name, storage)
    except (OSError, LedgerError, LookupError) as error:
        if done.complete:
            raise
        say(f"the frontier cannot be read: {error}")
    volume = "" if done.hypervolume is None else f", hypervolume {done.hypervolume:.4f}"
    paused = f"stopped early: {done.paused}, " if done.paused else ""
    print(
        f"{done.done} of {done.budget} trials after {format_seconds(done.elapsed_s)}, {paused}"
        f"failed: {format_failures(dict(done.failed))}{volume}",
        file=sys.stderr,
    )
    if done.complete and done.done < done.budget:
        print("the search space has no more recipes than these", file=sys.stderr)
    if not done.complete:
        option = "" if storage == STORAGE else f" --storage {shlex.quote(storage)}"
        option += "" if address is None else f" --address {shlex.quote(address)}"
        write(f"stopped early: {done.reason}; go on with: vitpareto resume {done.name}{option}", sys.stderr)
    print(f"results: {done.folder}")
