"""Strikes: what may happen to a study while it runs, done for real at a moment that a seed chooses, and what is counted then."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from orchestrator.ledger import Ledger
from tests.processes import Study
from workers.node.storage import LocalStorage

HANG_S = 240.0
"""A driver that neither ends nor gets another trial done for so long hangs; a restart of Ray on a busy machine takes a minute."""

RAW = ("Traceback (most recent call last)", "Fatal Python error", "*** SIG", "core dumped", "terminate called")
"""What nobody should have to read."""


@dataclass
class Count:
    """What the strikes did, by name, and what came of it. ``lost``, ``repeated``, ``hung``, ``burnt`` and ``unclear`` name cases."""

    done: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    burnt: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)

    @property
    def faults(self) -> dict[str, list[str]]:
        """What must not be, without what did not happen."""
        named = {name: getattr(self, name) for name in ("lost", "repeated", "hung", "burnt", "unclear")}
        return {name: cases for name, cases in named.items() if cases}


class Struck:
    """A study under strikes. ``disk`` is where its storage really lies, which is mounted at the place that it knows."""

    def __init__(self, study: Study, seed: int, disk: Path | None) -> None:
        self.study, self.chance, self.disk = study, random.Random(seed), disk
        self.count = Count()
        self.process: subprocess.Popen[str] | None = None
        self.log = study.folder / "driver.log"
        self._kept: set[str] = set()

    # --- the study ------------------------------------------------------------------------------------------------------

    def start(self, trials: int) -> None:
        """Starts a driver, or goes on with one, up to so many trials."""
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.study.command("run", str(self.study.file), "--quiet", "--trials", str(trials)),
                env=self.study.env,
                cwd=self.study.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait(self, after: str) -> None:
        """Waits for the driver's end; one that hangs is counted and killed."""
        seen, since = -1, time.monotonic()
        while self.alive:
            time.sleep(0.1)
            with suppress(OSError):
                now = len(self.ended())
                if now != seen:
                    seen, since = now, time.monotonic()
            if time.monotonic() - since > HANG_S:
                self.count.hung.append(f"after {after}: {self.text()[-2000:]}")
                self.tidy()
        self.look(after)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def look(self, after: str) -> None:
        """Looks at what the driver printed and at what the ledger still holds."""
        if any(raw in self.text() for raw in RAW):
            self.count.unclear.append(f"after {after}: {self.text()[-3000:]}")
        with suppress(OSError):
            found = self.ended()
            self.count.lost += [f"{attempt} after {after}" for attempt in sorted(self._kept - found)]
            self._kept = found

    def ended(self) -> set[str]:
        """Returns the attempts that ended well, as a new reader sees them."""
        ledger = Ledger(LocalStorage(self.study.storage.root), self.study.name)
        rows = ledger.attempts(["attempt_id", "status"]).to_pylist()
        return {row["attempt_id"] for row in rows if row["status"] == "ok"}

    def audit(self) -> Count:
        """Judges the ledger at the end: every recipe once, and none that paid for what was not its own."""
        rows = self.study.attempts()
        ok = Counter(row["trial_id"] for row in rows if row["status"] == "ok")
        self.count.repeated += [f"{trial} ended {times} times" for trial, times in ok.items() if times > 1]
        last = {row["trial_id"]: row for row in rows}
        bad = [row for trial, row in last.items() if trial not in ok]
        self.count.burnt += [f"{row['trial_id']}: {row['status']}: {str(row['failure'])[:300]}" for row in bad]
        return self.count

    # --- strikes --------------------------------------------------------------------------------------------------------

    def strike(self, name: str) -> bool:
        """Does the strike; False where it found nothing to strike."""
        done = bool(STRIKES[name](self))
        self.count.done[name] += done
        return done

    def parts(self, *names: str) -> list[psutil.Process]:
        """Returns the processes of the study's Ray whose names begin so, but not its agents unless they are named."""
        agents = set() if names == AGENTS else {p for name in AGENTS for p in self.study.parts(name)}
        return [p for name in names for p in self.study.parts(name) if p not in agents]

    def kill(self, found: list[psutil.Process]) -> bool:
        """Kills one of these processes."""
        for process in self.chance.sample(found, min(1, len(found))):
            with suppress(psutil.Error):
                process.kill()
                return True
        return False

    def driver(self) -> list[psutil.Process]:
        """Returns the process that drives the study, which the one that was started keeps."""
        with suppress(OSError, IndexError, ValueError, psutil.Error):
            found = psutil.Process(self.study.driver())
            return [found] if found in self.study.left() else []
        return []

    def freeze(self, processes: list[psutil.Process], seconds: float) -> bool:
        """Stops processes for a while."""
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                with suppress(psutil.Error):
                    process.send_signal(number)
            if number is signal.SIGSTOP:
                time.sleep(seconds)
        return bool(processes)

    def signal_run(self, number: int) -> bool:
        """Sends a signal to the process that was started, and waits for its end."""
        if self.process is None or not self.alive:
            return False
        self.process.send_signal(number)
        self.wait(signal.Signals(number).name)
        return True

    def kill_run(self, *, group: bool) -> bool:
        if self.process is None or not self.alive:
            return False
        if group:
            self.study.kill(self.process)
        else:
            self.process.kill()
            self.process.wait()
        self.look("a killed run")
        return True

    def tidy(self) -> None:
        """Ends whatever of the study still runs."""
        if self.process is not None:
            self.study.kill(self.process)

    def mounted(self, *command: str) -> bool:
        """Runs a command of mount for the storage's folder; False where this study's lies on no file system of its own."""
        return self.disk is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0

    def full_disk(self) -> bool:
        if self.disk is None:
            return False
        filler = self.disk / "filler"
        with filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"x" * 65536)
        time.sleep(self.chance.uniform(0.5, 3))
        filler.unlink()
        return True

    def read_only(self) -> bool:
        if not self.mounted("mount", "-o", "remount,ro", str(self.disk)):
            return False
        time.sleep(self.chance.uniform(0.5, 3))
        return self.mounted("mount", "-o", "remount,rw", str(self.disk))

    def lost_mount(self) -> bool:
        if not self.mounted("umount", "--lazy", str(self.study.storage.root)):
            return False
        time.sleep(self.chance.uniform(0.5, 3))
        return self.mounted("mount", "--bind", str(self.disk), str(self.study.storage.root))

    def second_driver(self) -> bool:
        """Starts another driver of the study, which must be refused while the first lives."""
        if not self.alive or not self.ended():
            return False
        output = subprocess.run(
            self.study.command("run", str(self.study.file), "--quiet"),
            env=self.study.env,
            cwd=self.study.folder,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )
        said = output.stdout + output.stderr
        if self.alive and (output.returncode == 0 or "is being run by process" not in said):
            self.count.unclear.append(f"a second driver: {output.returncode}, {said[-1000:]}")
        return True

    def rot(self) -> bool:
        """Changes a byte of a file of the newest part of the ledger."""
        newest = sorted(self.files(f"{self.study.name}/ledger/*.parquet"), key=lambda file: file.name.split("-")[1])[
            -2:
        ]
        for file in self.chance.sample(newest, min(1, len(newest))):
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        return bool(newest)

    def files(self, pattern: str) -> list[Path]:
        return sorted(self.study.storage.root.glob(pattern))

    def truncate(self, pattern: str) -> bool:
        """Cuts a file of the storage in half."""
        found = [file for file in self.files(pattern) if file.stat().st_size > 1]
        for file in self.chance.sample(found, min(1, len(found))):
            os.truncate(file, file.stat().st_size // 2)
        return bool(found)

    def lose_stage(self) -> bool:
        """Removes the folder of a stage, as a person may who wants the space."""
        found = self.files("stages/*/manifest.json")
        for file in self.chance.sample(found, min(1, len(found))):
            shutil.rmtree(file.parent, ignore_errors=True)
        return bool(found)

    def foreign(self) -> bool:
        """Leaves files of others in the study's folders."""
        root = self.study.storage.root / self.study.name
        if not root.is_dir():
            return False
        for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
            (folder / "notes.txt").write_text("mine")
            (folder / "notes (copy).json").write_text('["of another type"]')  # no name of a row's file
        return True


AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")

STRIKES: dict[str, Callable[[Struck], bool]] = {
    "run killed": lambda s: s.kill_run(group=False),
    "run and workers killed": lambda s: s.kill_run(group=True),
    "SIGTERM": lambda s: s.signal_run(signal.SIGTERM),
    "SIGINT": lambda s: s.signal_run(signal.SIGINT),
    "SIGHUP": lambda s: s.signal_run(signal.SIGHUP),
    "driver killed": lambda s: s.kill(s.driver()),
    "driver frozen": lambda s: s.freeze(s.driver(), 3),
    "worker killed": lambda s: s.kill(s.parts("ray::")),
    "worker frozen": lambda s: s.freeze(s.parts("ray::"), 2),
    "raylet killed": lambda s: s.kill(s.parts("raylet")),
    "GCS killed": lambda s: s.kill(s.parts("gcs_server")),
    "agent killed": lambda s: s.kill(s.parts(*AGENTS)),
    "disk full": Struck.full_disk,
    "disk read-only": Struck.read_only,
    "mount lost": Struck.lost_mount,
    "second driver": Struck.second_driver,
    "artefact cut": lambda s: s.truncate("stages/*/model.safetensors"),
    "stage lost": Struck.lose_stage,
    "part rotten": Struck.rot,
    "foreign files": Struck.foreign,
}
"""What may happen, by name."""
