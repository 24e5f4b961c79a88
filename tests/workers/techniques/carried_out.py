"""One technique carried out on one model as a trial does it, without storage: applied, trained, finished, saved, loaded, counted."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.workers.techniques.digits import SETTINGS
from workers import artefact, models
from workers.measuring.counting import count_macs, count_params
from workers.tasks.batches import Split
from workers.techniques.quantisation.shared_affine import unquantised
from workers.techniques.record import Surroundings, Technique, make_config
from workers.training.loop import train


def reason_against(technique: Technique, values: Mapping[str, Any], description: Mapping[str, Any]) -> str | None:
    """Returns what `plan` would say: asked of the structure alone."""
    info = models.model_info(models.skeleton(description), "cpu")
    return technique.check(info, make_config(technique.Config, values))


def carry_out(
    technique: Technique, values: Mapping[str, Any], description: Mapping[str, Any], model: Any, data: Split
) -> None:
    """Carries it out; the reloaded artefact's logits must be those of what was saved, and finite.

    Args:
        model: the described one; it is left as it is.
    """
    config, teacher = make_config(technique.Config, values), copy.deepcopy(model)

    def batches() -> Iterator[tuple[Any, Tensor]]:
        for _, images, labels in data.batches(8, shuffle_seed=0):
            yield images, labels

    around = Surroundings(torch.device("cpu"), 0, torch.Generator().manual_seed(0), batches, lambda: teacher)
    applied = technique.apply(copy.deepcopy(model), config, around)
    assert applied.changed, "a technique that changes nothing ends its trial: check must say so"
    made, resolved = applied.model, applied.resolved
    if technique.stage == "surgery":
        if technique.trains(config):
            taught = technique.needs_teacher(config) or technique.needs_teacher_model(config)
            settings = {**SETTINGS, "epochs": 1, "batch_size": 8}
            steps, guide = [(technique, config)], teacher if taught else None
            train(made, data, settings, seed=0, device="cpu", steps=steps, teacher=guide)
        if technique.finalise is not None:
            resolved = {**resolved, **technique.finalise(made, config)}
    elif technique.calibrate is not None:
        technique.calibrate(made, config, around)
    step = {"technique": technique.name, "version": technique.version, "resolved": json.loads(json.dumps(resolved))}
    with tempfile.TemporaryDirectory() as folder:
        artefact.save(made.eval(), folder, model_description=description, steps=[step])
        loaded = artefact.load(folder, techniques={technique.name: technique})
    found = logits(loaded, data)
    torch.testing.assert_close(found, logits(made, data), rtol=0, atol=0)
    assert found.isfinite().all()
    counted = unquantised(loaded) if technique.stage == "surgery" else model
    _, images, _ = next(data.batches(1))
    assert count_macs(counted, images) > 0 < count_params(counted)


def logits(model: Any, data: Split) -> Tensor:
    """(4, classes) float32 of the first images."""
    _, images, _ = next(data.batches(4))
    with torch.inference_mode():
        found: Tensor = model.eval()(images)
    return found.float()
