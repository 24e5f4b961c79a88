"""Ray Tune: builds Tuners and supervises them until a sweep has nothing left to run.

Tune schedules and notices lost workers; what to run, what came back and what is retried is the sweep's (state.py). Tune's own
experiment state goes to a temporary folder and is never read: after a crash of the Tune run (Ray's memory monitor can cause one)
a new Tuner takes over from the ledger.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ray import tune
from ray.exceptions import OutOfMemoryError, RayError
from ray.tune.search import Searcher

from orchestrator.ledger import LedgerError
from orchestrator.sweep import after_search
from orchestrator.sweep.batches import MOST, Batches, take_back, take_loss
from orchestrator.sweep.frontier_history import FrontierHistory
from orchestrator.sweep.lease_watch import LeaseWatch
from orchestrator.sweep.nodes import Nodes, request
from orchestrator.sweep.outcome import StudyFailed
from orchestrator.sweep.progress import Progress
from orchestrator.sweep.ray_session import at_once, connection, own_node
from orchestrator.sweep.state import RUNNER, Sweep
from orchestrator.sweep.trainable import TrialTrainable
from orchestrator.sweep.watch import Watch
from orchestrator.sweep.work import Work
from orchestrator.sweep.worker_failures import blind_node, loss_class, loss_reason, memory_culprit
from workers.node.lease import Lease

RESTARTS_WITHOUT_PROGRESS = 3

LOOK_S = 5.0
"""Seconds between two looks at Ray and at which trials wait."""

log = logging.getLogger("vitpareto")


def supervise(
    sweep: Sweep, lease: Lease, address: str | None, progress: Progress, runner: str, watch: Watch | None
) -> None:
    """Runs Tuners until nothing is left; a run that breaks down is followed by another from where the sweep stands.

    A finished sweep ends with what follows the search (after_search.py), under the same Ray.
    """
    fruitless, one_at_a_time, nodes = 0, False, Nodes(sweep)
    while not sweep.finished or (runner == RUNNER and not sweep.paused and after_search.unreported(sweep)):
        before = sweep.ended_works
        with connection(sweep.config, address, watch):
            if address is not None:  # a local Ray is on this machine alone
                nodes.ask_all()
            together = 1 if one_at_a_time else at_once(sweep.config, address)
            batches = Batches(1 if one_at_a_time or sweep.config.resources.gpus else MOST)
            searcher = SweepSearcher(sweep, runner, nodes, batches)
            broken = None if sweep.finished else _tune(searcher, lease, progress, together, watch)
            if broken is None:
                if sweep.finished and runner == RUNNER and not sweep.paused:
                    _after_the_search(sweep, progress, nodes, watch)
                return
        one_at_a_time = not _blame(sweep, broken)
        fruitless = 0 if sweep.ended_works > before else fruitless + 1
        log.warning("the Tune run broke down (%s); going on from the ledger", type(broken).__name__)
        if fruitless >= RESTARTS_WITHOUT_PROGRESS:
            raise StudyFailed(f"the Tune run broke down {fruitless} times without a trial ending: {broken}") from broken


def _after_the_search(sweep: Sweep, progress: Progress, nodes: Nodes, watch: Watch | None) -> None:
    left = sweep.config.remeasurements - len(sweep.ledger.remeasured())
    after_search.remeasure(sweep, left, progress, nodes.options(), watch)
    after_search.report_split(sweep, progress, nodes.options(), watch)


def _blame(sweep: Sweep, broken: BaseException) -> bool:
    """After a broken run: marks the trial that ran out of host memory and issues the others again. False: culprit unknown."""
    cause = broken.__cause__ if isinstance(broken.__cause__, OutOfMemoryError) else None
    culprit = memory_culprit(str(cause))
    in_flight = list(sweep.open.values())
    found = False
    marks = _marks(sweep)
    for work in in_flight:
        pids = {mark.get("pid") for mark in _of(work, marks)}
        if cause is not None and (culprit in pids or (culprit is None and len(in_flight) == 1)):
            found = True
            sweep.lost(work, "host_oom", f"killed by Ray's memory monitor: {cause}")
        else:
            sweep.again(work)
    return found or cause is None


def _marks(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Returns where trials run, as far as they have started."""
    try:
        return sweep.ledger.running()
    except OSError:  # no mark can be read; the sweep meets the same and pauses
        return {}


def _of(work: Work, marks: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [marks[s.trial_id] for s in work.specs if s.trial_id in marks]


def _tune(
    searcher: SweepSearcher, lease: Lease, progress: Progress, at_once: int, watch: Watch | None
) -> BaseException | None:
    """One Tuner run; returns what broke it, or None."""
    sweep, nodes = searcher.sweep, searcher.nodes
    config = sweep.config
    resources: dict[str, float] = {"CPU": config.resources.cpus, "GPU": config.resources.gpus}
    if config.resources.memory is not None:
        resources["memory"] = config.resources.memory
    supervisor = Supervisor(sweep, searcher, LeaseWatch(sweep, lease), progress, nodes, watch)
    with tempfile.TemporaryDirectory(prefix="vitpareto-tune-", ignore_cleanup_errors=True) as folder:
        tuner = tune.Tuner(
            tune.with_resources(TrialTrainable, lambda trial: request(resources, trial["blind"])),
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

    def __init__(self, sweep: Sweep, runner: str, nodes: Nodes, batches: Batches) -> None:
        super().__init__(metric=None, mode=None)
        self.sweep, self.runner, self.nodes, self.batches = sweep, runner, nodes, batches
        self.works: dict[str, list[Work]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Returns the next works as a Tune config, None to wait, or FINISHED."""
        works: list[Work] = []
        size = self.batches.size(len(self.sweep.rows))
        while len(works) < size and (work := self.sweep.next_work()) is not None:
            works.append(work)
        if works:
            self.works[trial_id] = works
            return {
                "works": json.dumps([work.to_dict(self.runner) for work in works]),
                "blind": sorted(self.nodes.blind),
            }
        return str(self.FINISHED) if self.sweep.finished else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Takes the outcomes of a trial; a lost one is left to :meth:`Supervisor.on_trial_error`, which knows the cause."""
        if not error and result is not None and "outcomes" in result:
            found = json.loads(result["outcomes"])
            self.batches.note([seconds for _, seconds in found])
            take_back(self.sweep, self.works.pop(trial_id), [outcomes for outcomes, _ in found])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a sweep is rebuilt from the ledger."""


class Supervisor(_NotPickled, tune.Callback):
    """Classifies lost workers, keeps the lease, shows progress. Never raises into Tune's loop."""

    def __init__(
        self,
        sweep: Sweep,
        searcher: SweepSearcher,
        lease: LeaseWatch,
        progress: Progress,
        nodes: Nodes,
        watch: Watch | None,
    ) -> None:
        self.sweep, self.searcher, self.progress, self.nodes, self.watch = sweep, searcher, progress, nodes, watch
        self.lease = lease
        self.history = FrontierHistory(sweep)
        self._looked = time.monotonic()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker is gone (a trial itself never raises): records why and lets the sweep decide about a retry."""
        works = self.searcher.works.pop(trial.trial_id, None)
        if works is None:
            return
        reason, marks = loss_reason(trial), _marks(self.sweep)
        blind = blind_node(reason)
        if blind is None:
            kind = loss_class(reason, [mark for work in works for mark in _of(work, marks)])
        elif blind[0] in trial.config["blind"]:  # Ray put it there all the same
            kind = "storage_fault"
        else:
            self.nodes.leave_out(*blind)
            for work in works:
                self.sweep.again(work)
            return
        take_loss(self.sweep, works, kind, reason, marks)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Every turn of Tune's loop."""
        if self.watch is not None:
            self.watch.turn()
        secure = self.lease.turn()
        self.nodes.look()
        if time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            self._look()
        self.progress.show(self.sweep)
        if not secure:
            return
        try:
            self.history.turn()
        except (OSError, LedgerError) as error:
            log.warning("the frontier could not be written, the next one will be: %s", error)

    def _look(self) -> None:
        """Every few seconds: whether Ray still counts on this node, and which trials wait."""
        if self.watch is not None:
            node = own_node()
            if node is None or not node["Alive"]:  # a raylet that is stopped, say, still has its port
                self.watch.lose("its GCS counts this node as dead")
        with suppress(OSError):  # only what is shown
            self.sweep.waiting = self.sweep.ledger.waiting()
