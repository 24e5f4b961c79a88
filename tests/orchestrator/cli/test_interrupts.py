"""Ctrl-C on commands that only read: one line and the exit status that shells have for it, wherever it comes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.orchestrator.test_old_results import NAME, WRITTEN
from tests.processes import environment, heed_signals

STATUSES = (130, -signal.SIGINT)
"""A shell calls both 130: CPython ends by the signal where that came inside ``eval``, which typing uses."""

ENDLESS = "select count(*) from range(100000000000) a, range(1000) b"


@pytest.mark.parametrize(
    ("arguments", "library"),
    [
        (("query", NAME, ENDLESS), "duckdb"),
        (("query", NAME, "select 1"), "pyarrow"),
        (("pareto", NAME, "--where", "(select count(*) from range(100000000000) a, range(1000) b) > 0"), "duckdb"),
        (("plan", "quick"), "libtorch"),
    ],
)
def test_a_command_that_is_interrupted_says_so(arguments: tuple[str, ...], library: str, tmp_path: Path) -> None:
    """Interrupted once it has loaded what takes its time: sooner or later in that, as it happens."""
    command = [sys.executable, "-m", "orchestrator.cli", *arguments, "--storage", str(WRITTEN)]
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )
    maps = Path(f"/proc/{running.pid}/maps")
    while running.poll() is None and library not in maps.read_text():
        time.sleep(0.01)
    time.sleep(0.3 if ENDLESS in arguments[-1] or "--where" in arguments else 0)
    running.send_signal(signal.SIGINT)
    said, errors = running.communicate(timeout=100)
    assert "Traceback" not in errors
    if arguments[-1] == "select 1" and running.returncode == 0:
        return  # it had answered before
    assert errors.splitlines()[-1:] == ["vitpareto: interrupted"], said
    assert running.returncode in STATUSES
