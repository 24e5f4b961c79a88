"""qat: scales from the largest weight and from moving averages, by hand; packing after the training."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.workers.techniques.digits import SETTINGS, digits, learned
from tests.workers.techniques.models import VARIANTS, images, surroundings, vit
from workers import evaluation
from workers.techniques.quantisation.qat import MOMENTUM, TECHNIQUE, Config, ObservedRanges, grid
from workers.techniques.quantisation.shared_affine import NotQuantisable
from workers.techniques.quantisation.shared_fake_quantise import EPS, Stored
from workers.training.loop import train


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.eval()(images())
    return found


def layer(weight: Tensor, bits: int = 3, input_bits: int = 0) -> ObservedRanges:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data = weight
    return ObservedRanges(linear, bits, input_bits)


def test_weights_by_hand() -> None:
    """3 bits: levels -4 to 3; each row's largest magnitude is level 3."""
    found = layer(torch.tensor([[3.0, -3.0, 1.4, -0.6], [0.3, 0.1, -0.14, 0.06], [0.0, 0.0, 0.0, 0.0]]))
    assert found.weight_scale().flatten().tolist() == pytest.approx([1.0, 0.1, EPS])
    stored = found.stored().dequantised(torch.float32)
    expected = torch.tensor([[3.0, -3.0, 1.0, -1.0], [0.3, 0.1, -0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(stored, expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_constant_row_is_exact(bits: int) -> None:
    weight = torch.tensor([[0.7], [-0.2], [0.0]]).expand(3, 5).clone()
    torch.testing.assert_close(layer(weight, bits).stored().dequantised(torch.float32), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("low", "high", "scale", "lowest"),
    [(-1.0, 14.0, 1.0, -1), (0.0, 30.0, 2.0, 0), (3.0, 15.0, 1.0, 0), (-30.0, -4.0, 2.0, -15), (0.0, 0.0, EPS, 0)],
)
def test_the_grid_of_activations_by_hand(low: float, high: float, scale: float, lowest: int) -> None:
    """4 bits: 15 steps, and zero is a level, so the range is made to hold it."""
    found, level = grid(torch.tensor(low), torch.tensor(high), 4)
    assert float(found) == pytest.approx(scale)
    assert int(level) == lowest


def test_ranges_are_moving_averages_in_training_and_stand_still_otherwise() -> None:
    found = layer(torch.randn(2, 3), 8, 4)
    found.input_low.fill_(-1.0)
    found.input_high.fill_(2.0)
    x = torch.tensor([[-3.0, 0.5, 12.0]])
    found.train()(x)
    assert float(found.input_low) == pytest.approx(-1 + MOMENTUM * (-3 + 1))
    assert float(found.input_high) == pytest.approx(2 + MOMENTUM * (12 - 2))
    before = float(found.input_low)
    found.train()(x)  # calculated again
    assert float(found.input_low) == before
    found.eval()(2 * x)
    assert float(found.input_low) == before


def test_calculating_activations_twice_changes_nothing() -> None:
    split, trained = digits(80), []
    for twice in (False, True):
        model = vit(img_size=8, patch_size=2, in_chans=1, num_classes=10)
        around = surroundings(model)
        around.batches = lambda: ((shown, labels) for _, shown, labels in split.batches(64))
        model = TECHNIQUE.apply(model, Config(weight_bits=4), around).model
        settings = {**SETTINGS, "grad_checkpointing": twice}
        train(model, split, settings, seed=0, device="cpu", steps=[(TECHNIQUE, Config(weight_bits=4))])
        trained.append(model.state_dict())
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())


def test_gradients_go_straight_through() -> None:
    torch.manual_seed(0)
    found = layer(torch.randn(4, 3), 3, 4).eval()
    found.input_low.fill_(-1.0)
    found.input_high.fill_(1.0)
    x = torch.tensor([[0.3, -0.8, 5.0]], requires_grad=True)
    found(x).sum().backward()
    weight = found.stored().dequantised(torch.float32)
    scale, lowest = grid(torch.tensor(-1.0), torch.tensor(1.0), 4)
    assert x.grad is not None
    expected = weight.sum(dim=0) * torch.tensor([1.0, 1.0, 0.0])  # 5 is beyond the range
    torch.testing.assert_close(x.grad[0], expected)
    entered = torch.clamp((x.detach() / scale).round(), lowest, lowest + 15) * scale
    assert found.weight.grad is not None
    torch.testing.assert_close(found.weight.grad, entered.expand(4, -1))  # no weight is beyond its row's largest


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation_bits", [8, 0])
def test_packing_changes_no_bit(variant: str, activation_bits: int) -> None:
    model = vit(variant)
    config = Config(weight_bits=5, activation_bits=activation_bits)
    applied = TECHNIQUE.apply(model, config, surroundings(model))
    before = logits(applied.model)
    assert TECHNIQUE.finalise is not None
    resolved = json.loads(json.dumps({**applied.resolved, **TECHNIQUE.finalise(model, config)}))
    assert len([part for part in model.modules() if isinstance(part, Stored)]) == len(resolved["linears"])
    assert torch.equal(logits(model), before)
    skeleton = TECHNIQUE.rebuild(vit(variant, device="meta"), resolved)
    skeleton.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, strict=True, assign=True)
    assert torch.equal(logits(skeleton), before)


def test_ranges_start_from_training_images() -> None:
    model = vit()
    around = surroundings(model)
    seen: list[Tensor] = []
    hook = model.blocks[0].attn.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    shown, _ = next(iter(around.batches()))
    with torch.inference_mode():
        logits_of_batch = model(shown)
    hook.remove()
    assert logits_of_batch.shape == (8, 5)
    found: Any = TECHNIQUE.apply(model, Config(), around).model.blocks[0].attn.qkv
    assert float(found.input_low) == pytest.approx(float(seen[0].min()))
    assert float(found.input_high) == pytest.approx(float(seen[0].max()))


def test_a_nan_weight_is_not_packed() -> None:
    with pytest.raises(NotQuantisable, match="must be finite"):
        layer(torch.tensor([[1.0, float("nan")]])).stored()


def test_training_recovers_what_few_bits_lose() -> None:
    split = digits(600)
    model = learned(split)
    config = Config(weight_bits=2, activation_bits=4)
    around = surroundings(model)
    around.batches = lambda: ((shown, labels) for _, shown, labels in split.batches(64))
    model = TECHNIQUE.apply(model, config, around).model
    before = evaluation.evaluate(model, split, device="cpu").correct
    train(model, split, {**SETTINGS, "epochs": 3}, seed=0, device="cpu", steps=[(TECHNIQUE, config)])
    after = evaluation.evaluate(model, split, device="cpu").correct
    assert after > before + 30
    TECHNIQUE.finalise(model, config)  # type: ignore[misc]
    assert evaluation.evaluate(model, split, device="cpu").correct == after
