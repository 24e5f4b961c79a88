"""The command line: parses, dispatches, and turns errors into one line and an exit status.

Exit status: 0 done, 1 the work failed, 2 usage. Rows go to stdout, everything else to stderr. Heavy imports stand inside the
commands: those that only read results import neither torch nor ray.
"""

from __future__ import annotations

import json
import shlex
import socket
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import compare, export, jobs, pareto, remeasure, report, reproduce
from orchestrator.cli.io import (
    STORAGE,
    BudgetOption,
    Format,
    FormatOption,
    NameArgument,
    RayOption,
    StorageOption,
    StudyArgument,
    TrialsOption,
    UsageError,
    duration_s,
    reported,
    say,
    write_dicts,
    write_table,
)

if TYPE_CHECKING:
    from orchestrator.ledger import Ledger
    from orchestrator.study.schema import StudyConfig
    from orchestrator.sweep.driver import StudyRun

app = typer.Typer(
    name="vitpareto",
    help="Searches combinations of vision-transformer compression techniques for the Pareto frontier worth shipping.",
    epilog="Example: vitpareto run quick",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# --- running ----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: vitpareto plan quick")
@reported
def plan(study: StudyArgument, storage: StorageOption = STORAGE) -> None:
    """Checks a study and says what would run; runs nothing and starts no Ray."""
    from orchestrator.study.load import load_study
    from orchestrator.sweep.plan import describe_plan

    for line in describe_plan(load_study(study), storage):
        print(line, flush=True)  # before a refusal, which goes to stderr


@app.command(epilog="Example: vitpareto run study.yaml --trials 40 --time-budget 30m")
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

    config = load_study(study)
    changes: dict[str, Any] = {"name": check_study_name(name)} if name is not None else {}
    _run(config.model_copy(update=changes), storage, trials, time_budget, address, quiet)


@app.command(epilog="Example: vitpareto resume quick --trials 64")
@reported
def resume(
    name: NameArgument,
    storage: StorageOption = STORAGE,
    trials: TrialsOption = None,
    time_budget: BudgetOption = None,
    address: RayOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Goes on with an interrupted study, or extends a finished one with a larger --trials."""
    from orchestrator.study.schema import StudyConfig

    _, stored = _open(name, storage)
    _run(StudyConfig.from_dict(stored["config"]), storage, trials, time_budget, address, quiet)


def _run(
    config: StudyConfig, storage: str, trials: int | None, time_budget: str | None, address: str | None, quiet: bool
) -> None:
    from orchestrator.ledger import Ledger
    from orchestrator.ledger.studies import find_storage
    from orchestrator.study.load import check_same_study

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
    if not quiet:
        where = f"Ray at {address}" if address else "a local Ray"
        print(
            f"study {config.name}: up to {config.trials} trials on {where}, results in {ledger.folder}", file=sys.stderr
        )
    from orchestrator.sweep.driver import run_study

    done = run_study(config, storage=storage, address=address, quiet=quiet)
    _print_run(done, storage)
    if not done.complete and not done.reason.startswith("time budget"):
        raise typer.Exit(1)


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


def _print_run(done: StudyRun, storage: str) -> None:
    from orchestrator.ledger.status import format_failures
    from orchestrator.words.units import format_seconds

    pareto.frontier(done.name, storage)
    volume = "" if done.hypervolume is None else f", hypervolume {done.hypervolume:.4f}"
    print(
        f"{done.done} of {done.budget} trials after {format_seconds(done.elapsed_s)}, "
        f"failed: {format_failures(dict(done.failed))}{volume}",
        file=sys.stderr,
    )
    if done.complete and done.done < done.budget:
        print("the search space has no more recipes than these", file=sys.stderr)
    if not done.complete:
        option = "" if storage == STORAGE else f" --storage {shlex.quote(storage)}"
        print(f"stopped early: {done.reason}; go on with: vitpareto resume {done.name}{option}", file=sys.stderr)
    print(f"results: {done.folder}")


# --- reading ----------------------------------------------------------------------------------------------------------


def _open(name: str, storage: str) -> tuple[Ledger, dict[str, Any]]:
    """Returns a study's ledger and its stored record."""
    from orchestrator.ledger.studies import open_ledger

    ledger = open_ledger(name, storage)
    return ledger, ledger.study_record() or {}


@app.command(epilog="Example: vitpareto status quick")
@reported
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Name of the study; none lists all.")] = None,
    storage: StorageOption = STORAGE,
    format_: FormatOption = Format.table,
) -> None:
    """Says how far studies are, what failed, and which files in their folder cannot be read."""
    from orchestrator.ledger import LedgerError
    from orchestrator.ledger.status import for_people, study_status
    from orchestrator.ledger.studies import find_storage, study_names

    store = find_storage(storage)
    names = study_names(store) if name is None else [name]
    rows = []
    for study in names:
        try:
            rows.append(study_status(_open(study, storage)[0]))
        except LedgerError as error:  # a damaged study does not hide the others
            if name is not None:
                raise
            say(str(error))
    if not names:
        say(f"there are no studies in {store.url}")
    write_dicts([for_people(r) for r in rows] if format_ is Format.table else rows, format_)
    for row in rows:
        for problem in row["problems"]:
            say(problem)


@app.command(epilog="Example: vitpareto show quick 3f2a90c1 --spec > spec.json && python -m workers spec.json")
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

    ledger, _ = _open(name, storage)
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
            print(line)


app.command(epilog='Example: vitpareto pareto quick --objectives top1_pct,size_bytes --budget "top1_pct_drop <= 1"')(
    pareto.pareto
)
app.command(epilog="Example: vitpareto compare quick 3f2a90c1 77b0")(compare.compare)


@app.command(epilog="""Example: vitpareto query quick "SELECT status, count(*) AS n FROM trials GROUP BY status\"""")
@reported
def query(
    name: NameArgument,
    statement: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT over trials, attempts, measurements.")],
    storage: StorageOption = STORAGE,
    format_: FormatOption = Format.table,
) -> None:
    """Runs read-only SQL over the ledger; it can read and write nothing else."""
    from orchestrator.frontier import query as queries

    ledger, _ = _open(name, storage)
    write_table(queries.sql(ledger, statement), format_)


@app.command(epilog="Example: vitpareto techniques --format json")
@reported
def techniques(format_: FormatOption = Format.table) -> None:
    """Lists the techniques with their parameters, ranges and defaults."""
    from orchestrator.sweep.plan import technique_lines, technique_rows

    write_dicts(technique_lines() if format_ is Format.table else technique_rows(), format_)


# --- later ------------------------------------------------------------------------------------------------------------

app.command(epilog="Example: vitpareto remeasure quick --times 8")(remeasure.remeasure)
app.command(epilog="Example: vitpareto reproduce quick cb8b")(reproduce.reproduce)
app.command(epilog="Example: vitpareto export quick cb8b --format onnx exported")(export.export)
app.command(epilog="Example: vitpareto report quick -o report.html")(report.report)

# --- clusters ---------------------------------------------------------------------------------------------------------

app.command(epilog="Example: vitpareto submit study.yaml --address http://127.0.0.1:8265 --storage /shared/results")(
    jobs.submit
)
app.add_typer(jobs.jobs, name="jobs")


def main() -> None:
    """Entry point of the ``vitpareto`` command."""
    app()


if __name__ == "__main__":
    main()
