"""The Ray Tune trainable around one proposal: runs its trials, writes each attempt before Tune hears of it.

Everything that must survive is in the ledger by the time ``step`` returns; Tune's own state is never read.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import ray
from ray import tune

from orchestrator.ledger import Ledger, attempt_row
from workers.node.lease import identity
from workers.node.storage import open_storage
from workers.trial import TrialResult, TrialSpec

WATCHDOG_FACTOR = 3.0
"""After so many timeouts a process that does not react is ended from inside: waiting for the lane or for a stage that another
trial runs does not count towards the timeout, and is bounded by that trial's own."""


def run_specs(work: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs the trials of one proposal one after another and writes an attempt file for each.

    Args:
        work: ``specs`` (dicts of TrialSpec), ``optuna`` (state of the proposal or None), ``runner`` (dotted name of the
            function that runs a spec; ``workers.run:run_trial``).

    Returns:
        ``{"trial_id", "status", "metrics"}`` for each spec, in order. Work stops at the first seed that is not ok.
    """
    module, _, name = str(work["runner"]).partition(":")
    runner = getattr(import_module(module), name)
    outcomes: list[dict[str, Any]] = []
    for values in work["specs"]:
        spec = TrialSpec.from_dict(values)
        ledger = Ledger(open_storage(spec.storage), spec.study)
        ledger.mark_running(spec.trial_id, _whereabouts())
        with _Watchdog(spec, ledger, work["optuna"]):
            result: TrialResult = runner(spec)
        ledger.write_attempt(attempt_row(spec, result, work["optuna"]))
        outcomes.append({"trial_id": spec.trial_id, "status": result.status, "metrics": dict(result.metrics)})
        if result.status != "ok":
            break
    return outcomes


def _whereabouts() -> dict[str, Any]:
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else None
    return {**identity(), "node": node, "started_at": time.time()}


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
        self.ledger.write_attempt(attempt_row(self.spec, result, self.optuna))
        os._exit(1)


class TrialTrainable(tune.Trainable):
    """One Tune trial = one proposal = one call of :meth:`step`."""

    def setup(self, config: dict[str, Any]) -> None:
        """Takes the proposal; the heavy imports happen in the first step and stay for the next where actors are reused."""
        self.work = json.loads(config["work"])

    def step(self) -> dict[str, Any]:
        """Runs the proposal to its end."""
        return {"outcomes": json.dumps(run_specs(self.work)), "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next proposal in the same process."""
        self.setup(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: finished stages are in the storage."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""
