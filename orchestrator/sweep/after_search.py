"""What follows the search, under the same Ray: undecided frontier members are measured again, then the report split is told.

Tasks run one at a time where they time something; each task takes the device's lane itself.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pyarrow.compute as pc
import ray
from ray.exceptions import RayError

from orchestrator.frontier import query
from orchestrator.sweep.progress import Progress
from orchestrator.sweep.state import Sweep
from workers.metrics import SPEED_OBJECTIVES
from workers.run import run_remeasure, run_report
from workers.trial import Recipe, TrialSpec

log = logging.getLogger("vitpareto")


# --- measuring again --------------------------------------------------------------------------------------------------


def remeasurable(sweep: Sweep) -> list[str]:
    """Returns the trials whose place on the frontier rests on the noise of a speed, most undecided first."""
    objectives = sweep.config.objectives
    if sweep.baseline is None or not SPEED_OBJECTIVES & objectives.keys():
        return []
    return query.uncertain(sweep.ledger, list(objectives), list(objectives.values()))


def remeasure(sweep: Sweep, most: int, progress: Progress) -> int:
    """Measures undecided members of the frontier again, the least measured first, and returns how often.

    Args:
        most: measurements to spend; fewer are where the frontier is decided before.
    """
    times: dict[str, int] = {}
    spent = 0
    while spent < most and (undecided := remeasurable(sweep)):
        trial = min(undecided, key=lambda t: times.get(t, 0))  # of equals the first, which is the most undecided
        times[trial] = times.get(trial, 0) + 1
        spent += 1
        progress.note(f"measuring undecided frontier members again, {spent} of at most {most}")
        try:
            _remeasure_one(sweep, trial)
        except RayError as error:
            log.warning("%s was not measured again: %s", trial, error)
            if times[trial] > 1:
                break
    return spent


def _remeasure_one(sweep: Sweep, trial: str) -> None:
    rows = sweep.ledger.attempts(["trial_id", "spec", "status", "recipe_hash"])
    row = rows.filter(pc.and_(pc.equal(rows["trial_id"], trial), pc.equal(rows["status"], "ok"))).to_pylist()[0]
    spec = replace(TrialSpec.from_dict(json.loads(row["spec"])), storage=sweep.storage_url, storage_token=sweep.token)
    found: list[dict[str, Any]] = ray.get(_remote(sweep, _measure_again).remote(spec.to_dict()))
    if found:
        sweep.ledger.write_remeasurement(trial, row["recipe_hash"], found)


def _measure_again(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [asdict(found) for found in run_remeasure(TrialSpec.from_dict(values))]


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


def report_split(sweep: Sweep, progress: Progress) -> None:
    """Evaluates what is unreported on the report split, once each; the search never sees it. A loss is only logged."""
    wanted = unreported(sweep)
    progress.note(f"evaluating {len(wanted)} frontier members on the report split")
    remote = _remote(sweep, _report)
    for spec, found in [(s, remote.remote(s.to_dict())) for s in wanted]:
        try:
            sweep.ledger.write_report(spec.trial_id, spec.recipe.hash, *ray.get(found))
        except RayError as error:
            log.warning("%s was not evaluated on the report split; a resume tries again: %s", spec.trial_id, error)


def _report(values: dict[str, Any]) -> list[Mapping[str, Any]]:
    return [asdict(found) for found in run_report(TrialSpec.from_dict(values))]


def _remote(sweep: Sweep, function: Any) -> Any:
    resources = sweep.config.resources
    return ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus)(function)
