"""The command line: one command a file, listed here in the order in which ``vitpareto --help`` shows them.

Exit status: 0 done, 1 the work failed, 2 usage, 130 interrupted. Rows go to stdout, everything else to stderr. Heavy imports stand inside the
commands: those that only read results import neither torch nor ray.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from orchestrator.cli import (
    audit,
    compare,
    export,
    jobs,
    pareto,
    plan,
    query,
    remeasure,
    repair,
    report,
    reproduce,
    run,
    show,
    status,
    techniques,
)
from orchestrator.cli.io import INTERRUPTED, interrupted

COMMANDS: tuple[tuple[Callable[..., None], str], ...] = (
    (plan.plan, "plan quick"),
    (run.run, "run study.yaml --trials 40 --time-budget 30m"),
    (run.resume, "resume quick --trials 64"),
    (status.status, "status quick"),
    (show.show, "show quick 3f2a90c1 --spec > spec.json && python -m workers spec.json"),
    (pareto.pareto, 'pareto quick --objectives top1_pct,size_bytes --budget "top1_pct_drop <= 1"'),
    (compare.compare, "compare quick 3f2a90c1 77b0"),
    (query.query, 'query quick "SELECT status, count(*) AS n FROM trials GROUP BY status"'),
    (techniques.techniques, "techniques --format json"),
    (repair.repair, "repair quick"),
    (remeasure.remeasure, "remeasure quick --times 8"),
    (reproduce.reproduce, "reproduce quick cb8b"),
    (export.export, "export quick cb8b --format onnx exported"),
    (report.report, "report quick -o report.html"),
    (
        audit.audit,
        "audit --table outcomes.parquet --parameters a,b,c --objectives acc:maximize,latency:minimize --known latency "
        "--sampler tpe,random --evaluations 200 --seeds 10 --format json",
    ),
    (jobs.submit, "submit study.yaml --address http://127.0.0.1:8265 --storage /shared/results"),
)
"""Each command, and an example of it."""

app = typer.Typer(
    name="vitpareto",
    help="Searches combinations of vision-transformer compression techniques for the Pareto frontier worth shipping.",
    epilog="Example: vitpareto run quick",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command, example in COMMANDS:
    app.command(epilog=f"Example: vitpareto {example}")(command)
app.add_typer(jobs.jobs, name="jobs")


def main() -> None:
    """Entry point of the ``vitpareto`` command."""
    try:
        app()
    except KeyboardInterrupt:  # before or after the command itself
        sys.exit(interrupted())
    except SystemExit as end:
        if end.code == INTERRUPTED:  # which typer's newer versions leave unsaid
            interrupted()
        raise
