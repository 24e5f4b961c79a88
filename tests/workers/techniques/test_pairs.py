"""Pairs of techniques as a trial does them: apply, train a step, finish, convert, save and load; predictions stay, bit by bit.

Every technique with one technique of each family always, the first of that family that it may be combined with; all allowed
pairs, in every legal order and on every kind of model, when asked for.
"""

from __future__ import annotations

import copy
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.workers.artefact.test_artefact import one_thread  # noqa: F401 - a fixture
from tests.workers.techniques.models import surroundings
from tests.workers.techniques.test_contract import SAMPLES
from workers import artefact, models
from workers.tasks import TaskInfo
from workers.tasks.batches import Split
from workers.techniques import NAMES, registry
from workers.techniques.composition import family_of, legal_orders
from workers.techniques.families import FAMILIES
from workers.techniques.pruning.importance_prune_gates import Gate
from workers.techniques.record import make_config
from workers.training.loop import train

DATA = TaskInfo(num_classes=5, in_chans=3, image_size=16, class_names=tuple("01234"))
SMALL = {"patch_size": 2, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
MODELS: dict[str, dict[str, Any]] = {
    "distil": {"name": "deit_tiny_distilled_patch16_224", "create": SMALL},
    "registers": {
        "name": "vit_tiny_patch16_224",
        "create": {**SMALL, "reg_tokens": 4, "init_values": 0.5},
    },
    "average": {"name": "vit_tiny_patch16_224", "create": {**SMALL, "class_token": False, "global_pool": "avg"}},
}
"""Kinds of tokens and of pooling, and LayerScale; q/k-norm, which keeps head dimensions whole, is in test_contract.py."""

CONFIGS: dict[str, dict[str, Any]] = SAMPLES | {
    "magnitude_prune": {
        "head_ratio": 0.5, "mlp_ratio": 0.3, "head_dim_ratio": 0.5, "embed_ratio": 0.25, "depth_ratio": 0.3, "round_to": 4,
    },
    "taylor_prune": {"ratio": 0.6, "dimensions": "all", "steps": 2, "batches": 2, "round_to": 1},
    "importance_prune": {"head_ratio": 0.5, "mlp_ratio": 0.3, "head_dim_ratio": 0.5, "round_to": 4},
    "diffrate": {"macs": 0.8},  # what a student of one block can still reach
    "svd": {"keep": 0.6, "round_to": 1},  # its layers are small
}  # fmt: skip
"""What the contract tests use, and of each pruner what removes all that it can, in odd numbers where it may."""

MORE_WEIGHTS = {"linformer", "dynamicvit"}
"""Techniques that add weights of their own, more than others take from a model of this size."""

SETTINGS = {
    "epochs": 2, "batch_size": 4, "lr": 1e-3, "weight_decay": 0.05, "warmup_fraction": 0.1,
    "optimizer": "adamw", "schedule": "cosine",
}  # fmt: skip

Names = tuple[str, ...]


def pairs() -> list[Names]:
    return [order for pair in combinations(SAMPLES, 2) for order in legal_orders(pair)]


def partner(name: str, family: str) -> str | None:
    """The first technique of a family with which one may be combined, in canonical order; None where there is none."""
    those = [other for other in SAMPLES if family_of(other) == family and other != name]
    return next((other for other in those if legal_orders((name, other))), None)


def with_each_family() -> list[Names]:
    """Every technique with its partner of each family, its own among them, in the canonical order, each pair once."""
    found = {}
    for name in SAMPLES:
        for family in FAMILIES:
            if (other := partner(name, family)) is not None:
                found[legal_orders((name, other))[0]] = None
    return list(found)


def build(variant: str) -> nn.Module:
    return copy.deepcopy(_built(variant))


@cache
def _built(variant: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.build({"family": "timm", **MODELS[variant]}, DATA).eval()
    for block in model.get_submodule("blocks").children():  # biases and LayerScale are constants at first
        for parameter in block.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def noise(count: int = 8) -> Split:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return Split(images, np.arange(count, dtype=np.int64) % 5, (0.5,) * 3, (0.3,) * 3)


def compress(names: Names, variant: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Does what the stages of a trial do; returns the model and the steps of its manifest."""
    model, teacher, surgery, records = build(variant), build(variant), [], []
    for stage in ("surgery", "conversion"):
        for name in names:
            technique = registry()[name]
            if technique.stage != stage:
                continue
            config = make_config(technique.Config, CONFIGS[name])
            assert technique.check(models.model_info(model), config) is None
            applied = technique.apply(model, config, surroundings(model))
            assert applied.changed, name
            model = applied.model
            records.append({"technique": name, "version": technique.version, "resolved": applied.resolved})
            if stage == "surgery":
                surgery.append((technique, config))
        if stage == "surgery":
            train(model, noise(), SETTINGS, seed=0, device="cpu", steps=surgery, teacher=teacher)
            for record, (technique, config) in zip(records, surgery, strict=True):
                if technique.finalise is not None:
                    record["resolved"] = {**record["resolved"], **technique.finalise(model, config)}
    return model.eval(), records


@cache
def whole_bytes(variant: str) -> int:
    """Bytes of the uncompressed model's tensors, as they are stored."""
    description = models.describe({"family": "timm", **MODELS[variant]}, DATA)
    return len(artefact.pack(_built(variant), model_description=description, steps=[])[artefact.TENSORS])


def check(names: Names, variant: str, path: Path) -> None:
    model, records = compress(names, variant)
    assert not [m for m in model.modules() if isinstance(m, Gate)]
    description = models.describe({"family": "timm", **MODELS[variant]}, DATA)
    artefact.save(model, path / "artefact", model_description=description, steps=records)
    loaded = artefact.load(path / "artefact")
    _, shown, _ = next(noise().batches(8))
    with torch.inference_mode():
        expected, found = model(shown), loaded(shown)
    assert found.shape == (8, 5)
    assert bool(found.isfinite().all())
    assert torch.equal(found, expected)
    smaller = {"distillation", "pruning", "low_rank_weights", "quantisation"}
    if {family_of(name) for name in names} & smaller and not MORE_WEIGHTS & set(names):
        assert (path / "artefact" / artefact.TENSORS).stat().st_size < whole_bytes(variant)


def test_every_technique_is_paired_with_each_family() -> None:
    tried = with_each_family()
    assert set(SAMPLES) == {name for name in NAMES if "timm" in registry()[name].models}
    assert set(tried) <= set(pairs())
    for name in SAMPLES:
        for family in FAMILIES:
            possible = any(
                legal_orders((name, other)) for other in SAMPLES if family_of(other) == family and other != name
            )
            met = any(name in names and family in {family_of(n) for n in names if n != name} for names in tried)
            assert met == possible, f"{name} with {family}: is {'' if met else 'not '}among the pairs"
    assert len(tried) > 4 * len(SAMPLES)


@pytest.mark.parametrize("names", with_each_family(), ids="+".join)
def test_a_pair(names: Names, tmp_path: Path) -> None:
    check(names, "distil", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize("names", pairs(), ids="+".join)
def test_all_pairs_on_every_model(names: Names, variant: str, tmp_path: Path) -> None:
    check(names, variant, tmp_path)
