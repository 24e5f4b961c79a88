"""svd: best approximation against the tail of the singular values, ranks by hand, exactness at full rank, what comes after, reloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.workers.techniques.models import images, info, surroundings, vit
from tests.workers.techniques.quantised import require_exact, require_reload
from tests.workers.techniques.vlm import FAMILIES, apply, describe, vlm
from workers import artefact
from workers.inputs import Inputs
from workers.measuring.counting import count_macs, count_params
from workers.techniques import versions
from workers.techniques.low_rank import svd
from workers.techniques.low_rank.shared_block_linears import block_linears
from workers.techniques.low_rank.svd import Config, Factored, decompose, factored, rank_for_energy, rank_for_share
from workers.techniques.quantisation.shared_norm_folding import add_biases, fold_, pairs
from workers.techniques.quantisation.smoothquant import smooth_


def applied(model: Any, **config: Any) -> Any:
    return svd.TECHNIQUE.apply(model, Config(**config), surroundings(model))


def with_singular_values(values: list[float], rows: int, columns: int) -> nn.Linear:
    """A layer whose weight has these singular values and zeros."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    linear = nn.Linear(columns, rows)
    linear.weight.data = (left * torch.tensor(values) @ right.T).float()
    return linear


def product(layer: Any) -> torch.Tensor:
    return layer[1].weight @ layer[0].weight


# --- mathematics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 7, 11])
def test_the_error_is_the_tail_of_the_singular_values(rank: int) -> None:
    linear = nn.Linear(12, 20)
    parts = decompose(linear.weight)
    error = (linear.weight - product(factored(linear, rank, parts))).detach().double().square().sum()
    torch.testing.assert_close(error, parts[1][rank:].square().sum(), rtol=1e-4, atol=1e-9)


def test_singular_values_by_hand() -> None:
    linear = with_singular_values([4.0, 3.0, 1.0], 8, 6)
    _, found, _ = decompose(linear.weight)
    torch.testing.assert_close(found, torch.tensor([4.0, 3, 1, 0, 0, 0]).double(), atol=1e-5, rtol=0)
    layer = factored(linear, 3, decompose(linear.weight))
    torch.testing.assert_close(product(layer), linear.weight, atol=1e-5, rtol=0)
    for factor in (layer[0].weight, layer[1].weight.T):  # both carry the square roots
        torch.testing.assert_close(factor.norm(dim=1), torch.tensor([4.0, 3, 1]).sqrt(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("energy", "round_to", "rank"),
    [(0.5, 1, 1), (16 / 26, 1, 1), (0.62, 1, 2), (25 / 26, 1, 2), (0.97, 1, 3), (1.0, 1, 3), (0.5, 4, 4), (0.5, 8, 8)],
)
def test_energy_by_hand(energy: float, round_to: int, rank: int) -> None:
    # Squares are 16, 9, 1 of 26, then nothing.
    assert rank_for_energy(torch.tensor([4.0, 3, 1, 0, 0]), energy, round_to) == rank


@pytest.mark.parametrize(
    ("shape", "keep", "round_to", "rank"),
    [
        ((96, 32), 0.5, 1, 12),  # 3072 weights, 128 a rank: 12 are 1536
        ((96, 32), 0.5, 8, 8),
        ((96, 32), 1.0, 1, 23),  # 24 would be as many weights as the layer has
        ((96, 32), 1.0, 8, 16),
        ((32, 32), 0.1, 8, None),  # 102 weights are one rank and a half
        ((8, 8), 1.0, 4, None),
    ],
)
def test_rank_for_a_share_by_hand(shape: tuple[int, int], keep: float, round_to: int, rank: int | None) -> None:
    assert rank_for_share(*shape, keep, round_to) == rank


def test_all_ranks_reproduce_the_logits() -> None:
    model = vit()
    with torch.inference_mode():
        expected = model(images())
        for name, linear in block_linears(model, "all").items():
            model.set_submodule(name, factored(linear, min(linear.weight.shape), decompose(linear.weight)))
        torch.testing.assert_close(model(images()), expected, atol=1e-5, rtol=1e-5)


# --- the technique ----------------------------------------------------------------------------------------------------


def test_layers_where_it_saves_nothing_are_left() -> None:
    model = vit()
    found = applied(model, keep=0.3, round_to=8)  # 96 x 32 and 64 x 32 have no 8 ranks for that, nothing has
    assert found.changed == []
    assert applied(vit(), keep=0.5, round_to=8).resolved["ranks"] == {
        f"blocks.{i}.{name}": 8 for i in range(3) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }


def test_energy_alone_takes_the_layers_that_have_a_low_rank() -> None:
    model = vit()
    model.blocks[1].mlp.fc1 = with_singular_values([4.0, 3.0, 1.0], 64, 32)
    found = applied(model, keep=0.8, energy=0.9, round_to=1)
    assert found.resolved["ranks"]["blocks.1.mlp.fc1"] == 2
    assert min(found.resolved["ranks"][name] for name in found.changed if name != "blocks.1.mlp.fc1") > 2


def test_energy_alone_leaves_a_layer_that_would_not_get_smaller() -> None:
    model = vit()
    model.blocks[1].mlp.fc1 = with_singular_values([4.0, 3.0, 1.0], 64, 32)
    found = applied(model, keep=1.0, energy=0.99, round_to=1)  # of 32 random columns nearly all are needed
    assert found.resolved["ranks"] == {"blocks.1.mlp.fc1": 3}


@pytest.mark.parametrize(("layers", "words"), [("mlp", {"fc1", "fc2"}), ("attention", {"qkv", "proj"})])
def test_a_choice_of_layers(layers: str, words: set[str]) -> None:
    model = vit()
    found = applied(model, layers=layers)
    assert {name.split(".")[-1] for name in found.changed} == words
    assert {name for name, part in model.named_modules() if isinstance(part, Factored)} == set(found.changed)


def test_params_and_macs_by_hand() -> None:
    whole, less = vit(), vit()
    applied(less, keep=0.5, round_to=8)
    # Rank 8: 8 * (96 + 32), 8 * 64, 8 * 96 twice, in place of 3072, 1024 and 2048 twice; 17 tokens, 3 blocks.
    saved = 3 * (3072 + 1024 + 2 * 2048 - 8 * (128 + 64 + 96 + 96))
    assert count_params(whole) - count_params(less) == saved
    assert count_macs(whole, (1, 3, 16, 16)) - count_macs(less, (1, 3, 16, 16)) == 17 * saved


def test_weights_lie_row_by_row_and_are_those_of_the_file() -> None:
    model = vit()
    applied(model)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert all(p.untyped_storage().nbytes() == p.nbytes for n, p in model.named_parameters() if ".fc" in n)


def test_what_cannot_be_is_said_before_any_work() -> None:
    assert svd.TECHNIQUE.check(info(), Config()) is None
    assert "leave every layer" in str(svd.TECHNIQUE.check(info(), Config(keep=1.0)))
    assert svd.TECHNIQUE.check(info(), Config(keep=1.0, energy=0.9)) is None
    assert "leaves no rank for layers of 96 x 32, 32 x 32, 64 x 32" in str(
        svd.TECHNIQUE.check(info(), Config(keep=0.1))
    )
    assert svd.TECHNIQUE.trains(Config())
    assert not svd.TECHNIQUE.trains(Config(recover=False))


# --- what comes after -------------------------------------------------------------------------------------------------


def test_the_first_factor_takes_what_is_folded_into_a_norm() -> None:
    model = vit()
    applied(model)
    found = pairs(model)
    assert {reader for pair in found for reader in pair.readers} == {
        f"blocks.{i}.{reader}.0" for i in range(3) for reader in ("attn.qkv", "mlp.fc1")
    }
    generator = torch.Generator().manual_seed(0)

    def fold(changed: Any) -> None:
        for pair in found:
            factor = torch.rand(32, generator=generator) + 0.5
            add_biases(changed, pair.readers)
            fold_(changed, pair, factor, torch.randn(32, generator=generator))

    require_exact(model, fold)


def test_smoothing_changes_every_norm_and_nothing_that_is_computed() -> None:
    model = vit()
    applied(model)
    changed = require_exact(model, lambda m: smooth_(m, 0.5, surroundings(m), 64))
    assert len(changed) == 6


def test_a_training_moves_both_factors() -> None:
    model = vit()
    applied(model)
    model.train()(images()).square().sum().backward()
    for part in model.modules():
        if isinstance(part, Factored):
            assert all(bool(p.grad.abs().sum() > 0) for p in part.parameters())


@pytest.mark.parametrize("after", [[], [("weight_only", {"bits": 4})], [("precision", {"dtype": "bf16"})]], ids=str)
def test_the_artefact_computes_the_same(after: list[Any], tmp_path: Path) -> None:
    require_reload([("svd", {"keep": 0.5}), *after], tmp_path / "a")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vision_language_model(family: str, tmp_path: Path) -> None:
    model = vlm(family)
    whole = count_params(model)
    found = apply(svd.TECHNIQUE, model, keep=0.5)
    assert not [name for name in found.changed if "pooler" in name or "head" in name or "transform" in name]
    assert any("query" in name for name in found.changed)
    assert any(name.endswith("intermediate.dense") for name in found.changed)
    assert count_params(model) < 0.85 * whole
    steps = [{"technique": "svd", "version": versions()["svd"], "resolved": found.resolved}]
    artefact.save(model, tmp_path / "a", model_description=describe(family), steps=steps)
    from tests.workers.techniques.vlm import padded

    example = Inputs(padded())
    with torch.inference_mode():
        assert torch.equal(artefact.load(tmp_path / "a")(example), model(example))
