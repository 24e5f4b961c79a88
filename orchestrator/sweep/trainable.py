"""The Ray Tune trainable around one proposal: runs its trials, writes each attempt before Tune hears of it.

Everything that must survive is in the ledger by the time ``step`` returns; Tune's own state is never read.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import ray
from ray import tune

from orchestrator.ledger import Ledger, attempt_row
from orchestrator.ledger.spent import spent
from orchestrator.sweep.batches import BATCH_S
from orchestrator.sweep.worker_failures import blind_words
from workers.node.deadline import waiting_s
from workers.node.identity import identity
from workers.node.storage import open_storage
from workers.node.storage_faults import StorageNotSeen, check_seen, in_a_line, storage_fault
from workers.trial import TrialResult, TrialSpec

WATCHDOG_FACTOR = 3.0
"""After so many timeouts a process that does not react is ended from inside: waiting for the lane or for a stage that another
trial runs does not count towards the timeout, and is bounded by that trial's own."""

MARK_S = 3.0
"""Shortest wait that is told, and seconds between two looks: between chunks of training the lane is waited for all the time."""


def run_works(works: Sequence[Mapping[str, Any]]) -> list[tuple[list[dict[str, Any]], float]]:
    """Runs works one after another, each as :func:`run_specs` does: its attempts are written before the next one starts.

    Returns:
        Outcomes and seconds of each work that was started, in order. None is started after :data:`BATCH_S`, nor after a fault of
        the storage: those are the driver's again.
    """
    found: list[tuple[list[dict[str, Any]], float]] = []
    began = time.monotonic()
    for work in works:
        started = time.monotonic()
        if found and started - began > BATCH_S:
            break
        outcomes = run_specs(work)
        found.append((outcomes, time.monotonic() - started))
        if outcomes and outcomes[-1]["status"] == "storage_fault":
            break
    return found


def run_specs(work: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs the trials of one proposal one after another and writes an attempt file for each.

    Args:
        work: ``specs`` (dicts of TrialSpec), ``optuna`` (state of the proposal or None), ``runner`` (dotted name of the
            function that runs a spec; ``workers.run:run_trial``).

    Returns:
        ``{"trial_id", "status", "metrics"}`` for each spec, in order; where it is stopped also the ``rung``. Work ends at the
        first seed that fails. A fault of the storage also has its ``failure``, and says in ``written`` whether its attempt could be written all the same. Where the
        trial's stages are those of another recipe, ``stages_of`` is that.

    Raises:
        StorageNotSeen: this node does not see the study's storage. Nothing is written: nobody would find it.
    """
    module, _, name = str(work["runner"]).partition(":")
    runner = getattr(import_module(module), name)
    outcomes: list[dict[str, Any]] = []
    for values in work["specs"]:
        spec = TrialSpec.from_dict(values)
        outcome = _run_one(spec, runner, work["optuna"])
        outcomes.append(outcome)
        if outcome["status"] not in ("ok", "stopped"):
            break
    return outcomes


def _run_one(spec: TrialSpec, runner: Callable[[TrialSpec], TrialResult], optuna: Any) -> dict[str, Any]:
    """Runs one trial and writes its attempt; a fault of the storage on the way is its outcome."""
    result: TrialResult | None = None
    try:
        ledger = Ledger(open_storage(spec.storage), spec.study)
        _check_seen(spec)
        with _Mark(spec, ledger), _Watchdog(spec, ledger, optuna):
            result = runner(spec)
        _check_seen(spec)  # a mount may be lost meanwhile
        ledger.write_attempt(attempt_row(spec, result, optuna))
    except OSError as error:  # not the runner's, which returns them
        if not storage_fault(error):
            raise
        first = result.failure if result is not None and result.status == "storage_fault" else None
        failure = first or f"{type(error).__name__}: {in_a_line(error)}"
        return _outcome(spec, "storage_fault", {}) | {"failure": failure, "written": False}
    said: dict[str, Any] = {"spent": spent(result.to_dict())}
    if result.status == "storage_fault":
        said |= {"failure": result.failure, "written": True}
    if result.rung is not None:
        said["rung"] = result.rung
    if "stages_of" in result.conditions:
        said["stages_of"] = result.conditions["stages_of"]
    return _outcome(spec, result.status, result.metrics) | said


def _check_seen(spec: TrialSpec) -> None:
    check_seen(open_storage(spec.storage), spec.study, spec.storage_token)


def _outcome(spec: TrialSpec, status: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    return {"trial_id": spec.trial_id, "status": status, "metrics": dict(metrics)}


def _whereabouts() -> dict[str, Any]:
    return {**identity(), "node": _node(), "started_at": time.time()}


def _node() -> str | None:
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else None


class _Mark:
    """Where a trial runs, and whether it waits: for the lane, or for a stage that another trial runs."""

    def __init__(self, spec: TrialSpec, ledger: Ledger) -> None:
        self._spec, self._ledger, self._whereabouts = spec, ledger, _whereabouts()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="mark", daemon=True)

    def __enter__(self) -> None:
        self._write(waiting=False)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """Ends the thread before the attempt removes the mark."""
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        said = False
        while not self._done.wait(MARK_S):
            waiting = waiting_s() >= MARK_S
            if waiting != said:
                with suppress(OSError):  # the next look tries again
                    self._write(waiting)
                    said = waiting

    def _write(self, waiting: bool) -> None:
        self._ledger.mark_running(self._spec.trial_id, {**self._whereabouts, "waiting": waiting})


class _Watchdog:
    """Ends a process that hangs past its trial's timeout, after writing the ``timeout`` attempt in its name."""

    def __init__(self, spec: TrialSpec, ledger: Ledger, optuna: Mapping[str, Any] | None) -> None:
        self.spec, self.ledger, self.optuna = spec, ledger, optuna
        self.started = time.time()
        self._done = threading.Event()

    def __enter__(self) -> None:
        if self.spec.timeout_s is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        limit = (self.spec.timeout_s or 0.0) * WATCHDOG_FACTOR
        if self._done.wait(limit):
            return
        result = TrialResult(
            trial_id=self.spec.trial_id,
            attempt_id=f"watchdog{int(self.started)}",
            status="timeout",
            failure=f"did not react {limit:.0f} s after it started; its process was ended",
            metrics={},
            started_at=self.started,
            duration_s=time.time() - self.started,
        )
        try:
            self.ledger.write_attempt(attempt_row(self.spec, result, self.optuna))
        finally:  # also where the storage takes nothing: the driver then sees a worker that died
            os._exit(1)


class TrialTrainable(tune.Trainable):
    """One Tune trial = one call of :meth:`step` = one proposal, or several short ones (batches.py)."""

    def setup(self, config: dict[str, Any]) -> None:
        """Takes the proposals; the heavy imports happen in the first step and stay for the next where actors are reused."""
        self.works = json.loads(config["works"])

    def step(self) -> dict[str, Any]:
        """Runs the proposals to their end.

        Raises:
            StorageNotSeen: this node does not see the study's storage; the driver reads which one from the text.
        """
        try:
            return {"outcomes": json.dumps(run_works(self.works)), "done": True}
        except StorageNotSeen as error:
            raise StorageNotSeen(blind_words(str(error), _node())) from None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next proposals in the same process."""
        self.setup(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: finished stages are in the storage."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""
