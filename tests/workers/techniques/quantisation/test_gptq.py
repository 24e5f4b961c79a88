"""gptq: one column by hand, the loss against rounding to nearest, uncorrelated inputs, formats, bad inputs, reloading."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.workers.techniques.models import info, surroundings, vit
from tests.workers.techniques.quantised import require_reload
from workers.techniques import composition
from workers.techniques.quantisation import gptq, weight_only
from workers.techniques.quantisation.gptq import (
    Config,
    Grid,
    SecondMoment,
    inverse_factor,
    loss,
    make_grid,
    round_,
    second_order_codes,
)
from workers.techniques.quantisation.shared_affine import NotQuantisable
from workers.techniques.quantisation.weight_only import GroupedLinear, Int8Linear, empty_layer

FORMATS: list[dict[str, Any]] = [
    {"bits": 8, "granularity": "per_channel"},
    {"bits": 8},
    {"bits": 4},
    {"bits": 4, "act_order": True, "group_size": 64},
    {"bits": 3, "granularity": "per_channel", "act_order": True},
    {"bits": 2},
]


def correlated(columns: int, rows: int = 4000) -> torch.Tensor:
    """Tokens whose channels depend on each other and differ in strength, as behind a trained layer."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns // 3 + 1, columns, generator=generator)
    x = torch.randn(rows, columns // 3 + 1, generator=generator) @ mixing
    return (x + 0.3 * torch.randn(rows, columns, generator=generator)) * torch.linspace(0.2, 3, columns)


def moment_of(x: torch.Tensor) -> torch.Tensor:
    moment = SecondMoment()
    for part in x.split(1500):
        moment.see(part[None])
    return moment.mean()


def layer_for(linear: nn.Linear, **config: Any) -> Int8Linear:
    chosen = Config(**config)
    return empty_layer(linear, chosen.storage(), chosen.bits)


def convert(model: nn.Module, **config: Any) -> Any:
    return gptq.TECHNIQUE.apply(model, Config(images=64, **config), surroundings(model))


# --- mathematics ------------------------------------------------------------------------------------------------------


def test_the_second_column_makes_up_for_the_first() -> None:
    """x1 = x2 nearly: rounding 0.4 down to 0 moves the second weight from 0.3 up by nearly as much, to 1 instead of 0."""
    moment = torch.tensor([[1.0, 0.99], [0.99, 1.0]])
    weight = torch.tensor([[0.4, 0.3]])
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), -8, 7, 2)
    codes, _ = second_order_codes(
        weight, moment, grid, layer_for(nn.Linear(2, 1), bits=8, granularity="per_channel"), False
    )
    assert codes.tolist() == [[0.0, 1.0]]
    assert float(loss(weight, codes, moment)) < float(loss(weight, weight.round(), moment))


def test_each_update_is_the_optimal_one() -> None:
    """After the first column is fixed, the rest is the least-squares solution: weights that are not rounded have the least loss."""
    torch.manual_seed(0)
    x = correlated(6)
    H = moment_of(x).double()
    H += gptq.DAMP * H.diagonal().mean() * torch.eye(6)
    weight, change = torch.randn(6).double(), 0.37
    U = inverse_factor(moment_of(x)).double()
    updated = weight - change / U[0, 0] * U[0]
    # Minimise (w - v)^T H (w - v) subject to v[0] = weight[0] - change.
    rest = torch.linalg.solve(H[1:, 1:], H[1:, 0] * change)
    torch.testing.assert_close(updated[1:], weight[1:] + rest, atol=1e-4, rtol=1e-4)
    assert float(updated[0]) == pytest.approx(float(weight[0]) - change)


def test_loss_is_the_mean_squared_error_of_the_outputs() -> None:
    torch.manual_seed(0)
    x, w, v = correlated(12), torch.randn(3, 12), torch.randn(3, 12)
    expected = ((x.double() @ (w - v).double().T) ** 2).mean(0)
    torch.testing.assert_close(loss(w, v, moment_of(x)), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("config", FORMATS)
@pytest.mark.parametrize("columns", [96, 150])
def test_the_loss_on_correlated_inputs_is_never_above_that_of_rounding_to_nearest(
    config: dict[str, Any], columns: int
) -> None:
    torch.manual_seed(0)
    linear, moment = nn.Linear(columns, 20), moment_of(correlated(columns))
    nearest, second = layer_for(linear, **config), layer_for(linear, **config)
    nearest.quantise_(linear.weight)
    round_(second, linear.weight, moment, Config(**config).act_order)
    losses = [loss(linear.weight.detach(), part.dequantised(torch.float32), moment) for part in (second, nearest)]
    assert (losses[0] <= losses[1] * (1 + 1e-6)).all()
    assert losses[0].sum() < 0.7 * losses[1].sum()


@pytest.mark.parametrize("config", FORMATS)
def test_uncorrelated_inputs_are_rounded_to_nearest(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(70, 9)
    one, other = layer_for(linear, **config), layer_for(linear, **config)
    one.quantise_(linear.weight)
    round_(other, linear.weight, torch.eye(70), Config(**config).act_order)
    for name in ("weight", "scale"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_blocks_of_columns_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear, moment = nn.Linear(150, 8), moment_of(correlated(150))
    layer = layer_for(linear, bits=4)
    grid, _ = make_grid(linear.weight.detach(), layer)
    found = []
    for block in (32, 1024):
        monkeypatch.setattr(gptq, "BLOCK", block)
        found.append(second_order_codes(linear.weight.detach(), moment, grid, layer, False)[0])
    assert (found[0] != found[1]).float().mean() < 0.01  # sums in another order


def test_channels_that_are_zero_or_constant_or_equal_have_a_factor() -> None:
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    x[:, 1], x[:, 2], x[:, 3] = 0, 5, x[:, 0]
    linear = nn.Linear(8, 4)
    layer = layer_for(linear, bits=4)
    round_(layer, linear.weight, moment_of(x), False)
    assert layer.dequantised(torch.float32).isfinite().all()
    assert inverse_factor(torch.zeros(3, 3)).isfinite().all()
    round_(layer, torch.full((4, 8), 0.25), moment_of(x), False)
    torch.testing.assert_close(layer.dequantised(torch.float32), torch.full((4, 8), 0.25), atol=1e-3, rtol=0)


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_file_is_that_of_weight_only() -> None:
    one, other = vit(), vit()
    convert(one, bits=3)
    weight_only.TECHNIQUE.apply(other, weight_only.Config(bits=3, granularity="group"), surroundings(other))
    shapes = [{name: (t.shape, t.dtype) for name, t in m.state_dict().items()} for m in (one, other)]
    assert shapes[0] == shapes[1]
    assert sum(isinstance(m, GroupedLinear) for m in one.modules()) == 13


def test_each_layer_of_a_block_errs_less_on_its_own_inputs() -> None:
    def outputs(model: Any, shown: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        handle = model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: kept.append(out))
        with torch.inference_mode():
            model(shown)
        handle.remove()
        return kept[0]

    errors = []
    for technique, config in ((gptq.TECHNIQUE, Config(bits=3)), (weight_only.TECHNIQUE, weight_only.Config(bits=3))):
        model: Any = vit()
        around = surroundings(model)
        shown = torch.cat([batch for batch, _ in around.batches()])
        expected = outputs(model, shown)
        technique.apply(model, config, around)
        errors.append(float((outputs(model, shown) - expected).norm()))
    assert errors[0] < errors[1]


def test_later_blocks_are_calibrated_behind_rounded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    class Watching(SecondMoment):
        def see(self, x: torch.Tensor) -> None:
            seen.append(x.flatten()[:4].clone())
            super().see(x)

    monkeypatch.setattr(gptq, "SecondMoment", Watching)
    model: Any = vit()
    inputs: list[torch.Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0, :4].clone()))
    with torch.no_grad():
        model(next(iter(surroundings(model).batches()))[0])
    handle.remove()
    convert(vit(), bits=2)
    assert len(seen) == 2 * 13  # two batches for each of four layers of three blocks, and the head
    assert not torch.allclose(seen[-2], inputs[0], rtol=1e-2)


def test_not_a_number_and_a_second_quantisation_are_refused() -> None:
    model = vit()
    around = surroundings(model)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch, labels in around.batches():
            yield batch * float("nan"), labels

    with pytest.raises(NotQuantisable, match=r"the input of blocks\.0\.attn\.qkv holds NaN"):
        gptq.TECHNIQUE.apply(model, Config(), replace(around, batches=batches))
    model = vit()
    convert(model)
    with pytest.raises(NotQuantisable, match="once only"):
        convert(model)
    assert not composition.verdict("gptq", "weight_only").allowed


def test_check_and_simulated_are_those_of_the_format() -> None:
    assert gptq.TECHNIQUE.check(info(), Config(bits=4, kernel="packed")) is None
    assert "kernel packed" in str(gptq.TECHNIQUE.check(info(), Config(bits=3, kernel="packed")))
    assert not gptq.TECHNIQUE.simulated(Config(bits=4), "cpu")
    assert gptq.TECHNIQUE.simulated(Config(bits=3), "cpu")


@pytest.mark.parametrize("config", FORMATS)
def test_artefact_reloads_bit_exactly_and_calibration_repeats_itself(config: dict[str, Any], tmp_path: Path) -> None:
    require_reload([("gptq", {"images": 64, **config})], tmp_path / "a", embed_dim=40)
