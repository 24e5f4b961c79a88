"""What every technique that reduces tokens must do in ViLT and METER: the contract of test_contract.py on their models.

Quantisation, precision, distillation and pruning of these models are in test_vlm_techniques.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.vision_language import CLASSES, batch
from tests.workers.techniques.vlm import FAMILIES, apply, describe, padded, surroundings, vlm
from workers import artefact
from workers.inputs import Inputs
from workers.models import model_info
from workers.techniques import NAMES, contract, registry
from workers.techniques.contract import Case
from workers.techniques.record import LossInputs, make_config

SAMPLES: dict[str, dict[str, Any]] = {
    "pumer": {"layers": "0,2", "prune": 0.2},
    "tome": {"r": 2},
    "dynamicvit": {"layers": "0,2", "keep": 0.6},
    "resolution": {"ratio": 0.5},
}
"""One config of each technique that changes what both models compute."""

CASES = [(family, name, SAMPLES[name]) for family in FAMILIES for name in SAMPLES]
CASES.append(("meter", "tome", {"r": 3, "where": "image_tower"}))
every_case = pytest.mark.parametrize(("family", "name", "config"), CASES)

LACKING = sorted({name for name in NAMES if "timm" not in registry()[name].models} - set(SAMPLES))
assert not LACKING, (
    f"tests/workers/techniques/tokens/test_contract_vlm.py: SAMPLES lacks a config for {', '.join(LACKING)}"
)


def logits(model: nn.Module, examples: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(examples)
    return found


CONTRACT = [case for family, name, config in CASES for case in contract.cases(registry()[name], config, [family])]


@pytest.mark.parametrize("case", CONTRACT, ids=str)
def test_contract(case: Case) -> None:
    case()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SAMPLES)
def test_identity_settings_reproduce_the_logits(family: str, name: str) -> None:
    technique, model = registry()[name], vlm(family)
    assert technique.identity is not None
    config = make_config(technique.Config, dict(technique.identity))
    applied = technique.apply(copy.deepcopy(model), config, surroundings(model))
    assert applied.changed == []
    for examples in (batch("entailment"), padded()):
        assert torch.equal(logits(applied.model.eval(), examples), logits(model, examples))
    assert technique.check(model_info(model), config) is not None
    assert not technique.trains(config)


@every_case
def test_a_sample_changes_the_model_and_keeps_the_output(family: str, name: str, config: dict[str, Any]) -> None:
    for task in ("entailment", "nlvr2"):
        model = vlm(family, task)
        applied = apply(registry()[name], copy.deepcopy(model), **config)
        assert applied.changed
        for examples in (batch(task), padded(task), Inputs(padded(task))):
            out = applied.model(examples)
            assert out.shape == (3, CLASSES[task])
            assert out.dtype == torch.float32
            assert bool(out.isfinite().all())
            assert not torch.allclose(out, model(examples), atol=1e-4)


@every_case
def test_a_step_of_training(family: str, name: str, config: dict[str, Any]) -> None:
    technique, teacher = registry()[name], vlm(family)
    made = make_config(technique.Config, config)
    model = apply(technique, copy.deepcopy(teacher), **config).model.train()
    examples, targets = Inputs(padded()), torch.arange(3)
    out = model(examples)
    loss = nn.functional.cross_entropy(out, targets)
    if technique.loss is not None:
        with torch.no_grad():
            theirs = teacher(examples)
        given: Any = examples
        term = technique.loss(LossInputs(model, given, out, targets, theirs, 0.0, teacher=teacher), made)
        assert term.task_weight == 1.0
        loss = loss + term.extra
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    before = logits(model.eval(), padded())
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert bool(logits(model, padded()).isfinite().all())
    assert not torch.equal(logits(model, padded()), before)


def test_two_reducers_of_the_same_layers_are_refused() -> None:
    for first, second in (("pumer", "tome"), ("tome", "pumer"), ("dynamicvit", "pumer")):
        one, two = registry()[first], registry()[second]
        config = make_config(two.Config, SAMPLES[second])
        told = one.info_after(model_info(vlm("meter")), make_config(one.Config, SAMPLES[first]))
        found = model_info(apply(one, vlm("meter"), **SAMPLES[first]).model)
        for facts in (told, found):
            assert "reduce tokens already" in str(two.check(facts, config))


def test_tome_in_the_image_tower_goes_with_pumer_in_the_fusion_layers(tmp_path: Path) -> None:
    steps = []
    model: Any = vlm("meter")
    for name, config in (("tome", {"r": 2, "where": "image_tower"}), ("pumer", SAMPLES["pumer"])):
        applied = apply(registry()[name], model, **config)
        steps.append({"technique": name, "version": registry()[name].version, "resolved": applied.resolved})
        model = applied.model
    assert model_info(model).num_tokens == 20 + 17 - 4
    artefact.save(model, tmp_path / "a", model_description=describe("meter"), steps=steps)
    assert torch.equal(logits(artefact.load(tmp_path / "a"), padded()), logits(model, padded()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["pumer", "tome", "dynamicvit"])
def test_smaller_images_go_with_every_reducer(family: str, name: str, tmp_path: Path) -> None:
    steps = []
    model: Any = vlm(family, img_size=64)
    for step, config in (("resolution", {"ratio": 0.5}), (name, SAMPLES[name])):
        applied = apply(registry()[step], model, **config)
        steps.append({"technique": step, "version": registry()[step].version, "resolved": applied.resolved})
        model = applied.model
    artefact.save(model, tmp_path / "a", model_description=describe(family, img_size=64), steps=steps)
    examples = batch("entailment", side=64)
    assert torch.equal(logits(artefact.load(tmp_path / "a"), examples), logits(model, examples))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["pumer", "tome", "dynamicvit"])
def test_pruned_before_and_integers_after(family: str, name: str, tmp_path: Path) -> None:
    steps = []
    model: Any = vlm(family)
    pruning = {"head_ratio": 0.25, "mlp_ratio": 0.3, "head_dim_ratio": 0.25, "round_to": 4}
    for step, config in (("magnitude_prune", pruning), (name, SAMPLES[name]), ("dynamic_int8", {})):
        applied = apply(registry()[step], model, **config)
        steps.append({"technique": step, "version": registry()[step].version, "resolved": applied.resolved})
        model = applied.model
    artefact.save(model, tmp_path / "a", model_description=describe(family), steps=steps)
    assert torch.equal(logits(artefact.load(tmp_path / "a"), padded()), logits(model, padded()))
