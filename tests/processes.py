"""Drivers as processes of their own, to be killed and counted: what the tests of survival and of faults share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from orchestrator.ledger import Ledger
from workers.lease import generations
from workers.protocol import Recipe
from workers.storage import LocalStorage

HERE = Path(__file__).parent
WAIT_S = 120.0


def environment(**more: str) -> dict[str, str]:
    """Returns the environment of a driver: two threads at most, and the technique `fault` on its path."""
    path = os.pathsep.join([str(HERE.parent), str(HERE / "plugins")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


class Study:
    """A study on disk and the processes that drive it."""

    def __init__(self, folder: Path, config: dict[str, Any], **env: str) -> None:
        self.config, self.folder, self.env = config, folder, environment(**env)
        self.name = config["name"]
        self.storage = LocalStorage(folder / "results")
        self.ledger = Ledger(self.storage, self.name)
        self.file = folder / "study.yaml"
        self.file.write_text(yaml.safe_dump(config))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts `vitpareto` with the storage's option, as the leader of a process group of its own."""
        command = [sys.executable, "-m", "orchestrator.cli", *(arguments or ("run", str(self.file), "--quiet"))]
        return subprocess.Popen(
            [*command, "--storage", self.storage.url],
            env=self.env,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, *arguments: str, status: int = 0, wait_s: float = WAIT_S) -> str:
        """Runs `vitpareto` to its end and returns what it printed."""
        process = self.start(*arguments)
        try:
            output = process.communicate(timeout=wait_s)[0]
        finally:
            kill_group(process)
        assert process.returncode == status, output
        return output

    def run(self, wait_s: float = WAIT_S) -> str:
        """Runs the study to its end."""
        return self.finish("run", str(self.file), "--quiet", wait_s=wait_s)

    def attempts(self) -> list[dict[str, Any]]:
        """Returns every attempt in the ledger, by start."""
        rows = self.ledger.attempts().to_pylist()
        return sorted(rows, key=lambda r: r["started_at"])

    def kinds(self) -> dict[str, list[str]]:
        """Returns the statuses of the attempts at each kind of fault, by start."""
        found: dict[str, list[str]] = {}
        for row in self.attempts():
            steps = Recipe.from_json(row["recipe"]).steps
            found.setdefault(str(steps[0].config["kind"]) if steps else "baseline", []).append(row["status"])
        return found

    def executions(self) -> dict[str, int]:
        """Returns stage key to how often the stage was started."""
        keys = self.storage.folders("stages")
        return {key: generations(self.storage, f"stages/{key}/leases") for key in keys}

    def completed(self) -> set[str]:
        """Returns the keys of the stages whose artefact is there."""
        return {key for key in self.storage.folders("stages") if self.storage.exists(f"stages/{key}/manifest.json")}

    def marks(self) -> dict[str, dict[str, Any]]:
        """Returns where trials run right now."""
        return self.ledger.running()

    def asks(self) -> list[dict[str, Any]]:
        """Returns what the driver handed out."""
        stored = json.loads(self.storage.read(f"{self.name}/study.json"))
        return self.ledger.asks(stored["context"])


def until(condition: Callable[[], Any], process: subprocess.Popen[str], wait_s: float = WAIT_S) -> Any:
    """Waits until ``condition`` is true and returns its value; the process must not end before."""
    deadline = time.monotonic() + wait_s
    while not (found := condition()):
        assert process.poll() is None, f"ended too early: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    return found


def kill_group(process: subprocess.Popen[str]) -> None:
    """Ends a driver's whole process group with SIGKILL; nothing happens where it is gone."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
