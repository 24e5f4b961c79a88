"""lsq: quantisers by hand, gradients of values and of steps numerically, packing after the training, trials and artefacts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.study.load import load_study
from tests.studies import tiny_study
from tests.workers.techniques.digits import SETTINGS, digits, full, learned
from tests.workers.techniques.models import VARIANTS, images, info, surroundings, vit
from workers import artefact, evaluation
from workers.artefact.parity import TOLERANCES
from workers.measuring.counting import OpaqueKernel, count_macs, count_params
from workers.node.storage import LocalStorage
from workers.run import run_trial
from workers.techniques import registry
from workers.techniques.composition import legal_orders
from workers.techniques.quantisation.lsq import STEP_LR, TECHNIQUE, Config, LearnedSteps, first_step, scale_gradient
from workers.techniques.quantisation.qat import ObservedRanges
from workers.techniques.quantisation.shared_affine import NotQuantisable, packed_bytes, unquantised
from workers.techniques.quantisation.shared_fake_quantise import (
    EPS,
    FakeQuantised,
    Seen,
    Stored,
    StoredIntegers,
    on_grid,
)
from workers.techniques.quantisation.shared_integer_linear import no_kernel
from workers.training.loop import train
from workers.trial import Recipe, TrialSpec

ONE = torch.ones(())


def apply(config: Config, variant: str = "class", **changes: Any) -> Any:
    model = vit(variant, **changes)
    applied = TECHNIQUE.apply(model, config, surroundings(model))
    return applied.model, applied.resolved


def layers(model: nn.Module) -> list[LearnedSteps]:
    return [part for part in model.modules() if isinstance(part, LearnedSteps)]


def logits(model: nn.Module, size: int = 16) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.eval()(images(size=size))
    return found


# --- the quantiser ----------------------------------------------------------------------------------------------------


def test_values_by_hand() -> None:
    x = torch.tensor([-9.0, -2.1, -0.6, -0.2, 0.0, 0.25, 0.26, 1.7, 5.0])
    found = on_grid(x, torch.tensor(0.5), -4, 3)  # 3 bits: levels -2 to 1.5
    assert found.tolist() == [-2.0, -2.0, -0.5, 0.0, 0.0, 0.0, 0.5, 1.5, 1.5]


def test_the_first_step_by_hand() -> None:
    assert first_step(0.5, 7) == pytest.approx(2 * 0.5 / math.sqrt(7))
    assert first_step(0.0, 7) == 1 / 7


def test_values_pass_gradients_straight_through_inside_the_range() -> None:
    x = torch.tensor([-9.0, -2.1, -1.9, -0.6, 0.0, 0.3, 1.4, 1.7, 5.0], requires_grad=True)
    on_grid(x, torch.tensor(0.5), -4, 3).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


def test_straight_through_is_the_slope_seen_from_afar() -> None:
    """The mean slope over whole steps is what the estimator says, though the slope at a point is 0 almost everywhere."""
    step = torch.tensor(0.25, dtype=torch.float64)
    x = torch.linspace(-1, 1, 401, dtype=torch.float64)
    slope = (on_grid(x + step * 3, step, -128, 127) - on_grid(x - step * 3, step, -128, 127)) / (6 * step)
    torch.testing.assert_close(slope, torch.ones_like(slope), atol=1e-9, rtol=0)


def test_the_step_s_gradient_is_that_of_the_paper_and_numerical() -> None:
    """Equation 3: -v/s + round(v/s) inside, -Qn or Qp outside. Numerically: rounding's error held, as straight through does."""
    torch.manual_seed(0)
    v, low, high = torch.randn(200, dtype=torch.float64), -4, 3
    step = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(200, dtype=torch.float64)
    (on_grid(v, step, low, high) * weight).sum().backward()
    s = step.detach()
    ratio = v / s
    paper = torch.where(ratio <= low, low, torch.where(ratio >= high, high, ratio.round() - ratio))
    assert step.grad is not None
    torch.testing.assert_close(step.grad, (paper * weight).sum())
    error = (ratio.clamp(low, high).round() - ratio.clamp(low, high)).detach()

    def value(at: Tensor) -> Tensor:
        return (((v / at).clamp(low, high) + error) * at * weight).sum()

    h = 1e-6
    numerical = (value(s + h) - value(s - h)) / (2 * h)
    torch.testing.assert_close(step.grad, numerical, rtol=1e-6, atol=1e-6)


def test_gradients_of_a_layer_carry_the_paper_s_scale() -> None:
    """Section 2.2: 1 / sqrt(N Qp), N the weights, or the numbers that come in for one image."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    layer = LearnedSteps(linear, 3, 4)
    with torch.no_grad():
        layer.weight_step.fill_(0.1)
        layer.input_step.fill_(0.3)  # type: ignore[union-attr]
    x = torch.randn(2, 7, 6)
    layer(x).sum().backward()
    plain_w, plain_x = torch.tensor(0.1, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    weight = on_grid(linear.weight.detach(), plain_w, -4, 3)
    (on_grid(x, plain_x, -8, 7) @ weight.T).sum().backward()
    assert plain_w.grad is not None
    assert plain_x.grad is not None
    torch.testing.assert_close(layer.weight_step.grad, plain_w.grad / math.sqrt(30 * 3))
    torch.testing.assert_close(layer.input_step.grad, plain_x.grad / math.sqrt(42 * 7))  # type: ignore[union-attr]


def test_a_scaled_gradient_leaves_the_value() -> None:
    x = torch.tensor(0.3, requires_grad=True)
    y = scale_gradient(x, 0.125)
    assert float(y.detach()) == float(x.detach())
    y.backward()
    assert x.grad == 0.125


# --- layers and models ------------------------------------------------------------------------------------------------


def test_steps_start_from_weights_and_from_what_comes_in() -> None:
    reference, (model, _) = vit(), apply(Config(weight_bits=4, activation_bits=6))
    seen: list[float] = []
    shown, _ = next(iter(surroundings(reference).batches()))
    reference.blocks[1].mlp.fc1.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().mean())))
    with torch.inference_mode():
        reference(shown)
    layer: Any = model.blocks[1].mlp.fc1
    layer.requires_grad_(False)
    assert float(layer.weight_step) == pytest.approx(2 * float(layer.weight.abs().mean()) / math.sqrt(7))
    assert float(layer.input_step) == pytest.approx(2 * seen[0] / math.sqrt(31))
    assert (model.head.bits, model.head.input_bits) == (8, 8)
    assert len(layers(model)) == 13


@pytest.mark.parametrize(("last_layer", "head"), [("int8", (8, 8)), ("same", (3, 4)), ("float", None)])
def test_the_last_layer(last_layer: str, head: tuple[int, int] | None) -> None:
    model, resolved = apply(Config(weight_bits=3, activation_bits=4, last_layer=last_layer), "distil")
    for part in (model.head, model.head_dist):
        assert isinstance(part, FakeQuantised) == (head is not None)
        assert head is None or (part.bits, part.input_bits) == head
    assert len(resolved["linears"]) == 12 + 2 * (head is not None)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation_bits", [8, 3, 0])
def test_packing_changes_no_bit(variant: str, activation_bits: int) -> None:
    model, resolved = apply(Config(weight_bits=3, activation_bits=activation_bits), variant)
    before = logits(model)
    assert TECHNIQUE.finalise is not None
    resolved = json.loads(json.dumps({**resolved, **TECHNIQUE.finalise(model, Config())}))
    assert not layers(model)
    assert torch.equal(logits(model), before)
    skeleton = TECHNIQUE.rebuild(vit(variant, device="meta"), resolved)
    skeleton.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, strict=True, assign=True)
    assert torch.equal(logits(skeleton), before)


@pytest.mark.parametrize("name", ["lsq", "qat"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("last_layer", ["int8", "float"])
def test_eight_bits_go_to_the_integer_kernel(name: str, variant: str, last_layer: str) -> None:
    technique = registry()[name]
    config = technique.Config(weight_bits=8, activation_bits=8, last_layer=last_layer)
    model = vit(variant)
    resolved = technique.apply(model, config, surroundings(model)).resolved
    before = logits(model)
    resolved = json.loads(json.dumps({**resolved, **technique.finalise(model, config)}))  # type: ignore[misc]
    assert [part for part in model.modules() if isinstance(part, StoredIntegers)]
    assert not [part for part in model.modules() if isinstance(part, Stored | FakeQuantised)]
    found = logits(model)
    off = (found - before).abs().amax(dim=1) / before.abs().max()
    assert off.median() < 1e-3
    assert off.max() < TOLERANCES["int8"]  # where a last bit moves an activation to the next level
    skeleton = technique.rebuild(vit(variant, device="meta"), resolved)
    skeleton.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, strict=True, assign=True)
    assert torch.equal(logits(skeleton), found)
    twin = unquantised(model)
    assert count_params(twin) == count_params(vit(variant))
    for device in ("cpu", "cuda"):
        assert technique.simulated(config, device) is no_kernel(config, device)
        assert technique.simulated(technique.Config(weight_bits=7), device)
        assert technique.simulated(technique.Config(weight_bits=8, activation_bits=0), device)


@pytest.mark.parametrize("name", ["lsq", "qat"])
def test_one_layer_of_integers_computes_the_layer_in_training(name: str) -> None:
    torch.manual_seed(0)
    kind: Any = {"lsq": LearnedSteps, "qat": ObservedRanges}[name]
    layer, x = kind(nn.Linear(48, 20), 8, 8).eval(), torch.randn(3, 7, 48)
    layer.start(Seen(float(x.abs().mean()), float(x.min()), float(x.max())))
    with torch.inference_mode():
        expected, found = layer(x), layer.stored_for_kernel()(x)
    step = float(layer.input_grid(None)[0].detach()) * float(layer.weight.detach().abs().max())
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max() + step  # a tie may be rounded the other way
    assert (found - expected).abs().mean() < 1e-4 * expected.abs().mean()


@pytest.mark.parametrize("bits", range(2, 9))
def test_stored_bytes_are_those_of_the_bits(bits: int) -> None:
    layer = LearnedSteps(nn.Linear(37, 5), bits, 8)
    with torch.no_grad():
        layer.weight_step.fill_(0.01)
        layer.input_step.fill_(0.1)  # type: ignore[union-attr]
    kept = {name: tensor.nbytes for name, tensor in layer.stored().state_dict().items()}
    assert kept == {"weight": 5 * packed_bytes(37, bits), "scale": 4, "bias": 20, "input_scale": 4, "input_low": 4}
    x = torch.randn(3, 37)
    assert torch.equal(layer.stored()(x), layer.eval()(x))


def test_the_twin_has_the_weights_and_no_quantiser() -> None:
    model, _ = apply(Config(weight_bits=3))
    whole = vit()
    assert TECHNIQUE.finalise is not None
    TECHNIQUE.finalise(model, Config())
    with pytest.raises(OpaqueKernel, match="Stored"):
        count_params(model)
    twin: Any = unquantised(model)
    assert count_params(twin) == count_params(whole)
    assert count_macs(twin, (1, 3, 16, 16)) == count_macs(whole, (1, 3, 16, 16))
    layer: Any = model.get_submodule("blocks.0.attn.qkv")
    assert isinstance(layer, Stored)
    assert torch.equal(twin.blocks[0].attn.qkv.weight, layer.dequantised(torch.float32))
    assert unquantised(whole) is whole


def test_constant_and_zero_weights_and_inputs() -> None:
    model = vit()
    model.blocks[0].mlp.fc1.weight.data.zero_()
    model.blocks[0].mlp.fc1.bias.data.zero_()  # so that zeros come into fc2
    model.blocks[1].attn.proj.weight.data.fill_(0.25)
    around = surroundings(model)
    model = TECHNIQUE.apply(model, Config(weight_bits=3, activation_bits=2), around).model
    assert all(float(layer.weight_scale().detach()) >= EPS for layer in layers(model))
    assert float(model.blocks[0].mlp.fc2.input_step.detach()) == 1
    assert bool(logits(model).isfinite().all())
    TECHNIQUE.finalise(model, Config())  # type: ignore[misc]
    assert not bool(model.blocks[0].mlp.fc1.dequantised(torch.float32).any())
    step = model.blocks[1].attn.proj.dequantised(torch.float32).unique()
    assert step.tolist() == pytest.approx([2 * 0.25 / math.sqrt(3)])  # the level next to it


@pytest.mark.parametrize("where", ["weight", "input"])
def test_nan_is_an_error_with_the_layer_s_name(where: str) -> None:
    model = vit()
    if where == "weight":
        model.blocks[1].mlp.fc1.weight.data[3] = float("nan")
    else:
        model.blocks[1].norm2.weight.data[2] = 3e38  # finite, but not what the norm gives out
    named = "the weight of blocks.1.mlp.fc1" if where == "weight" else "what comes into blocks.1.mlp.fc1"
    with pytest.raises(NotQuantisable, match=f"{named} must be finite"):
        TECHNIQUE.apply(model, Config(), surroundings(model))


@pytest.mark.parametrize("other", ["weight_only", "dynamic_int8", "qat", "lsq"])
@pytest.mark.parametrize("stored", [False, True])
def test_a_model_is_quantised_once_only(other: str, stored: bool) -> None:
    model, _ = apply(Config())
    if stored:
        TECHNIQUE.finalise(model, Config())  # type: ignore[misc]
    assert not legal_orders(("lsq", other))
    technique = registry()[other]
    with pytest.raises(NotQuantisable, match=r"blocks\.0\.attn\.qkv is a \w+ already"):
        technique.apply(model, technique.Config(), surroundings(model))


def test_the_partners_that_end_with_the_same_training_are_refused() -> None:
    assert not legal_orders(("importance_prune", "lsq"))
    assert not legal_orders(("precision", "lsq"))
    assert legal_orders(("lsq", "tome", "magnitude_prune", "distill")) == [
        ("distill", "magnitude_prune", "tome", "lsq")
    ]
    assert TECHNIQUE.check(info(), Config()) is None


# --- training ---------------------------------------------------------------------------------------------------------


def test_each_step_has_a_rate_in_proportion_to_it() -> None:
    model, _ = apply(Config())
    assert TECHNIQUE.parameter_groups is not None
    groups = list(TECHNIQUE.parameter_groups(model, Config()))
    assert len(groups) == 2 * 13
    for group in groups:
        assert group["lr"] == pytest.approx(STEP_LR * float(group["params"][0].detach()))
        assert group["weight_decay"] == 0


def test_training_recovers_what_three_bits_lose() -> None:
    split = digits(600)
    model = learned(split)
    whole = evaluation.evaluate(model, split, device="cpu").correct
    config = Config(weight_bits=2, activation_bits=4)
    model = TECHNIQUE.apply(model, config, _from(split)).model
    first = [float(layer.weight_step.detach()) for layer in layers(model)]
    before = evaluation.evaluate(model, split, device="cpu").correct
    train(model, split, {**SETTINGS, "epochs": 3}, seed=0, device="cpu", steps=[(TECHNIQUE, config)])
    assert all(float(layer.weight_step.detach()) != a for layer, a in zip(layers(model), first, strict=True))
    after = evaluation.evaluate(model, split, device="cpu").correct
    assert before + 30 < after
    assert after > 0.8 * whole
    TECHNIQUE.finalise(model, config)  # type: ignore[misc]
    assert evaluation.evaluate(model, split, device="cpu").correct == after


def _from(split: Any) -> Any:
    around = surroundings(nn.Identity())
    around.batches = lambda: ((shown, labels) for _, shown, labels in split.batches(64))
    return around


def test_a_trial_ends_with_packed_weights(tmp_path: Path) -> None:
    """Through all stages: what is stored is small, reloads to the bit, and claims neither other work nor speed."""
    context = load_study(tiny_study(objectives=["top1_pct", "size_bytes", "params", "macs"])).context()
    storage = LocalStorage(tmp_path)

    def run(*steps: Any) -> Any:
        result = run_trial(TrialSpec("s", "t", Recipe(steps), 0, context, storage.url))
        assert result.status == "ok", result.failure
        return result

    whole, found = run(), run(full("tome", r=1), full("lsq", weight_bits=3))
    assert [s.kind for s in found.stages] == ["baseline", "surgery", "recovery"]
    assert found.conditions["parity_exact"]
    assert found.conditions["simulated"] is True
    assert found.metrics["params"] == whole.metrics["params"]
    assert found.metrics["size_bytes"] < 0.6 * whole.metrics["size_bytes"]
    steps = artefact.manifest(tmp_path / "stages" / found.stages[-1].key)["steps"]
    assert steps[-1]["resolved"]["stored"] == "packed"
    loaded = artefact.load(tmp_path / "stages" / found.stages[-1].key)
    assert [part for part in loaded.modules() if isinstance(part, Stored)]
