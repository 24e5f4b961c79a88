"""Runs a study on Ray Tune: builds the Tuner, supervises it, and ends with the frontier.

Tune schedules and notices lost workers; what to run, what came back and what is retried is the sweep's (sweep.py), what
survives is the ledger's. Tune's own experiment state goes to a temporary folder and is never read: after a crash of the Tune
run (Ray's memory monitor can cause one) or of the driver, a new Tuner takes over from the ledger.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import OutOfMemoryError, RayError
from ray.tune.search import Searcher

from orchestrator import finish, query
from orchestrator.config import StudyRefused, check_measurable, check_same_study
from orchestrator.dashboard import leave_journal
from orchestrator.ledger import Ledger, LedgerError
from orchestrator.losses import loss_class, loss_reason, memory_culprit
from orchestrator.progress import Progress
from orchestrator.ray_session import at_once, connection
from orchestrator.space import SearchSpace
from orchestrator.study_schema import StudyConfig, model_info
from orchestrator.sweep import RUNNER, StudyFailed, Sweep, Work, open_sweep
from orchestrator.trainable import TrialTrainable
from workers.lease import Lease, LeaseHeld, LeaseLost, acquire, alive
from workers.storage import Storage, open_storage
from workers.techniques import versions

__all__ = ["StudyBusy", "StudyFailed", "StudyRun", "remeasure_study", "run_study"]

RESTARTS_WITHOUT_PROGRESS = 3
LEASE_CHECK_S = 5.0
ORPHANS_S = 20.0
"""Longest wait for the workers of a killed driver; they take about two."""

COMPACT_ROWS = 64
"""Loose attempts that are worth a compaction while a study runs; at its end all are compacted."""

FRONTIER_S = 5.0
"""Seconds between two snapshots of the frontier while a study runs."""

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
        config: see :func:`orchestrator.config.load_study`.
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
                _supervise(sweep, lease, address, progress, runner)
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
        spent = finish.remeasure(sweep, times, progress)
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


# --- Ray --------------------------------------------------------------------------------------------------------------


def _supervise(sweep: Sweep, lease: Lease, address: str | None, progress: Progress, runner: str) -> None:
    """Runs Tuners until nothing is left; a run that breaks down is followed by another from where the sweep stands.

    A finished sweep ends with what follows the search (finish.py), under the same Ray.
    """
    fruitless, one_at_a_time = 0, False
    while not sweep.finished or (runner == RUNNER and finish.unreported(sweep)):
        before = len(sweep.rows)
        with connection(sweep.config, address):
            together = 1 if one_at_a_time else at_once(sweep.config, address)
            broken = None if sweep.finished else _tune(sweep, lease, progress, runner, together)
            if broken is None:
                if sweep.finished and runner == RUNNER:
                    _after_the_search(sweep, progress)
                return
        one_at_a_time = not _blame(sweep, broken)
        fruitless = 0 if len(sweep.rows) > before else fruitless + 1
        log.warning("the Tune run broke down (%s); going on from the ledger", type(broken).__name__)
        if fruitless >= RESTARTS_WITHOUT_PROGRESS:
            raise StudyFailed(f"the Tune run broke down {fruitless} times without a trial ending: {broken}") from broken


def _after_the_search(sweep: Sweep, progress: Progress) -> None:
    left = sweep.config.remeasurements - len(sweep.ledger.remeasured())
    finish.remeasure(sweep, left, progress)
    finish.report_split(sweep, progress)


def _blame(sweep: Sweep, broken: BaseException) -> bool:
    """After a broken run: marks the trial that ran out of host memory and issues the others again. False: culprit unknown."""
    cause = broken.__cause__ if isinstance(broken.__cause__, OutOfMemoryError) else None
    culprit = memory_culprit(str(cause))
    in_flight = list(sweep.open.values())
    found = False
    for work in in_flight:
        pids = {mark.get("pid") for mark in _whereabouts(sweep, work)}
        if cause is not None and (culprit in pids or (culprit is None and len(in_flight) == 1)):
            found = True
            sweep.lost(work, "host_oom", f"killed by Ray's memory monitor: {cause}")
        else:
            sweep.again(work)
    return found or cause is None


def _whereabouts(sweep: Sweep, work: Work) -> list[dict[str, Any]]:
    """Returns where the trials of ``work`` run, as far as they have started."""
    marks = sweep.ledger.running()
    return [marks[s.trial_id] for s in work.specs if s.trial_id in marks]


def _tune(sweep: Sweep, lease: Lease, progress: Progress, runner: str, at_once: int) -> BaseException | None:
    """One Tuner run; returns what broke it, or None."""
    config = sweep.config
    resources: dict[str, float] = {"cpu": config.resources.cpus, "gpu": config.resources.gpus}
    if config.resources.memory is not None:
        resources["memory"] = config.resources.memory
    searcher = SweepSearcher(sweep, runner)
    supervisor = Supervisor(sweep, searcher, lease, progress)
    with tempfile.TemporaryDirectory(prefix="vitpareto-tune-", ignore_cleanup_errors=True) as folder:
        tuner = tune.Tuner(
            tune.with_resources(TrialTrainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,
                max_concurrent_trials=at_once,
                reuse_actors=config.resources.gpus == 0,
            ),
            run_config=tune.RunConfig(
                name=config.name,
                storage_path=folder,
                callbacks=[supervisor],
                failure_config=tune.FailureConfig(max_failures=0),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except (RayError, tune.TuneError, RuntimeError) as error:
            return error
    return None


class _NotPickled:
    """Tune pickles its parts into a state that is never read here; what they hold stays in this process."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class SweepSearcher(_NotPickled, Searcher):
    """Hands the sweep's work to Tune and takes back what its trials report."""

    def __init__(self, sweep: Sweep, runner: str) -> None:
        super().__init__(metric=None, mode=None)
        self.sweep, self.runner = sweep, runner
        self.works: dict[str, Work] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Returns the next work as a Tune config, None to wait, or FINISHED."""
        work = self.sweep.next_work()
        if work is not None:
            self.works[trial_id] = work
            return {"work": json.dumps(work.to_dict(self.runner))}
        return str(self.FINISHED) if self.sweep.finished else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Takes the outcomes of a trial; a lost one is left to :meth:`Supervisor.on_trial_error`, which knows the cause."""
        if not error and result is not None and "outcomes" in result:
            self.sweep.ended(self.works.pop(trial_id), json.loads(result["outcomes"]))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a sweep is rebuilt from the ledger."""


class Supervisor(_NotPickled, tune.Callback):
    """Classifies lost workers, keeps the lease, shows progress. Never raises into Tune's loop."""

    def __init__(self, sweep: Sweep, searcher: SweepSearcher, lease: Lease, progress: Progress) -> None:
        self.sweep, self.searcher, self.lease, self.progress = sweep, searcher, lease, progress
        self._checked = self._drawn = time.monotonic()
        self._rows = 0

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker is gone (a trial itself never raises): records why and lets the sweep decide about a retry."""
        work = self.searcher.works.pop(trial.trial_id, None)
        if work is None:
            return
        reason = loss_reason(trial)
        self.sweep.lost(work, loss_class(reason, _whereabouts(self.sweep, work)), reason)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Every turn of Tune's loop."""
        now = time.monotonic()
        if now - self._checked > LEASE_CHECK_S:
            self._checked = now
            try:
                self.lease.check()
            except LeaseLost as error:
                self.sweep.stopping = str(error)
        self.progress.show(self.sweep)
        if now - self._drawn > FRONTIER_S and len(self.sweep.rows) != self._rows and self.sweep.baseline is not None:
            self._drawn, self._rows = now, len(self.sweep.rows)
            try:
                write_frontier(self.sweep)
            except (OSError, LedgerError) as error:
                log.warning("the frontier could not be written, the next one will be: %s", error)


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


# --- the end ----------------------------------------------------------------------------------------------------------


def write_frontier(sweep: Sweep) -> None:
    """Adds a snapshot of the frontier of the rows so far to its history."""
    objectives = sweep.config.objectives
    members = query.pareto(sweep.ledger, list(objectives), list(objectives.values()))
    sweep.ledger.write_frontier(
        members,
        sweep.hypervolume(),
        len(sweep.rows),
        objectives=list(objectives),
        reference=list(sweep.reference()),
        context=sweep.context.digest,
    )
    sweep.ledger.compact(min_rows=COMPACT_ROWS)
