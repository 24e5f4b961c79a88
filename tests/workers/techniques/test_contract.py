"""What every registered technique must do, whoever wrote it. A technique without a sample here fails the collection.

Pairs in each legal order are in tests/workers/artefact/test_artefact.py (saved and loaded) and test_pairs.py (trained too)."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch

from tests.workers.techniques.models import VARIANTS, images, surroundings, vit
from workers.models import model_info
from workers.techniques import registry
from workers.techniques.record import (
    Applied,
    LossInputs,
    Options,
    Range,
    Technique,
    config_faults,
    defaults,
    domains,
    make_config,
)

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

KNOWN_FROM_DATA = {"taylor_prune"}
"""Techniques that decide on data what each block keeps: nobody can tell their dimensions beforehand."""

LACKING = sorted({name for name, technique in registry().items() if "timm" in technique.models} - set(SAMPLES))
assert not LACKING, f"tests/workers/techniques/test_contract.py: SAMPLES lacks a config for {', '.join(LACKING)}"

TECHNIQUES = [registry()[name] for name in SAMPLES]
every_technique = pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
with_identity = pytest.mark.parametrize(
    "technique", [t for t in TECHNIQUES if t.identity is not None], ids=lambda t: t.name
)
with_loss = pytest.mark.parametrize("technique", [t for t in TECHNIQUES if t.loss is not None], ids=lambda t: t.name)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def apply(technique: Technique, values: dict[str, Any], variant: str = "class", seed: int = 0) -> Applied:
    model = vit(variant)
    applied = technique.apply(model, make_config(technique.Config, values), surroundings(model, seed))
    applied.model.eval()
    return applied


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(images())


@with_identity
@every_variant
def test_identity_settings_reproduce_the_logits(technique: Technique, variant: str) -> None:
    assert technique.identity is not None
    model = apply(technique, dict(technique.identity), variant).model
    torch.testing.assert_close(logits(model), logits(vit(variant)), atol=1e-6, rtol=1e-6)


@every_technique
@every_variant
def test_a_sample_changes_the_model_and_keeps_the_output(technique: Technique, variant: str) -> None:
    applied = apply(technique, SAMPLES[technique.name], variant)
    assert applied.changed
    out = logits(applied.model)
    assert out.shape == (4, 5)
    assert out.dtype == torch.float32
    assert bool(out.isfinite().all())
    assert not torch.equal(out, logits(vit(variant)))


@every_technique
def test_the_same_seed_gives_the_same_model(technique: Technique) -> None:
    torch.manual_seed(1)
    one = apply(technique, SAMPLES[technique.name])
    torch.manual_seed(2)
    two = apply(technique, SAMPLES[technique.name])
    assert one.resolved == two.resolved
    torch.testing.assert_close(logits(one.model), logits(two.model), rtol=0, atol=0)


@every_technique
def test_the_global_generator_is_left_alone(technique: Technique) -> None:
    model = vit()
    around, config = surroundings(model), make_config(technique.Config, SAMPLES[technique.name])
    state = torch.get_rng_state()
    technique.apply(model, config, around)
    assert torch.equal(torch.get_rng_state(), state)


@every_technique
@every_variant
def test_rebuild_takes_the_state_dict_and_computes_the_same(technique: Technique, variant: str) -> None:
    applied = apply(technique, SAMPLES[technique.name], variant)
    resolved = json.loads(json.dumps(applied.resolved))
    assert resolved == applied.resolved
    skeleton = technique.rebuild(vit(variant, device="meta"), resolved).eval()
    tensors = {k: v.clone() for k, v in applied.model.state_dict().items()}
    skeleton.load_state_dict(tensors, strict=True, assign=True)
    assert not [n for n, t in [*skeleton.named_parameters(), *skeleton.named_buffers()] if t.is_meta]
    torch.testing.assert_close(logits(skeleton), logits(applied.model), rtol=0, atol=0)


@every_technique
def test_a_changed_model_can_be_copied(technique: Technique) -> None:
    model = apply(technique, SAMPLES[technique.name]).model
    torch.testing.assert_close(logits(copy.deepcopy(model)), logits(model), rtol=0, atol=0)


@every_technique
def test_config_goes_through_json(technique: Technique) -> None:
    for values in ({}, SAMPLES[technique.name], dict(technique.identity or {})):
        config = make_config(technique.Config, values)
        again = make_config(technique.Config, json.loads(json.dumps(dataclasses.asdict(config))))
        assert again == config
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, None)


@every_technique
def test_defaults_and_searched_parts_are_allowed(technique: Technique) -> None:
    assert config_faults(technique.Config, defaults(technique.Config)) == []
    for name, domain in domains(technique.Config).items():
        searched = domain.search if isinstance(domain, Options) else (domain.search_low, domain.search_high)
        assert searched
        for value in searched:
            assert domain.fault(value) is None, f"{technique.name}.{name}: searches {value!r}"
        if isinstance(domain, Range):
            span = (domain.search_high - domain.search_low) / domain.search_step
            step = domain.search_step / domain.step
            assert span == pytest.approx(round(span)), f"{technique.name}.{name}: the last step misses the end"
            assert step == pytest.approx(round(step)), f"{technique.name}.{name}: searches between the allowed values"


@every_technique
def test_what_is_out_of_range_gives_a_reason(technique: Technique) -> None:
    for name, domain in domains(technique.Config).items():
        wrong: list[Any] = ["no such value", None]
        if isinstance(domain, Range):
            wrong += [domain.low - domain.step, domain.high + domain.step, domain.low + domain.step / 3]
        for value in wrong:
            faults = config_faults(technique.Config, {name: value})
            assert [n for n, _ in faults] == [name]
            assert faults[0][1].startswith("must be")
            with pytest.raises(ValueError, match=f"^{name}: must be"):
                make_config(technique.Config, {name: value})
    assert config_faults(technique.Config, {"no_such_parameter": 1})[0][1].startswith("unknown parameter; known: ")


@every_technique
@every_variant
def test_check_gives_a_reason_or_none(technique: Technique, variant: str) -> None:
    for device in ("cpu", "cuda"):
        facts = model_info(vit(variant), device)
        for values in ({}, SAMPLES[technique.name]):
            reason = technique.check(facts, make_config(technique.Config, values))
            assert reason is None or (isinstance(reason, str) and reason)
    assert (
        technique.check(model_info(vit(variant), "cpu"), make_config(technique.Config, SAMPLES[technique.name])) is None
    )


@every_technique
@every_variant
def test_facts_afterwards_are_those_of_the_model(technique: Technique, variant: str) -> None:
    model = vit(variant, qkv_bias=True)
    config = make_config(technique.Config, SAMPLES[technique.name])
    told = technique.info_after(model_info(model, "cpu"), config)
    found = model_info(technique.apply(model, config, surroundings(model)).model, "cpu")
    counts = ("embed_dim", "head_dim", "num_heads", "mlp_hidden")
    for name in ("depth", "num_tokens", "num_classes", *(counts if technique.name not in KNOWN_FROM_DATA else ())):
        assert getattr(told, name) == getattr(found, name), name


@with_loss
def test_the_extra_loss_trains_the_model(technique: Technique) -> None:
    assert technique.loss is not None
    config = make_config(technique.Config, SAMPLES[technique.name])
    model = apply(technique, SAMPLES[technique.name]).model.train()
    targets, teacher = torch.arange(4), torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    term = technique.loss(LossInputs(model, images(), model(images()), targets, teacher, 0.0, teacher=vit()), config)
    assert term.extra.ndim == 0
    term.extra.backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


@every_technique
def test_the_record_is_complete(technique: Technique) -> None:
    assert technique.version >= 1
    assert technique.source
    assert technique.Config.__doc__
    assert not technique.needs_teacher(technique.Config()) or technique.loss is not None
    for field in dataclasses.fields(technique.Config):
        assert field.metadata["doc"], f"{technique.name}.{field.name}"
