"""What a technique leaves is told without values, or not told at all. That it is told truly asks the contract, of every variant."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import pytest
from torch import nn

from tests.workers.techniques.test_contract import SAMPLES
from workers.techniques import composition, foresight, registry
from workers.techniques.contract.models import build, surroundings, without_values
from workers.techniques.contract.on_models import what_is_foreseen_happens
from workers.techniques.contract.subject import Subject
from workers.techniques.record import Applied, Surroundings, Technique, make_config

LEARNED = {"taylor_prune", "importance_prune", "diffrate", "diffq"}
"""Of these, images or the training decide."""


def foreseen(technique: Technique, values: dict[str, Any]) -> dict[str, Any]:
    config = make_config(technique.Config, values)
    model, resolved = foresight.foresee(technique, build("class", device="meta"), config, without_values("class"))
    (finished,) = foresight.finish(model, [(technique, config)], [resolved])
    return finished


@pytest.mark.parametrize("name", SAMPLES)
def test_all_is_told_but_what_is_learned(name: str) -> None:
    technique = registry()[name]
    if name not in LEARNED:
        assert foreseen(technique, SAMPLES[name])
        return
    with pytest.raises(foresight.NotForeseen, match=name):
        foreseen(technique, SAMPLES[name])


def pairs() -> Iterator[Any]:
    """Every two that may follow each other; two conversions, of which the first may change types, always."""
    known = [name for name in SAMPLES if name not in LEARNED]
    for pair in permutations(known, 2):
        if pair in composition.legal_orders(sorted(pair, key=known.index)):
            both = all(registry()[name].stage == "conversion" for name in pair)
            yield pytest.param(pair, id="-".join(pair), marks=[] if both else pytest.mark.slow)


@pytest.mark.parametrize("pair", pairs())
def test_what_follows_another_has_the_shapes_and_types_that_are_foreseen(pair: tuple[str, str]) -> None:
    model, empty, teacher = build("class"), build("class", device="meta"), build("class")
    for name in pair:
        technique = registry()[name]
        config = make_config(technique.Config, SAMPLES[name])
        model = technique.apply(model, config, surroundings(teacher)).model
        empty = foresight.foresee(technique, empty, config, without_values("class"))[0]
    assert layouts(empty) == layouts(model)


def layouts(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.dtype, *tensor.shape) for name, tensor in model.state_dict().items()}


def test_weights_that_decide_are_asked_for_in_vain() -> None:
    with pytest.raises(foresight.NotForeseen, match="singular values"):
        foreseen(registry()["svd"], {"energy": 0.9})
    with pytest.raises(foresight.NotForeseen, match="magnitude_prune: RuntimeError"):
        foreseen(registry()["magnitude_prune"], {"depth_ratio": 0.3})
    with pytest.raises(foresight.NotForeseen, match="weight_only: "):
        foreseen(registry()["weight_only"], {"bits": "mixed"})


def test_pretrained_students_are_foreseen_without_their_weights() -> None:
    """Which nothing here could fetch."""
    student = {"architecture": "vit_tiny_patch16_224"}
    technique, model = registry()["distill"], build()
    config = make_config(technique.Config, {**student, "init": "random"})
    expected = technique.apply(model, config, surroundings(model)).resolved
    assert foreseen(technique, {**student, "init": "pretrained"}) == expected


def scale(decide: Any) -> Technique:
    """Somebody else's technique, which resolves what ``decide`` makes of the first weight."""

    def apply(model: nn.Module, config: Any, around: Surroundings) -> Applied:
        linear: Any = model.get_submodule("blocks.0.mlp.fc1")
        return Applied(model, {"found": decide(linear.weight)}, ["blocks.0.mlp.fc1"])

    plain = registry()["tome"]
    return Technique("own", "pruning", 1, plain.Config, "surgery", apply, lambda model, resolved: model, "nobody")


def test_a_technique_that_says_nothing_of_it_is_judged_by_what_it_asks_for() -> None:
    assert foreseen(scale(lambda weight: len(weight)), {}) == {"found": 64}
    for decide in (
        lambda w: float(w.sum()),
        lambda w: w.tolist(),
        lambda w: int((w > 0).sum()),
        lambda w: bool(w.any()),
    ):
        with pytest.raises(foresight.NotForeseen, match="own: "):
            foreseen(scale(decide), {})


def test_the_contract_finds_a_technique_that_says_otherwise() -> None:
    """As one does that asks whether there are values."""
    tells = scale(lambda weight: "nothing" if weight.is_meta else "something")
    with pytest.raises(AssertionError, match=r"foresee says .*nothing.*, apply resolves .*something"):
        what_is_foreseen_happens(Subject(tells, {}, "class"))
