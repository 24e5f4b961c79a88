"""The commands for clusters: ``submit`` and ``jobs``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.io import (
    AddressOption,
    BudgetOption,
    Format,
    FormatOption,
    TrialsOption,
    duration_s,
    reported,
    write,
    write_dicts,
)

jobs = typer.Typer(
    help="Jobs that `submit` sent to a Ray cluster.",
    epilog="Example: vitpareto jobs logs my-study --address http://127.0.0.1:8265",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@reported
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
    from orchestrator.cluster.submit import submit as send

    duration_s(time_budget)
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
@reported
def jobs_status(
    address: AddressOption,
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="Submission id or study; none lists all.")] = None,
    format_: FormatOption = Format.table,
) -> None:
    """Says how jobs are."""
    from dataclasses import asdict
    from datetime import UTC, datetime

    from orchestrator.cluster.submit import job_status, list_jobs

    states = list_jobs(address) if job is None else [job_status(job, address)]
    rows = [asdict(s) for s in states]
    for row in rows:
        for name in ("started_at", "ended_at"):
            row[name] = None if row[name] is None else datetime.fromtimestamp(row[name], UTC)
        if format_ is Format.table:
            del row["entrypoint"]
    write_dicts(rows, format_)


@jobs.command("logs", epilog="Example: vitpareto jobs logs my-study --address http://127.0.0.1:8265")
@reported
def jobs_logs(job: JobArgument, address: AddressOption) -> None:
    """Prints what a job has printed so far."""
    from orchestrator.cluster.submit import job_logs

    for line in job_logs(job, address).splitlines():
        write(line)


@jobs.command("stop", epilog="Example: vitpareto jobs stop my-study --address http://127.0.0.1:8265")
@reported
def jobs_stop(job: JobArgument, address: AddressOption) -> None:
    """Asks a job to end cleanly and waits until it has; the study can be resumed."""
    from orchestrator.cluster.submit import job_stop

    state = job_stop(job, address)
    print(f"{state.submission_id} {state.status}")
