"""Runs and keeps a driver: it works in a process of its own (driver_process.py), and is replaced where it breaks down.

A dead GCS leaves the driver waiting inside Ray, beyond the reach of exceptions and signals, until Ray ends the process. What can
be counted on is the end of a process, and the ledger: so the driver is ended, with every process of a local Ray, and another one
goes on from the ledger. Signals come here; the driver is given some seconds to wind down, and is ended after that.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.ledger import Ledger
from orchestrator.ledger.stopped import STOPPED
from orchestrator.study.load import StudyRefused
from orchestrator.study.schema import StudyConfig
from orchestrator.sweep.driver_process import raised, start_code
from orchestrator.sweep.marked import MARK, end_marked
from orchestrator.sweep.outcome import Interrupted, StudyFailed, StudyRun
from orchestrator.sweep.signals import leave_terminal, taken
from workers.node.storage import open_storage
from workers.trial import INFRASTRUCTURE

WIND_DOWN_S = 12.0
"""What trials in flight, Tune and Ray get to end in after a signal. A pre-emption leaves 30 s between its notice and the end; to
write the frontier in the driver's place takes some ten."""

LOOK_S = 0.5
"""Seconds between two looks at the clock while the driver says nothing."""

SAVE_S = 30.0
"""Once a driver has been saving for so long, a signal ends it: the storage may hang."""

EXIT_S = 5.0
"""What a driver that has said how it ended gets to be gone in."""

LOSSES_WITHOUT_PROGRESS = 3

RUNNER = "workers.run:run_trial"
"""Dotted name of what runs a trial."""

HANGUP = getattr(signal, "SIGHUP", None)

log = logging.getLogger("vitpareto")


def run_study(
    config: StudyConfig,
    *,
    storage: str | Path = "results",
    address: str | None = None,
    quiet: bool = False,
    runner: str = RUNNER,
    retry: Collection[str] = (),
    finish: Collection[str] = (),
) -> StudyRun:
    """Runs a study to the end of its budget, or goes on with one that was interrupted.

    The driver works in a process of its own. Where a local Ray is lost, another one is started and the study goes on from its
    ledger; where the Ray of ``address`` is lost, the run ends and says so. SIGINT, SIGTERM and SIGHUP end the run early, and a
    second one at once; called from another thread than the main one, signals are the caller's matter.

    Args:
        config: see :func:`orchestrator.study.load.load_study`.
        storage: folder or URL of an object store that every node sees; the study's folder in it is its name.
        address: of a running Ray (``auto``, ``HEAD:6379``); None starts a local one for the time of the run.
        quiet: no progress on stderr.
        runner: dotted name of what runs a trial; another one is for benchmarks and tests.
        retry: failure classes whose recipes are asked again, as those of infrastructure failures always are.
        finish: ids of trials that stand at a rung and are to be brought to their end, with the other seeds of their recipes.

    Raises:
        StudyBusy: another live driver runs it.
        StudyFailed: the baseline failed, or the run broke down again and again without a trial ending in between, or
            ``address`` is one of Ray Client.
        StudyRefused: the folder holds a study with another question under the name, an objective cannot be measured, no
            technique can work on the model, or a trial of ``finish`` does not stand at a rung.
        Interrupted: a signal came before there was anything to save.
    """
    storage = open_storage(storage).url
    ledger = Ledger(open_storage(storage), config.name)
    check_finish(ledger, finish)
    keeper = _Keeper(config, {"storage": storage, "address": address, "quiet": quiet})
    started, fruitless = time.monotonic(), 0
    with taken(keeper.signalled):
        more: dict[str, Any] = {"runner": runner, "retry": list(retry), "finish": list(finish)}
        while True:
            before = _ended(ledger)
            done = keeper.drive("run_study", more)
            if done is not None:
                run = StudyRun(**done)
                return replace(run, signal=keeper.signal or run.signal)
            if "ended" in more:
                raise StudyFailed(
                    f"what was found is in the ledger, but its frontier could not be written: {keeper.loss}"
                )
            if keeper.signal is not None and not keeper.holds:
                raise Interrupted(keeper.signal)
            fruitless = 0 if _ended(ledger) > before else fruitless + 1
            more["spent_s"] = time.monotonic() - started
            if keeper.signal is not None:
                more["ended"] = "interrupted"
            elif address is not None and keeper.ray_lost:
                more["ended"] = f"{keeper.loss}; it is not this run's to start again"
            elif fruitless >= LOSSES_WITHOUT_PROGRESS:
                more["ended"] = f"{keeper.loss}; {fruitless} times without a trial ending in between"
            else:
                log.warning("%s; another one goes on from the ledger", keeper.loss)


def remeasure_study(
    config: StudyConfig,
    *,
    times: int,
    storage: str | Path = "results",
    address: str | None = None,
    quiet: bool = False,
) -> int:
    """Measures frontier members whose place rests on noise again, and returns how often it did.

    Args:
        config: as the study's folder holds it; storage, address, quiet: see :func:`run_study`.
        times: most measurements; fewer where the frontier is decided before.

    Raises:
        StudyBusy: another live driver runs it.
        StudyFailed: the machine or cluster lacks what a trial needs, or Ray was lost.
        StudyRefused: data or checkpoint are not those that the study was run with.
        Interrupted: a signal came; what was measured is kept.
    """
    keeper = _Keeper(config, {"storage": open_storage(storage).url, "address": address, "quiet": quiet})
    with taken(keeper.signalled):
        spent = keeper.drive("remeasure_study", {"times": times})
    if spent is not None:
        return int(spent)
    if keeper.signal is not None:
        raise Interrupted(keeper.signal)
    raise StudyFailed(f"{keeper.loss}; what was measured is kept, the same command goes on")


def check_finish(ledger: Ledger, trials: Collection[str]) -> None:
    """Checks that trials stand at a rung, or are at their end already.

    Raises:
        StudyRefused: one is unknown or has failed.
    """
    if not trials:
        return
    rows = ledger.trials(["trial_id", "status"]).to_pylist()
    known = {row["trial_id"]: row["status"] for row in rows}
    bad = {trial: known.get(trial, "no trial of the study") for trial in trials}
    bad = {trial: said for trial, said in bad.items() if said not in ("ok", STOPPED, *INFRASTRUCTURE)}
    if bad:
        said = ", ".join(f"{trial} is {status}" for trial, status in bad.items())
        there = ", ".join(trial for trial, status in known.items() if status == STOPPED) or "none"
        raise StudyRefused(
            f"finish: must be trials that stand at a rung; {said}; of study {ledger.study} there stand: {there}"
        )


def _ended(ledger: Ledger) -> int:
    """Returns how many attempts have an end that is theirs, not the infrastructure's: at a rung, too, a trial came further."""
    try:
        return sum(status not in INFRASTRUCTURE for status in ledger.attempts(["status"])["status"].to_pylist())
    except OSError:  # the driver says what is wrong with the storage
        return 0


@dataclass
class _Keeper:
    """One driver after another.

    Attributes:
        signal: number of the first signal that came.
        holds: a driver has taken the study, so that there may be something to save.
        loss: why the last driver ended without a result; ``ray_lost`` where the cluster was why.
    """

    config: StudyConfig
    arguments: Mapping[str, Any]
    signal: int | None = None
    holds: bool = False
    loss: str = ""
    ray_lost: bool = False
    _mark: str = field(default_factory=lambda: secrets.token_hex(8))
    _process: subprocess.Popen[bytes] | None = None
    _ready: bool = False
    _saves_since: float | None = None
    _until: float | None = None

    def signalled(self, number: int, frame: object) -> None:
        """Takes a signal: the first winds the driver down, the second ends it, and neither breaks off what is being saved."""
        if number == HANGUP:
            leave_terminal()
        now = time.monotonic()
        first, self.signal = self.signal is None, self.signal or number
        if self._saves_since is not None:
            self._until = now if now - self._saves_since > SAVE_S else None
        elif first:
            self._until = now + WIND_DOWN_S
            self._wind_down()
        else:
            self._until = now

    def _wind_down(self) -> None:
        if self._process is not None and self._ready:
            # Ray takes SIGTERM for itself while it starts; SIGHUP tells the driver that its terminal is gone
            self._process.send_signal(signal.SIGHUP if self.signal == HANGUP else signal.SIGINT)

    def drive(self, call: str, more: Mapping[str, Any]) -> Any:
        """Runs one driver to its end and ends what is left of its Ray; returns its result, or None where it has none.

        Raises:
            Exception: what the driver raised.
        """
        now = time.monotonic()
        self._ready, self._saves_since = False, now if "ended" in more else None
        self._until = now + WIND_DOWN_S if self.signal is not None and self._saves_since is None else None
        ours, its = os.pipe()
        request = {"file": its, "path": sys.path, "call": call, "config": self.config.to_dict()}
        request["arguments"] = {**self.arguments, **more}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", start_code()],
                stdin=subprocess.PIPE,
                stdout=2,  # what Ray prints is no result of the command
                env={**os.environ, MARK: self._mark},
                pass_fds=[its],
                start_new_session=True,  # so that a terminal's Ctrl-C comes here alone, and is passed on once
            )
        finally:
            os.close(its)
        ended: dict[str, Any] = {}
        with os.fdopen(ours, "rb", buffering=0) as answers, self._process as process:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                ended = self._listen(answers.fileno())
            except BrokenPipeError:
                pass
            finally:
                status = _end(process, 0.0 if self._overdue() else EXIT_S)
                if not ended and sys.stderr.isatty():  # what draws on a terminal hides the cursor
                    sys.stderr.write("\x1b[?25h")
                self._process = None
                end_marked(self._mark)
        return self._result(ended, status)

    def _listen(self, answers: int) -> dict[str, Any]:
        """Returns the driver's last word; an empty one where it must be ended."""
        text = b""
        while True:
            if self._overdue():
                return {}
            if not select.select([answers], [], [], LOOK_S)[0]:
                continue
            part = os.read(answers, 1 << 16)
            if not part:
                return {}
            *lines, text = (text + part).split(b"\n")
            for record in map(json.loads, lines):
                if record.keys() & {"value", "error", "interrupted", "lost"}:
                    return dict(record)
                self._note(record["at"])

    def _overdue(self) -> bool:
        return self._until is not None and time.monotonic() > self._until

    def _note(self, phase: str) -> None:
        """Takes what the driver is at: ``ready`` for signals, ``holds`` the study, ``saves`` what was found."""
        self._ready = True
        self.holds = self.holds or phase == "holds"
        if phase == "saves":
            self._saves_since, self._until = time.monotonic(), None
        elif phase == "ready" and self.signal is not None and self._saves_since is None:
            self._wind_down()

    def _result(self, ended: Mapping[str, Any], status: int) -> Any:
        if "error" in ended:
            raise raised(ended["error"])
        if "interrupted" in ended:
            self.signal = self.signal or int(ended["interrupted"])
        self.ray_lost = "lost" in ended
        self.loss = f"Ray is lost: {ended['lost']}" if self.ray_lost else f"the driver's process {_describe(status)}"
        return ended.get("value")


def _end(process: subprocess.Popen[bytes], wait_s: float) -> int:
    """Ends a process that does not end by itself, and returns its status."""
    try:
        return process.wait(wait_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _describe(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by {signal.Signals(-status).name}"
