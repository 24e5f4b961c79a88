"""The cache of stages: each one's artefact lies in ``stages/<key>/`` of the storage and is made once, on any node.

A lease per stage makes two trials that want it at the same time run it once; its generation files count the executions.
A stage that fails leaves no manifest, so failures are never cached.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from workers import artefact
from workers.node.lease import Lease, LeaseLost, acquire
from workers.stages.equal import standing_for
from workers.stages.graph import Stage, compile_recipe, prefix
from workers.stages.runners import RUNNERS, RecoveryPaused
from workers.stages.workbench import Workbench
from workers.training.loop import TrainingReport
from workers.trial import Recipe, StageRun

log = logging.getLogger("vitpareto")


def ensure_recipe(
    bench: Workbench, recipe: Recipe, note: Callable[[StageRun], object] = lambda run: None
) -> tuple[Recipe, tuple[Stage, ...]]:
    """Makes sure that all stages of ``recipe`` are in the storage.

    Args:
        note: is told of each stage.

    Returns:
        The recipe that the stages belong to, and its stages: an earlier one where that makes the same (:mod:`workers.stages.equal`).

    Raises:
        Infeasible: the recipe cannot be built on this model and device.
        RecoveryPaused: its training stands where the bench's ``until`` says.
    """
    stages = compile_recipe(recipe, bench.seed, bench.context)
    cut = next((i for i, stage in enumerate(stages, 1) if stage.kind == "surgery"), len(stages))
    for stage in stages[:cut]:
        note(ensure(bench, stage))
    first = standing_for(bench, recipe, stages)
    if first != recipe:  # its surgery too: it may have been damaged since
        stages, cut = compile_recipe(first, bench.seed, bench.context), 1
    for stage in stages[cut:]:
        try:
            note(ensure(bench, stage))
        except RecoveryPaused as paused:
            note(paused.run)
            paused.recipe, paused.plan = first, stages
            raise
    return first, stages


def ensure(bench: Workbench, stage: Stage) -> StageRun:
    """Makes sure that the artefact of ``stage`` is in the storage, running it here if nobody else does.

    Who loses the lease on the way takes the successor's result.
    """
    start = time.monotonic()
    while True:
        lease = _wait_for(bench, stage)
        if lease is None:
            return StageRun(stage.kind, stage.key, True, time.monotonic() - start)
        try:
            report, paused = None, None
            with lease, bench.holding(lease):
                if not bench.is_done(stage.key):
                    report, paused = _run(bench, stage)
            epochs = 0.0 if report is None else report.own_epochs
            run = StageRun(stage.kind, stage.key, False, time.monotonic() - start, epochs)
            if paused is None:
                return run
            paused.run = run  # only now: its lease is given back as after any other end
            raise paused
        except LeaseLost as error:
            log.warning("stage %s: %s; taking the successor's result", stage.kind, error)
            bench.remove_start(stage, lease.generation)


def _run(bench: Workbench, stage: Stage) -> tuple[TrainingReport | None, RecoveryPaused | None]:
    try:
        return RUNNERS[stage.kind](bench, stage), None
    except RecoveryPaused as paused:
        return paused.report, paused


def _wait_for(bench: Workbench, stage: Stage) -> Lease | None:
    """Returns the lease of ``stage``, or None once its artefact is there."""
    start = time.monotonic()
    with bench.deadline.paused():
        lease = acquire(
            bench.storage,
            f"{prefix(stage.key)}/leases",
            wait=lambda: bench.is_done(stage.key),
            note={"stage": stage.kind},
        )
    bench.seconds["stage_wait"] = bench.seconds.get("stage_wait", 0.0) + time.monotonic() - start
    return lease


def discard(bench: Workbench, key: str) -> None:
    """Takes back the artefact of a stage that proved damaged, under the stage's lease, so that it is made again.

    Nothing is removed where another trial has done so, or has made the stage again since.
    """
    with bench.deadline.paused():
        lease = acquire(bench.storage, f"{prefix(key)}/leases", wait=lambda: not bench.is_damaged(key))
    if lease is None:
        return
    with lease:
        if bench.is_damaged(key):
            bench.storage.delete(f"{prefix(key)}/{artefact.MANIFEST}")  # the others go when the next one is there
