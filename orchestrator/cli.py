"""The command line: parses, dispatches, and turns errors into one line and an exit status.

Exit status: 0 done, 1 the work failed, 2 usage. Rows go to stdout, everything else to stderr. Heavy imports stand inside the
commands: those that only read results import neither torch nor ray.
"""

from __future__ import annotations

import enum
import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pyarrow as pa

    from orchestrator.driver import StudyRun
    from orchestrator.ledger import Ledger
    from orchestrator.study_schema import StudyConfig

app = typer.Typer(
    name="vitpareto",
    help="Searches combinations of vision-transformer compression techniques for the Pareto frontier worth shipping.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
jobs = typer.Typer(help="Jobs that `submit` sent to a Ray cluster.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(jobs, name="jobs")


class Format(enum.StrEnum):
    """How rows come out."""

    table = "table"
    json = "json"
    csv = "csv"
    parquet = "parquet"


StorageOption = Annotated[str, typer.Option(help="Folder or fsspec URL of the results.", envvar="VITPARETO_STORAGE")]
FormatOption = Annotated[Format, typer.Option("--format", help="How rows come out.")]
AddressOption = Annotated[str, typer.Option(help="Address of the head's dashboard.", envvar="RAY_API_SERVER_ADDRESS")]
TrialsOption = Annotated[int | None, typer.Option(min=1, help="Trials in total, in place of the study's own budget.")]
BudgetOption = Annotated[str | None, typer.Option(help="Wall time after which no trial is started: 90s, 30m, 2h.")]
RayOption = Annotated[str | None, typer.Option(help="A running Ray (auto, ray://HEAD:10001); default: a local one.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the study.")]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY.yaml", help="A study file, or a study that ships: quick.")]
STORAGE = "results"


class UsageError(Exception):
    """The command was asked for something that does not exist or does not fit; exit status 2."""


def _command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns the errors a user can cause into one line on stderr and an exit status."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            print("vitpareto: interrupted", file=sys.stderr)
            raise typer.Exit(1) from None
        except Exception as error:
            status = _status(error)
            if status is None:
                raise
            print(f"vitpareto: {error}", file=sys.stderr)
            raise typer.Exit(status) from None

    return run


def _status(error: Exception) -> int | None:
    """The exit status of an error that is reported in one line; None for one that deserves its traceback."""
    kinds = {
        "UsageError": 2,
        "StudyError": 2,
        "QueryError": 2,
        "StudyFailed": 1,
        "StudyBusy": 1,
        "SubmitError": 1,
        "LedgerError": 1,
        "TaskError": 1,
        "ModelError": 1,
        "CheckpointError": 1,
    }
    return next((kinds[k.__name__] for k in type(error).__mro__ if k.__name__ in kinds), None)


# --- running ----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: vitpareto plan quick")
@_command
def plan(study: StudyArgument, storage: StorageOption = STORAGE) -> None:
    """Checks a study and says what would run; runs nothing and starts no Ray."""
    from orchestrator.config import load_study
    from orchestrator.plan import describe_plan

    for line in describe_plan(load_study(study), storage):
        print(line)


@app.command(epilog="Example: vitpareto run study.yaml --trials 40 --time-budget 30m")
@_command
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
    from orchestrator.config import check_study_name, load_study

    config = load_study(study)
    changes: dict[str, Any] = {"name": check_study_name(name)} if name is not None else {}
    _run(config.model_copy(update=changes), storage, trials, time_budget, address, quiet)


@app.command(epilog="Example: vitpareto resume quick --trials 64")
@_command
def resume(
    name: NameArgument,
    storage: StorageOption = STORAGE,
    trials: TrialsOption = None,
    time_budget: BudgetOption = None,
    address: RayOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Goes on with an interrupted study, or extends a finished one with a larger --trials."""
    _, stored = _open(name, storage)
    _run(_stored_config(stored), storage, trials, time_budget, address, quiet)


def _run(
    config: StudyConfig, storage: str, trials: int | None, time_budget: str | None, address: str | None, quiet: bool
) -> None:
    from orchestrator.config import parse_duration_s

    if trials is not None:
        config = config.model_copy(update={"trials": trials})
    if time_budget is not None:
        try:
            seconds = parse_duration_s(time_budget)
        except ValueError as error:
            raise UsageError(f"--time-budget: {error}") from None
        config = config.model_copy(update={"budget": config.budget.model_copy(update={"time": seconds})})
    from orchestrator.driver import run_study

    try:
        done = run_study(config, storage=storage, address=address, quiet=quiet)
    except ValueError as error:
        if _status(error) is None and "holds another study" not in str(error):
            raise
        raise UsageError(str(error)) from None
    _print_run(done, storage)
    if not done.complete:
        raise typer.Exit(0 if done.reason.startswith("time budget") else 1)


def _print_run(done: StudyRun, storage: str) -> None:
    from orchestrator.units import format_seconds

    _frontier(done.name, storage, None, None, False, Format.table)
    failed = ", ".join(f"{n} {status}" for status, n in done.failed.items()) or "none"
    volume = "" if done.hypervolume is None else f", hypervolume {done.hypervolume:.4f} (baseline-relative)"
    print(
        f"{done.done} of {done.budget} trials in {format_seconds(done.elapsed_s)}, failed: {failed}{volume}",
        file=sys.stderr,
    )
    if not done.complete:
        option = "" if storage == STORAGE else f" --storage {storage}"
        print(f"stopped early: {done.reason}; go on with: vitpareto resume {done.name}{option}", file=sys.stderr)
    print(f"results: {done.folder}")


# --- reading ----------------------------------------------------------------------------------------------------------


def _open(name: str, storage: str) -> tuple[Ledger, dict[str, Any]]:
    """Returns a study's ledger, ready for queries in the study's own context, and its stored record."""
    from orchestrator.ledger import Ledger
    from workers.storage import open_storage

    store = open_storage(storage)
    try:
        stored = Ledger(store, name).study_record()
    except ValueError:
        stored = None
    if stored is None:
        raise UsageError(f"there is no study {name!r} in {store.url}; `vitpareto status` lists those there are")
    return Ledger(store, name, stored["config"]["constraints"], stored["context"]), stored


def _stored_config(stored: dict[str, Any]) -> StudyConfig:
    from orchestrator.study_schema import StudyConfig

    return StudyConfig.from_dict(stored["config"])


@app.command(epilog="Example: vitpareto status quick")
@_command
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Name of the study; none lists all.")] = None,
    storage: StorageOption = STORAGE,
    format_: FormatOption = Format.table,
) -> None:
    """Says how far studies are, what failed, and which files in their folder cannot be read."""
    from orchestrator.status import study_names, study_status
    from workers.storage import open_storage

    names = study_names(open_storage(storage)) if name is None else [name]
    rows = [study_status(*_open(n, storage)) for n in names]
    _write(rows, format_)
    for row in rows:
        for problem in row["problems"]:
            print(f"vitpareto: {problem}", file=sys.stderr)


@app.command(epilog="Example: vitpareto show quick 3f2a90c1 --spec > spec.json && python -m workers spec.json")
@_command
def show(
    name: NameArgument,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="Trial id, or the start of it.")],
    storage: StorageOption = STORAGE,
    as_json: Annotated[bool, typer.Option("--json", help="The whole row as JSON.")] = False,
    spec: Annotated[bool, typer.Option("--spec", help="Only what `python -m workers` needs to rerun it.")] = False,
) -> None:
    """Prints a trial: recipe, metrics with unit and conditions, provenance, and how to rerun it alone."""
    from orchestrator.show import describe_trial, find_trial

    ledger, _ = _open(name, storage)
    try:
        row = find_trial(ledger, trial)
    except LookupError as error:
        raise UsageError(str(error.args[0])) from None
    if spec:
        print(json.dumps(row["spec"], indent=2))
    elif as_json:
        print(json.dumps(row, indent=2, default=str))
    else:
        for line in describe_trial(row, ledger, name, storage):
            print(line)


@app.command(epilog='Example: vitpareto pareto quick --objectives top1_pct,size_bytes --where "top1_pct_drop <= 1"')
@_command
def pareto(
    name: NameArgument,
    objectives: Annotated[str | None, typer.Option(help="Comma-separated; default: the study's own.")] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition over the columns of trials.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Trials that break a constraint of the study too.")] = False,
    storage: StorageOption = STORAGE,
    format_: FormatOption = Format.table,
) -> None:
    """Prints the Pareto frontier of the feasible trials."""
    _frontier(name, storage, objectives, where, everything, format_)


def _frontier(
    name: str, storage: str, objectives: str | None, where: str | None, everything: bool, format_: Format
) -> None:
    from orchestrator import query

    ledger, stored = _open(name, storage)
    directions: dict[str, str] = stored["config"]["objectives"]
    wanted = [o.strip() for o in objectives.split(",") if o.strip()] if objectives else list(directions)
    rows = query.pareto(ledger, wanted, None, where, all_rows=everything)
    if format_ is Format.table:  # what fits a terminal; the other formats have every column
        rows = rows.select(["trial_id", *wanted, *(["top1_pct_drop"] if "top1_pct_drop" not in wanted else []), "label"])
    _rows(rows, format_)


@app.command(epilog="""Example: vitpareto query quick "SELECT status, count(*) AS n FROM trials GROUP BY status\"""")
@_command
def query(
    name: NameArgument,
    statement: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT over trials, attempts, measurements.")],
    storage: StorageOption = STORAGE,
    format_: FormatOption = Format.table,
) -> None:
    """Runs read-only SQL over the ledger; it can read and write nothing else."""
    from orchestrator import query as queries

    ledger, _ = _open(name, storage)
    _rows(queries.sql(ledger, statement), format_)


@app.command(epilog="Example: vitpareto techniques --format json")
@_command
def techniques(format_: FormatOption = Format.table) -> None:
    """Lists the techniques with their parameters, ranges and defaults."""
    from orchestrator.plan import technique_rows

    _write(technique_rows(), format_)


def _rows(table: pa.Table, format_: Format) -> None:
    from orchestrator.rows import format_rows

    format_rows(table, format_.value, sys.stdout)


def _write(rows: list[dict[str, Any]], format_: Format) -> None:
    import pyarrow as pa

    if format_ is Format.json:  # nested values stay as they are
        print(json.dumps(rows, indent=2))
        return
    flat = [{k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()} for row in rows]
    _rows(pa.Table.from_pylist(flat), format_)


# --- clusters ---------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: vitpareto submit study.yaml --address http://127.0.0.1:8265 --storage /shared/results")
@_command
def submit(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="A study file inside --working-dir.")],
    address: AddressOption,
    storage: Annotated[
        str, typer.Option(help="Absolute path every node mounts, or a URL.", envvar="VITPARETO_STORAGE")
    ],
    working_dir: Annotated[Path, typer.Option(help="Folder that is sent: the code and the study.")] = Path(),
    name: Annotated[str | None, typer.Option(help="Name of the study, in place of the file's.")] = None,
    trials: TrialsOption = None,
    time_budget: BudgetOption = None,
    resume_counter: Annotated[
        int | None, typer.Option("--resume", min=0, help="Resume counter; default: the next.")
    ] = None,
) -> None:
    """Sends a study to a Ray cluster as a job; sending it again is answered and runs nothing twice."""
    from orchestrator.submit import submit as send

    options = [("--trials", trials), ("--time-budget", time_budget)]
    arguments = [text for flag, value in options if value is not None for text in (flag, str(value))]
    done = send(
        study,
        address=address,
        storage=storage,
        working_dir=working_dir,
        name=name,
        resume=resume_counter,
        arguments=arguments,
    )
    print(done.submission_id)
    print(f"{done}; follow it with: vitpareto jobs logs {done.submission_id} --address {address}", file=sys.stderr)


JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Submission id, or a study's name for its newest job.")]


@jobs.command("status", epilog="Example: vitpareto jobs status --address http://127.0.0.1:8265")
@_command
def jobs_status(
    address: AddressOption,
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="Submission id or study; none lists all.")] = None,
    format_: FormatOption = Format.table,
) -> None:
    """Says how jobs are."""
    from dataclasses import asdict

    from orchestrator.submit import job_status, list_jobs

    states = list_jobs(address) if job is None else [job_status(job, address)]
    _write([asdict(s) for s in states], format_)


@jobs.command("logs", epilog="Example: vitpareto jobs logs my-study --address http://127.0.0.1:8265")
@_command
def jobs_logs(job: JobArgument, address: AddressOption) -> None:
    """Prints what a job has printed so far."""
    from orchestrator.submit import job_logs

    sys.stdout.write(job_logs(job, address))


@jobs.command("stop", epilog="Example: vitpareto jobs stop my-study --address http://127.0.0.1:8265")
@_command
def jobs_stop(job: JobArgument, address: AddressOption) -> None:
    """Asks a job to end cleanly and waits until it has; the study can be resumed."""
    from orchestrator.submit import job_stop

    state = job_stop(job, address)
    print(f"{state.submission_id} {state.status}")


def main() -> None:
    """Entry point of the ``vitpareto`` command."""
    app()


if __name__ == "__main__":
    main()
