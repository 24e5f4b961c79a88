"""Commands called in this process or in one of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from orchestrator import cli
from tests.processes import environment


def call(*arguments: str, storage: Path | None = None) -> Result:
    """Runs a command in this process."""
    options = [] if storage is None else ["--storage", str(storage)]
    return CliRunner().invoke(cli.app, [*arguments, *options])


def refused(*arguments: str, storage: Path | None = None, status: int = 2) -> str:
    """Runs a command that must fail with nothing on stdout; returns what it says on stderr, without a traceback."""
    result = call(*arguments, storage=storage)
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    assert "Traceback" not in result.stderr
    return result.stderr


def process(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(),
        timeout=200,
        check=False,
    )
