"""What a model's speed depends on: equal for models that differ in what they learnt, different wherever the work differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers.measuring.structure import structure
from workers.techniques import registry
from workers.techniques.contract.models import build, images, surroundings
from workers.techniques.record import make_config


def made(name: str | None = None, config: dict[str, Any] | None = None, *, seed: int = 0, **model: Any) -> Any:
    """Returns a small ViT whose weights are those of ``seed``, reduced by one technique."""
    found = build("class", seed=seed, **model)
    if name is None:
        return found
    technique = registry()[name]
    values = make_config(technique.Config, config or {})
    found = technique.apply(found, values, surroundings(found, seed)).model
    if technique.calibrate is not None:
        technique.calibrate(found, values, surroundings(found, seed))
    return found.eval()


def seen(model: nn.Module) -> str | None:
    return structure(model, images)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (None, {}),
        ("tome", {"r": 3, "schedule": "decreasing"}),
        ("evit", {"keep": 0.6}),
        ("svd", {"keep": 0.6}),
        ("nystrom", {"landmarks": 8, "iterations": 4}),
        ("magnitude_prune", {"head_ratio": 0.5, "mlp_ratio": 0.25}),
        ("precision", {"dtype": "bf16"}),
        ("dynamic_int8", {"granularity": "per_channel"}),
        ("static_int8", {"observer": "percentile"}),
    ],
)
def test_what_was_learnt_does_not_count(name: str | None, config: dict[str, Any]) -> None:
    first = seen(made(name, config))
    assert first is not None
    assert first == seen(made(name, config, seed=1))


def test_every_difference_of_the_work_counts() -> None:
    models = {
        "whole": made(),
        "narrow": made(embed_dim=16),
        "deep": made(depth=4),
        "one token less": made("tome", {"r": 1}),
        "two tokens less": made("tome", {"r": 2}),
        "bf16": made("precision", {"dtype": "bf16"}),
        "fp16": made("precision", {"dtype": "fp16"}),
        "int8, a scale a tensor": made("dynamic_int8", {"granularity": "per_tensor"}),
        "int8, a scale a channel": made("dynamic_int8", {"granularity": "per_channel"}),
        "four landmarks": made("nystrom", {"landmarks": 4, "iterations": 2}),
        "eight landmarks": made("nystrom", {"landmarks": 8, "iterations": 2}),
    }
    unfused = made()
    for module in unfused.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010 - nn.Module declares no such attribute
    models["attention with its map"] = unfused
    found = {name: seen(model) for name, model in models.items()}
    assert None not in found.values()
    assert len(set(found.values())) == len(models), found


class Reads(nn.Module):
    """Runs something on what it is shown."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(3 * 16 * 16, 4), how

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.flatten(1))
        return out + self.how(out)


@pytest.mark.parametrize(
    "how",
    [
        lambda x: x[x > 0].sum(),
        lambda x: x[:, : 1 + int(x.sum() > 0)].sum(),
        lambda x: x.flatten()[x.flatten().nonzero()].sum(),
        lambda x: torch.unique(x).sum(),
    ],
    ids=["masked", "read by Python", "nonzero", "unique"],
)
def test_where_values_decide_the_work_nothing_is_equal(how: Any) -> None:
    assert seen(Reads(how).eval()) is None
    assert seen(Reads(lambda x: x[:, torch.tensor([0, 2])].sum()).eval()) is not None, (
        "an index that is fixed decides nothing"
    )


def test_numbers_below_the_normal_range_are_not_taken_for_others() -> None:
    model = made()
    model.blocks[0].mlp.fc1.weight.data[0, 0] = 1e-39
    assert seen(model) is None


def test_what_comes_out_below_the_normal_range_counts_too() -> None:
    assert seen(Reads(lambda x: (x * 0 - 90).exp()).eval()) is None


def test_a_weight_full_of_zeros_is_another_one() -> None:
    """A dense kernel does the same work on them, but with less power, and so at another clock."""
    model = made()
    model.blocks[0].mlp.fc1.weight.data[:, ::2] = 0
    assert seen(model) not in (None, seen(made()))
