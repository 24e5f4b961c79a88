"""What a recipe is worth whose recovery training is paused: the numbers that a decision about going on rests on.

The paused model is taken through what would follow if the training ended here, conversion and reloading included, in memory and a
temporary folder: nothing of it is kept, since the state of the training is what the next one goes on from.
"""

from __future__ import annotations

from collections.abc import Mapping
from tempfile import TemporaryDirectory

from torch import nn

from workers import artefact, evaluation
from workers.measuring import counting
from workers.measuring.made_inputs import make_inputs
from workers.stages.graph import Stage, resolve
from workers.stages.runners import RecoveryPaused, convert
from workers.stages.workbench import Workbench
from workers.techniques.quantisation.shared_affine import unquantised


def numbers_at_rung(bench: Workbench, paused: RecoveryPaused) -> dict[str, float]:
    """Returns the metrics of a paused recipe: the accuracies of the search split, and what its structure tells.

    Size, parameters and MACs are those of the end, to the byte, unless a technique decides them in the training (it has a
    ``finalise``): then they are left out. Speeds are measured at the end only.

    Raises:
        Infeasible, NotQuantisable: the conversion cannot be had.
        NotFiniteOutput: a logit is NaN or infinite.
    """
    known = {} if any(t.finalise is not None for t, _ in resolve(paused.stage.steps)) else _counts(bench, paused)
    model, size_bytes = _as_it_would_ship(bench, paused)
    if known:
        known["size_bytes"] = float(size_bytes)
    with bench.lane.shared(), bench.timed("evaluate"):
        found = evaluation.evaluate(model, bench.task.search, device=bench.device, tick=bench.tick)
    return {**known, **accuracy_metrics(found)}


def accuracy_metrics(found: evaluation.Evaluation) -> dict[str, float]:
    """Returns each accuracy with the ends of its interval, and what else an evaluation tells."""
    metrics: dict[str, float] = {}
    for accuracy in found.accuracies:
        metrics[accuracy.metric] = accuracy.pct
        metrics[f"{accuracy.metric}_low"] = accuracy.low_pct
        metrics[f"{accuracy.metric}_high"] = accuracy.high_pct
    return {**metrics, **found.more}


def _counts(bench: Workbench, paused: RecoveryPaused) -> dict[str, float]:
    """Counts before the conversion, whose kernels hide what they calculate."""
    model = unquantised(_reloaded(bench, paused.model, paused.description, paused.records)[0])
    inputs = make_inputs(bench.task.info, "cpu", 1)
    return {"params": float(counting.count_params(model)), "macs": float(counting.count_macs(model, inputs))}


def _as_it_would_ship(bench: Workbench, paused: RecoveryPaused) -> tuple[nn.Module, int]:
    """Returns the converted and reloaded model, and the bytes of its artefact."""
    model, records = paused.model, paused.records
    conversion: Stage | None = next((stage for stage in paused.plan if stage.kind == "conversion"), None)
    if conversion is not None:
        model, more = convert(bench, model, conversion)
        records = [*records, *more]
    return _reloaded(bench, model, paused.description, records)


def _reloaded(
    bench: Workbench, model: nn.Module, description: Mapping[str, object], records: list[dict[str, object]]
) -> tuple[nn.Module, int]:
    extra = {"preprocessing": bench.task.preprocessing()}
    with TemporaryDirectory(prefix="vitpareto-rung-") as folder:
        artefact.save(model.eval(), folder, model_description=description, steps=records, extra=extra)
        return artefact.load(folder, device=bench.device), artefact.size_bytes(folder)
