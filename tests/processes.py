"""Drivers as processes of their own, to be killed and counted: what the tests of survival and of faults share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from orchestrator.ledger import Ledger
from workers.node.lease import generations
from workers.node.storage import LocalStorage
from workers.trial import Recipe

HERE = Path(__file__).parent
MARK = "VITPARETO_TEST_STUDY"
"""Variable by which whatever a study's driver starts is told from all else."""


def environment(**more: str) -> dict[str, str]:
    """Returns the environment of a driver: two threads at most, and the technique `fault` on its path."""
    path = os.pathsep.join([str(HERE.parent), str(HERE / "plugins")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def heed_signals() -> None:
    """What `nohup` or a shell's background starts, these tests for one, ignores signals, and so would what is started here."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Study:
    """A study on disk and the processes that drive it."""

    def __init__(self, folder: Path, config: dict[str, Any], **env: str) -> None:
        self.config, self.folder, self.mark = config, folder, uuid.uuid4().hex
        self._hold = folder / "hold"
        self.prefix: list[str] = []
        self.env = environment(**{MARK: self.mark, "VITPARETO_HOLD": str(self._hold), **env})
        self.name = config["name"]
        self.storage = LocalStorage(folder / "results")
        self.ledger = Ledger(self.storage, self.name)
        self.file = folder / "study.yaml"
        self.change()

    def change(self, **changes: Any) -> None:
        """Writes the study's file, with other values for some keys."""
        self.config = {**self.config, **changes}
        self.file.write_text(yaml.safe_dump(self.config))

    def command(self, *arguments: str) -> list[str]:
        """Returns the command line of `vitpareto` with the storage's option."""
        return [*self.prefix, sys.executable, "-m", "orchestrator.cli", *arguments, "--storage", self.storage.url]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts `vitpareto` with the storage's option, as the leader of a process group of its own."""
        return subprocess.Popen(
            self.command(*(arguments or ("run", str(self.file), "--quiet"))),
            env=self.env,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=heed_signals,
        )

    def finish(self, *arguments: str, status: int = 0, wait_s: float | None = None) -> str:
        """Runs `vitpareto` to its end and returns what it printed; pytest's own limit is the only one by default."""
        process = self.start(*arguments)
        try:
            output = process.communicate(timeout=wait_s)[0]
        finally:
            kill_group(process)
        assert process.returncode == status, output
        return output

    def run(self, wait_s: float | None = None) -> str:
        """Runs the study to its end."""
        return self.finish("run", str(self.file), "--quiet", wait_s=wait_s)

    def hold(self, when: str) -> None:
        """Makes workers wait: ``training`` in the middle of one, a number where they wrote that row or a later one."""
        self._hold.write_text(when)

    def held(self) -> list[int]:
        """Returns the processes that have waited since :meth:`hold`."""
        return [int(note.suffix[1:]) for note in self.folder.glob(f"{self._hold.name}.*")]

    def release(self) -> None:
        """Lets those that wait go on."""
        for file in [self._hold, *self.folder.glob(f"{self._hold.name}.*")]:
            file.unlink(missing_ok=True)

    def kill(self, process: subprocess.Popen[str]) -> None:
        """Kills the driver's group and waits until all that it started is gone too: Ray makes groups of its own for that,
        and a worker that is still importing might start a stage later.
        """
        kill_group(process)
        while self.left():
            time.sleep(0.1)

    def _mine(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return bool(process.environ().get(MARK) == self.mark)
        return False

    def parts(self, name: str) -> list[psutil.Process]:
        """Returns the processes of the study's Ray of a name: ``gcs_server``, ``raylet``, ``ray::DashboardAgent``..."""
        found: set[psutil.Process] = set()
        for mine in self.left():
            with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                found |= {p for p in (mine, *mine.children(recursive=True)) if name[:15] == p.name()[: len(name[:15])]}
        return sorted(found, key=lambda process: process.pid)

    def left(self) -> list[psutil.Process]:
        """Returns what still runs of all that the study's drivers started."""
        return [p for p in psutil.process_iter() if self._mine(p)]

    def driver(self) -> int:
        """Returns the process that drives the study, which `vitpareto run` keeps."""
        folder = f"{self.name}/lease"
        newest = [file for file in self.storage.files(folder) if file.removesuffix(".json").isdigit()][-1]
        return int(json.loads(self.storage.read(f"{folder}/{newest}"))["pid"])

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


def until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """Waits until ``condition`` is true and returns its value; the process must not end before."""
    while not (found := condition()):
        assert process.poll() is None, f"ended too early: {process.communicate()[0]}"
        time.sleep(0.02)
    return found


def kill_group(process: subprocess.Popen[str]) -> None:
    """Ends a driver's whole process group with SIGKILL; nothing happens where it is gone."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
