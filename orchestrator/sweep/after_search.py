"""What follows the search, under the same Ray: undecided frontier members are measured again, then the report split is told.

Tasks run one at a time where they time something; each task takes the device's lane itself.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc
import ray
from ray.exceptions import RayError

from orchestrator.frontier import query
from orchestrator.sweep import worker_tasks
from orchestrator.sweep.progress import Progress
from orchestrator.sweep.state import Sweep
from orchestrator.sweep.watch import Watch
from workers.metrics import SPEED_OBJECTIVES
from workers.trial import Recipe, TrialSpec

WAIT_S = 1.0
"""Seconds between two looks at a task's result."""

log = logging.getLogger("vitpareto")


# --- measuring again --------------------------------------------------------------------------------------------------


def remeasurable(sweep: Sweep) -> list[str]:
    """Returns the trials whose place on the frontier rests on the noise of a speed, most undecided first."""
    objectives = sweep.config.objectives
    if sweep.baseline is None or not SPEED_OBJECTIVES & objectives.keys():
        return []
    return query.uncertain(sweep.ledger, list(objectives), list(objectives.values()))


def remeasure(
    sweep: Sweep, most: int, progress: Progress, where: Mapping[str, Any] | None = None, watch: Watch | None = None
) -> int:
    """Measures undecided members of the frontier again, the least measured first, and returns how often.

    Args:
        most: measurements to spend; fewer are where the frontier is decided before.
        where: options of Ray for a task that say on which nodes it may run.

    Raises:
        LeaseLost: another driver has taken the study over.
    """
    times: dict[str, int] = {}
    spent = 0
    while spent < most and (undecided := remeasurable(sweep)):
        trial = min(undecided, key=lambda t: times.get(t, 0))  # of equals the first, which is the most undecided
        times[trial] = times.get(trial, 0) + 1
        spent += 1
        _await_lease(sweep)
        progress.note(f"measuring undecided frontier members again, {spent} of at most {most}")
        try:
            _remeasure_one(sweep, trial, where or {}, watch)
        except RayError as error:
            log.warning("%s was not measured again: %s", trial, error)
            if times[trial] > 1:
                break
    return spent


def _remeasure_one(sweep: Sweep, trial: str, where: Mapping[str, Any], watch: Watch | None) -> None:
    rows = sweep.ledger.attempts(["trial_id", "spec", "status", "recipe_hash", "speed_of"])
    ok = {row["trial_id"]: row for row in rows.filter(pc.equal(rows["status"], "ok")).to_pylist()}
    row = ok[trial]
    measured = row["speed_of"] or trial
    spec = replace(TrialSpec.from_dict(json.loads(row["spec"])), storage=sweep.storage_url, storage_token=sweep.token)
    found: list[dict[str, Any]] = _get(_remote(sweep, worker_tasks.measure_again, where).remote(spec.to_dict()), watch)
    if found:
        sweep.ledger.write_remeasurement(measured, ok.get(measured, row)["recipe_hash"], found)


# --- the report split -------------------------------------------------------------------------------------------------


def unreported(sweep: Sweep) -> list[TrialSpec]:
    """Returns the baseline and the frontier's members as far as they were not evaluated on the report split yet."""
    if sweep.baseline is None:
        return []
    objectives = sweep.config.objectives
    members = query.pareto(sweep.ledger, list(objectives), list(objectives.values()))
    recipes = [Recipe.from_json(text) for text in members["recipe"].to_pylist()]
    specs = {s.trial_id: s for s in (sweep.baseline_spec(), *(s for r in recipes if r.steps for s in sweep.specs(r)))}
    reported = sweep.ledger.reported()
    return [s for t, s in specs.items() if t not in reported]


def report_split(
    sweep: Sweep, progress: Progress, where: Mapping[str, Any] | None = None, watch: Watch | None = None
) -> None:
    """Evaluates what is unreported on the report split, once each; the search never sees it. A loss is only logged.

    No more at once than trials: the next one finds the worker of the one before, which has imported what it needs.

    Raises:
        LeaseLost: another driver has taken the study over.
    """
    wanted = unreported(sweep)
    progress.note(f"evaluating {len(wanted)} frontier members on the report split")
    remote = _remote(sweep, worker_tasks.report, where or {})
    together = sweep.config.resources.max_concurrent or max(1, len(wanted))
    for first in range(0, len(wanted), together):
        _await_lease(sweep)
        for spec, found in [(s, remote.remote(s.to_dict())) for s in wanted[first : first + together]]:
            try:
                sweep.ledger.write_report(spec.trial_id, spec.recipe.hash, *_get(found, watch))
            except RayError as error:
                log.warning("%s was not evaluated on the report split; a resume tries again: %s", spec.trial_id, error)


def _get(result: Any, watch: Watch | None) -> Any:
    """Waits for a result, and says while it waits that the driver goes on."""
    while not ray.wait([result], timeout=WAIT_S)[0]:
        if watch is not None:
            watch.turn()
    return ray.get(result)


def _remote(sweep: Sweep, function: Any, where: Mapping[str, Any]) -> Any:
    resources = sweep.config.resources
    return ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, **where)(function)


def _await_lease(sweep: Sweep) -> None:
    """Waits while a successor may be on its way, since this driver cannot renew its lease.

    Raises:
        LeaseLost: it is there.
    """
    while sweep.lease is not None and not sweep.lease.secure:
        if sweep.lease.lost:
            sweep.lease.check()
        time.sleep(1.0)
