"""The contract (workers.techniques.contract) asked of every built-in technique, and that it finds what breaks it.

A technique without a sample here fails the collection. Pairs in each legal order are in tests/workers/artefact/test_artefact.py
(saved and loaded) and test_pairs.py (trained too).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.places import ROOT
from workers.techniques import NAMES, contract, registry
from workers.techniques.contract import Case
from workers.techniques.contract.models import JOINT, VARIANTS, family_of
from workers.techniques.contract.subject import require_same_tensors
from workers.techniques.record import Applied, LossInputs, LossTerm, Rule, Surroundings, Technique, number

SAMPLES: dict[str, dict[str, Any]] = {
    "distill": {"depth": 0.5, "width": 0.5, "alpha": 0.3},
    "magnitude_prune": {"head_ratio": 0.5, "mlp_ratio": 0.25},
    "taylor_prune": {"ratio": 0.4, "batches": 2},
    "importance_prune": {"head_ratio": 0.5, "mlp_ratio": 0.25},
    "semi_structured_prune": {},
    "resolution": {"ratio": 0.75},
    "tome": {"r": 3, "schedule": "decreasing"},
    "pitome": {"keep": 0.75},
    "evit": {"keep": 0.6},
    "dynamicvit": {"keep": 0.6},
    "diffrate": {"macs": 0.6},
    "nystrom": {"landmarks": 8, "iterations": 4},
    "performer": {"features": 0.5},
    "linformer": {"k": 8, "sharing": "heads"},
    "scatterbrain": {"window": 4},
    "svd": {"keep": 0.6},
    "precision": {"dtype": "bf16"},
    "qat": {"weight_bits": 4},
    "lsq": {"weight_bits": 4},
    "diffq": {"penalty": 10.0},
    "dynamic_int8": {"granularity": "per_channel"},
    "weight_only": {"bits": 4, "group_size": 32},
    "static_int8": {"observer": "percentile"},
    "fq_vit": {"images": 64},
    "smoothquant": {"alpha": 0.6, "activations": "static"},
    "gptq": {"bits": 3, "images": 64},
    "repq_vit": {"weight_bits": 6, "activation_bits": 6},
    "fp8": {},
}
"""One config of each technique for image models that changes what a model computes. Techniques for vision-language models alone
have theirs in tests/workers/techniques/tokens/test_contract_vlm.py."""

SIZES_FROM_DATA = {"taylor_prune"}
"""Techniques that decide on data what each block keeps: nobody can tell their dimensions beforehand."""

LACKING = sorted({name for name in NAMES if "timm" in registry()[name].models} - set(SAMPLES))
assert not LACKING, f"SAMPLES lacks {', '.join(LACKING)}: add a config to tests/workers/techniques/test_contract.py"


def variants(name: str) -> list[str]:
    """Every shape of model that a technique works on; reducers of tokens have configs of their own for joint layers, in tokens/."""
    technique = registry()[name]
    asked = [*VARIANTS] if technique.family == "token_reduction" else [*VARIANTS, *JOINT]
    return [variant for variant in asked if family_of(variant) in technique.models]


CASES = [
    case
    for name, sample in SAMPLES.items()
    for case in contract.cases(registry()[name], sample, variants(name), sizes_from_data=name in SIZES_FROM_DATA)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case()


# --- what the contract finds ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """How much."""

    factor: float = number(1.5, 1.0, 2.0, 0.25, doc="by which a layer is multiplied")


@torch.no_grad()
def scale(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Multiplies the first MLP's first layer."""
    linear: Any = model.get_submodule("blocks.0.mlp.fc1")
    linear.weight.mul_(config.factor)
    return Applied(model, {"factor": config.factor}, ["blocks.0.mlp.fc1"])


def rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    return model


SOUND = Technique(
    "scale", "pruning", 1, Config, "surgery", apply=scale, rebuild=rebuild, source="nobody", identity={"factor": 1.0}
)
SAMPLE = {"factor": 1.25}


def test_a_sound_technique_passes() -> None:
    contract.check(SOUND, SAMPLE)


def changed(changes: Any) -> Any:
    """Scales as SOUND does, and does ``changes`` to what it applied."""

    def apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
        applied = scale(model, config, surroundings)
        changes(applied, surroundings)
        return applied

    return apply


def by_columns(applied: Applied, around: Surroundings) -> None:
    linear: Any = applied.model.get_submodule("blocks.0.mlp.fc1")
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())


def forgets(applied: Applied, around: Surroundings) -> None:
    applied.changed = []


def tensors_in_resolved(applied: Applied, around: Surroundings) -> None:
    applied.resolved["factor"] = torch.tensor(1.0)


def tuples_in_resolved(applied: Applied, around: Surroundings) -> None:
    applied.resolved["factors"] = (1, 2)


def draws_globally(applied: Applied, around: Surroundings) -> None:
    applied.model.get_submodule("head").bias.data.add_(torch.rand(5))


def structure(applied: Applied, around: Surroundings) -> None:
    applied.model.set_submodule("head", nn.Sequential(applied.model.get_submodule("head"), nn.Identity()))


def half(applied: Applied, around: Surroundings) -> None:
    applied.model.register_forward_hook(lambda module, given, out: out.half())


def hidden_state(applied: Applied, around: Surroundings) -> None:
    offset = torch.rand((), generator=around.generator)
    applied.model.register_forward_hook(lambda module, given, out: out + offset)


def shorter(applied: Applied, around: Surroundings) -> None:
    model: Any = applied.model
    model.blocks = model.blocks[:2]


def untrained(inputs: LossInputs, config: Any) -> LossTerm:
    return LossTerm(1.0, (inputs.logits.detach().sum() * torch.ones((), requires_grad=True)))


def vector(inputs: LossInputs, config: Any) -> LossTerm:
    return LossTerm(1.0, inputs.logits.sum(0))


@dataclass(frozen=True)
class OffGrid:
    """Has a default that is not allowed, and says nothing of it."""

    factor: float = number(1.6, 1.0, 2.0, 0.25, doc="")


@dataclass(frozen=True)
class Between:
    """Searches what is not allowed, from a default that is."""

    factor: float = number(1.5, 1.0, 2.0, 0.25, search=(1.0, 1.9, 0.3), doc="by which a layer is multiplied")


@dataclass
class Thawed:
    """Can be changed."""

    factor: float = number(1.5, 1.0, 2.0, 0.25, doc="by which a layer is multiplied")


BROKEN: dict[str, tuple[Technique, str]] = {
    "column after column": (
        replace(SOUND, apply=changed(by_columns)),
        r"must be contiguous.*blocks\.0\.mlp\.fc1\.weight: float32 of \(64, 32\) with strides \(1, 64\)",
    ),
    "names nothing": (replace(SOUND, apply=changed(forgets)), "changed must name the modules"),
    "tensor resolved": (replace(SOUND, apply=changed(tensors_in_resolved)), "resolved must be plain JSON"),
    "tuple resolved": (replace(SOUND, apply=changed(tuples_in_resolved)), "resolved must come back from JSON"),
    "global draw": (replace(SOUND, apply=changed(draws_globally)), "draw from surroundings.generator"),
    "global seed": (
        replace(SOUND, apply=changed(draws_globally)),
        "same seed must give the same logits: 20 of 20 values",
    ),
    "structure": (replace(SOUND, apply=changed(structure)), "rebuild must make the structure that apply left"),
    "type": (replace(SOUND, apply=changed(half)), "logits must stay float32, are torch.float16"),
    "hidden state": (
        replace(SOUND, apply=changed(hidden_state)),
        "saved and loaded, the logits: 20 of 20 values differ",
    ),
    "facts": (replace(SOUND, apply=changed(shorter)), "info_after says depth 3, the model has 2"),
    "identity": (
        replace(SOUND, identity={"factor": 2.0}),
        "with identity settings the logits must stay: .* differ, by up to",
    ),
    "no change": (replace(SOUND, apply=lambda m, c, s: Applied(m, {}, ["head"])), "sample must change the logits"),
    "check": (replace(SOUND, check=lambda info, config: ""), "check must say why, or None: ''"),
    "never": (replace(SOUND, check=lambda info, config: "never"), "nothing against the sample on this variant: never"),
    "loss": (replace(SOUND, loss=vector), r"must be one number, has shape \(5,\)"),
    "no gradient": (replace(SOUND, loss=untrained), "must have a gradient for some parameter"),
    "teacher": (replace(SOUND, needs_teacher=lambda config: True), "must have a loss"),
    "off the grid": (replace(SOUND, Config=OffGrid), "defaults must be allowed: .*factor.*multiple of 0.25"),
    "between": (replace(SOUND, Config=Between), "factor: searches 1.9, which must be"),
    "undocumented": (replace(SOUND, Config=OffGrid), "parameters must say what they are: factor"),
    "thawed": (replace(SOUND, Config=Thawed), "Config must be frozen"),
    "no source": (replace(SOUND, source=""), "source must name"),
    "version": (replace(SOUND, version=0), "version must be at least 1"),
    "unknown rule": (replace(SOUND, rules=(Rule(("tomme",), "forbidden", "no"),)), r"these are neither: \['tomme'\]"),
    "contradiction": (
        replace(SOUND, family="token_reduction", rules=(Rule(("low_rank_attention",), "allowed", "yes"),)),
        "contradict one another",
    ),
    "place": (replace(SOUND, family="quantisation"), "conversion comes after surgery: say in the family"),
    "device": (replace(SOUND, not_on={"tpu": "no"}), "must name cpu or cuda"),
}


@pytest.mark.parametrize(("technique", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_what_breaks_the_contract_is_said(technique: Technique, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        contract.check(technique, SAMPLE, variants=["class"])


def test_tensors_that_differ_are_named_with_type_and_strides() -> None:
    one: dict[str, Tensor] = {"a": torch.zeros(2, 3), "b": torch.zeros(2), "c": torch.zeros(1)}
    other = {**one, "a": torch.zeros(3, 2).t() + torch.tensor([0.0, 0.5, 0.0]), "b": torch.zeros(2, dtype=torch.half)}
    with pytest.raises(AssertionError) as caught:
        require_same_tensors(other, one, "loaded")
    assert str(caught.value) == (
        "loaded: a: 2 of 6 values differ, by up to 0.5; float32 of (2, 3) with strides (1, 2), expected float32 of (2, 3) "
        "with strides (3, 1); b: float16 of (2,) with strides (1,), expected float32 of (2,) with strides (1,)"
    )
    with pytest.raises(AssertionError, match="only one of both has: d"):
        require_same_tensors({**one, "d": one["a"]}, one, "loaded")


def test_the_contract_needs_no_pytest() -> None:
    code = "import sys; import workers.techniques.contract; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
