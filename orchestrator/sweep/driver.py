"""Runs a study: holds its folder, has its trials run (supervision.py), and ends with the frontier.

What survives is the ledger's: after a crash of the driver another one takes over from there.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.ledger import Ledger, LedgerError
from orchestrator.study.load import StudyRefused, check_measurable, check_same_study
from orchestrator.study.schema import StudyConfig, model_info
from orchestrator.study.space import SearchSpace
from orchestrator.sweep import after_search
from orchestrator.sweep.dashboard import leave_journal
from orchestrator.sweep.frontier_history import write_frontier
from orchestrator.sweep.progress import Progress
from orchestrator.sweep.ray_session import connection
from orchestrator.sweep.state import RUNNER, StudyFailed, Sweep, open_sweep
from orchestrator.sweep.supervision import supervise
from workers.node.lease import Lease, LeaseHeld, acquire, alive
from workers.node.storage import Storage, open_storage
from workers.techniques import versions

__all__ = ["StudyBusy", "StudyFailed", "StudyRun", "remeasure_study", "run_study"]

ORPHANS_S = 20.0
"""Longest wait for the workers of a killed driver; they take about two."""

log = logging.getLogger("vitpareto")


class StudyBusy(Exception):
    """Another live driver runs this study."""


@dataclass(frozen=True)
class StudyRun:
    """How a run of a study ended.

    Attributes:
        folder: path or URL of the results.
        done: trials with an end, of ``budget``.
        failed: failure class to number of trials.
        complete: the budget or the space was used up; False after an interruption or a used-up time budget.
        reason: why it stopped early, "" otherwise.
        hypervolume: of the final frontier, baseline-relative.
    """

    name: str
    folder: str
    done: int
    budget: int
    failed: Mapping[str, int]
    complete: bool
    reason: str
    hypervolume: float | None
    elapsed_s: float


def run_study(
    config: StudyConfig,
    *,
    storage: str | Path = "results",
    address: str | None = None,
    quiet: bool = False,
    runner: str = RUNNER,
) -> StudyRun:
    """Runs a study to the end of its budget, or goes on with one that was interrupted.

    Args:
        config: see :func:`orchestrator.study.load.load_study`.
        storage: folder or fsspec URL that every node sees; the study's folder in it is its name.
        address: of a running Ray (``auto``, ``HEAD:6379``); None starts a local one for the time of the run.
        quiet: no progress on stderr.
        runner: dotted name of what runs a trial; another one is for benchmarks and tests.

    Raises:
        StudyBusy: another live driver runs it.
        StudyFailed: the baseline failed, or the run broke down again and again without a trial ending in between, or
            ``address`` is one of Ray Client.
        StudyRefused: the folder holds a study with another question under the name, an objective cannot be measured, or no
            technique can work on the model.
    """
    if address is not None and address.startswith("ray://"):  # Tune would run elsewhere, without the sweep's state
        raise StudyFailed(
            f"a study cannot be driven through Ray Client ({address}); run it on a node of the cluster with "
            "--address auto, or send it there with `vitpareto submit`"
        )
    store = open_storage(storage)
    context = config.context()
    info = model_info(context)
    check_measurable(config, info)
    if not SearchSpace(config.techniques, info, max_techniques=config.max_techniques).size():
        raise StudyRefused(
            f"study {config.name}: none of its techniques can work on {info.name}; `vitpareto plan` says why"
        )
    with _held(store, config.name) as lease:
        ledger = Ledger(store, config.name, config.parsed_constraints(), context.digest)
        token = _open_folder(ledger, config, context.digest)
        _await_orphans(ledger)
        sweep = open_sweep(config, context, info, ledger, storage_url=store.url, token=token, versions=versions())
        progress = Progress(quiet=quiet)
        with progress:
            try:
                supervise(sweep, lease, address, progress, runner)
            except KeyboardInterrupt:
                sweep.stopping = "interrupted"
        _clear_marks(ledger)
        ledger.compact()
        if sweep.baseline is not None:
            write_frontier(sweep)
        _leave_journal(sweep)
        return _finish(sweep, store.url)


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
        StudyFailed: the machine or cluster lacks what a trial needs.
        StudyRefused: data or checkpoint are not those that the study was run with.
    """
    store, context = open_storage(storage), config.context()
    ledger = Ledger(store, config.name, config.parsed_constraints(), context.digest)
    stored = ledger.study_record() or {}
    if stored.get("context") != context.digest:
        raise StudyRefused(
            f"study {config.name}: the data or the checkpoint has changed since it was run; what would be measured now is "
            "another model"
        )
    with _held(store, config.name), Progress(quiet=quiet) as progress, connection(config, address):
        sweep = open_sweep(
            config,
            context,
            model_info(context),
            ledger,
            storage_url=store.url,
            token=stored["token"],
            versions=versions(),
        )
        spent = after_search.remeasure(sweep, times, progress)
        if spent:
            write_frontier(sweep)
        return spent


@contextmanager
def _held(store: Storage, name: str) -> Iterator[Lease]:
    """Holds the study's lease for the block, in which a termination is an interrupt.

    Raises:
        StudyBusy: another live driver holds it.
    """
    try:
        lease = acquire(store, f"{name}/lease", note={"study": name})
    except LeaseHeld as error:
        raise StudyBusy(
            f"study {name} in {store.url} is being run by process {error.owner.get('pid')} on "
            f"{error.owner.get('host')}; wait for it or stop it, then resume"
        ) from None
    assert lease is not None  # only a waiting acquire returns None
    with lease, _termination_as_interrupt():
        yield lease


def _leave_journal(sweep: Sweep) -> None:
    """Leaves the Optuna study where optuna-dashboard finds it; a failure costs nothing that was found."""
    try:
        leave_journal(sweep.ledger, sweep.proposer)
    except (OSError, LedgerError) as error:
        log.warning("the journal for optuna-dashboard could not be written: %s", error)


def _open_folder(ledger: Ledger, config: StudyConfig, context: str) -> str:
    """Writes the study and its token, or checks that the folder holds the same study; returns the token."""
    stored = ledger.study_record()
    if stored is not None:
        check_same_study(config, stored["config"], ledger.folder)
    token = stored["token"] if stored is not None else secrets.token_hex(8)
    ledger.write_study({"config": config.to_dict(), "token": token, "context": context})
    return token


def _await_orphans(ledger: Ledger) -> None:
    """Waits for workers on this machine that outlived their killed driver: they still write for a second or two."""
    until = time.monotonic() + ORPHANS_S
    while time.monotonic() < until and any(alive(mark) for mark in ledger.running().values()):
        time.sleep(0.2)
    _clear_marks(ledger)


def _clear_marks(ledger: Ledger) -> None:
    for trial in ledger.running():
        ledger.clear_running(trial)


def _finish(sweep: Sweep, url: str) -> StudyRun:
    snapshot = sweep.snapshot()
    if sweep.baseline is None and sweep.stopping and "baseline" in sweep.stopping:
        row = sweep.ledger.trials(columns=["is_baseline", "status", "failure"]).to_pylist()
        why = next((r["failure"] for r in row if r["is_baseline"] and r["failure"]), "")
        raise StudyFailed(f"{sweep.stopping}: {why.splitlines()[0] if why else 'no reason recorded'}")
    complete = sweep.finished and sweep.stopping is None
    if complete:  # an exhausted space is done before its budget is
        sweep.ledger.write_study({**(sweep.ledger.study_record() or {}), "complete": True})
    return StudyRun(
        name=sweep.config.name,
        folder=f"{url}/{sweep.config.name}",
        done=snapshot.done,
        budget=sweep.config.trials,
        failed=dict(snapshot.failed),
        complete=complete,
        reason="" if complete else (sweep.stopping or "interrupted"),
        hypervolume=snapshot.hypervolume,
        elapsed_s=snapshot.elapsed_s,
    )


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a run like Ctrl-C: Tune stops its trials, the ledger is compacted, the frontier written.

    SIGINT gets Python's own handler back: a process started in the background by a shell inherits it as ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT)),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
