"""diffq: levels and noise by hand, gradients of the widths numerically, a size that is what the penalty says, trials."""

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
from tests.workers.techniques.models import VARIANTS, images, surroundings, vit
from workers import artefact, evaluation
from workers.measuring.counting import count_macs, count_params
from workers.node.storage import LocalStorage
from workers.run import run_trial
from workers.techniques import registry
from workers.techniques.composition import legal_orders
from workers.techniques.quantisation import diffq
from workers.techniques.quantisation.diffq import TECHNIQUE, Config, LearnedWidths, MixedWidths, steps_of, widths_of
from workers.techniques.quantisation.shared_affine import NotQuantisable, unquantised
from workers.training.loop import train
from workers.trial import Recipe, TrialSpec


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.eval()(images())
    return found


def layer(weight: Tensor, widths: list[float], group_size: int = 8) -> LearnedWidths:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data = weight.clone()
    found = LearnedWidths(linear, group_size)
    share = (torch.tensor(widths) - 2) / 13
    found.width_logits.data = torch.logit(share.clamp(1e-6, 1 - 1e-6))
    return found


def spread(model: nn.Module) -> None:
    """Gives groups all widths."""
    generator = torch.Generator().manual_seed(0)
    for part in model.modules():
        if isinstance(part, LearnedWidths):
            part.width_logits.data = 4 * torch.randn(part.width_logits.shape, generator=generator)


# --- quantiser --------------------------------------------------------------------------------------------------------


def test_widths_are_a_sigmoid_between_2_and_15() -> None:
    found = widths_of(torch.tensor([-100.0, 0.0, 100.0]))
    assert found.tolist() == pytest.approx([2, 8.5, 15])
    fresh: Any = TECHNIQUE.apply(vit(), Config(), surroundings(vit())).model.blocks[0].attn.qkv
    assert widths_of(fresh.width_logits.detach()).tolist() == pytest.approx([8.0] * (96 * 32 // 8))


def test_steps_by_hand() -> None:
    steps = steps_of(torch.tensor(3.0), torch.tensor([2.0, 4.0, math.log2(1.75)]))
    assert steps.tolist() == pytest.approx([1.0, 0.2, 4.0])


def test_rounding_by_hand() -> None:
    """From -1 to 2: levels one apart with 2 bits, 0.2 apart with 4."""
    values = [-1.0, 2.0, 0.4, 0.6, -0.6, -0.4, 1.4, 1.6]
    found = layer(torch.tensor([values, values]), [2.0, 4.0]).rounded()
    torch.testing.assert_close(found[0], torch.tensor([-1.0, 2, 0, 1, -1, 0, 1, 2]))
    torch.testing.assert_close(found[1], torch.tensor(values))


def test_noise_is_as_long_as_a_step_and_as_strong_as_a_rounding_s_error() -> None:
    torch.manual_seed(0)
    weight = torch.rand(64, 64)
    weight[0, 0], weight[0, 1] = 0.0, 1.0
    found = layer(weight, [3.0] * 512).noisy().detach() - weight
    step = 1 / 7
    assert float(found.abs().max()) <= step / 2
    assert float(found.std()) == pytest.approx(step / math.sqrt(12), rel=0.03)
    assert abs(float(found.mean())) < 0.03 * step
    error = layer(weight, [3.0] * 512).rounded() - weight
    assert float(error.std()) == pytest.approx(float(found.std()), rel=0.05)


def test_the_widths_gradient_numerically() -> None:
    """Through the noise, which is drawn the same each time; and 1 for the weight, straight through."""
    torch.manual_seed(0)
    weight, x = torch.randn(4, 6), torch.randn(5, 6)
    found = layer(weight, [3.0, 4.5, 6.0])

    def value() -> Tensor:
        torch.manual_seed(1)
        result: Tensor = (found(x) ** 2).double().sum()
        return result

    value().backward()
    assert found.width_logits.grad is not None
    for i in range(3):
        h, kept = 1e-2, float(found.width_logits.data[i])
        ends = []
        for sign in (1, -1):
            found.width_logits.data[i] = kept + sign * h
            ends.append(float(value().detach()))
        found.width_logits.data[i] = kept
        assert float(found.width_logits.grad[i]) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-2)
    torch.manual_seed(1)
    used = found.noisy().detach().requires_grad_()
    ((x @ used.T + found.bias.detach()) ** 2).sum().backward()
    torch.testing.assert_close(found.weight.grad, used.grad)


def test_the_penalty_and_its_gradient_by_hand() -> None:
    model: Any = nn.ModuleDict({"one": layer(torch.randn(4, 8), [2.5, 4.0, 8.0, 11.0])})
    found = diffq.mebibytes(model)
    bits = 8 * (2.5 + 4 + 8 + 11) + 4 * 4 + 64
    assert float(found.detach()) == pytest.approx(bits / 8 / 2**20)
    found.backward()
    share = model["one"].width_logits.detach().sigmoid()
    torch.testing.assert_close(model["one"].width_logits.grad, 8 * 13 * share * (1 - share) / 2**23)


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 37), (1, 8), (3, 1), (16, 64)])
@pytest.mark.parametrize("group_size", [8, 32])
def test_any_shape_and_all_widths_are_packed_to_the_bit(shape: tuple[int, int], group_size: int) -> None:
    torch.manual_seed(0)
    groups = -(-shape[0] * shape[1] // group_size)
    widths = [2.0 + i % 14 for i in range(groups)]
    found = layer(torch.randn(shape), widths, group_size).eval()
    made = found.stored()
    assert torch.equal(made.dequantised(torch.float32), found.rounded())
    x = torch.randn(2, shape[1])
    assert torch.equal(made(x), found(x))
    bits = sum(group_size * w for w in widths) + 4 * groups
    stored = 8 * (made.weight.nbytes + made.widths.nbytes)
    assert 0 <= stored - bits <= 4  # the last byte of the widths
    assert made.low.nbytes + made.span.nbytes == 8


def test_the_size_is_what_the_penalty_says_but_for_rounding() -> None:
    model = TECHNIQUE.apply(vit(), Config(), surroundings(vit())).model
    spread(model)
    predicted = 2**20 * float(diffq.mebibytes(model).detach())
    parts = [part for part in model.modules() if isinstance(part, LearnedWidths)]
    rounded = [8 * (widths_of(p.width_logits.detach()).round() - widths_of(p.width_logits.detach())) for p in parts]
    TECHNIQUE.finalise(model, Config())  # type: ignore[misc]
    stored = [part for part in model.modules() if isinstance(part, MixedWidths)]
    actual = sum(t.nbytes for part in stored for name, t in part.named_buffers() if name != "bias")
    expected = predicted + sum(float(r.sum()) for r in rounded) / 8
    assert abs(actual - expected) < len(stored) + 1  # half a byte where a layer has an odd number of groups
    assert abs(actual - predicted) < 0.01 * predicted


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group_size", [8, 128])
def test_packing_changes_no_bit_and_is_rebuilt(variant: str, group_size: int) -> None:
    model, config = vit(variant), Config(group_size=group_size)
    applied = TECHNIQUE.apply(model, config, surroundings(model))
    spread(model)
    before = logits(model)
    resolved = json.loads(json.dumps({**applied.resolved, **TECHNIQUE.finalise(model, config)}))  # type: ignore[misc]
    assert torch.equal(logits(model), before)
    skeleton = TECHNIQUE.rebuild(vit(variant, device="meta"), resolved)
    skeleton.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, strict=True, assign=True)
    assert torch.equal(logits(skeleton), before)
    whole, twin = vit(variant), unquantised(model)
    assert count_params(twin) == count_params(whole)
    assert count_macs(twin, (1, 3, 16, 16)) == count_macs(whole, (1, 3, 16, 16))


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
def test_a_constant_weight_is_exact(value: float) -> None:
    found = layer(torch.full((4, 10), value), [2.0, 3.0, 8.0, 15.0, 5.0])
    assert torch.equal(found.stored().dequantised(torch.float32), found.weight.detach())
    assert bool(found.noisy().isfinite().all())


def test_nan_is_an_error_with_the_layer_s_name() -> None:
    model = vit()
    model.blocks[2].attn.proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NotQuantisable, match=r"the weight of blocks\.2\.attn\.proj must be finite"):
        TECHNIQUE.apply(model, Config(), surroundings(model))


@pytest.mark.parametrize("other", ["weight_only", "lsq", "qat", "diffq"])
@pytest.mark.parametrize("stored", [False, True])
def test_a_model_is_quantised_once_only(other: str, stored: bool) -> None:
    model = vit()
    TECHNIQUE.apply(model, Config(), surroundings(model))
    if stored:
        TECHNIQUE.finalise(model, Config())  # type: ignore[misc]
    assert not legal_orders(("diffq", other))
    technique = registry()[other]
    with pytest.raises(NotQuantisable, match=r"blocks\.0\.attn\.qkv is a \w+ already"):
        technique.apply(model, technique.Config(), surroundings(model))


def test_the_head_may_be_left_alone() -> None:
    model = vit("distil")
    applied = TECHNIQUE.apply(model, Config(skip_head=True), surroundings(model))
    assert len(applied.changed) == 12
    assert type(model.head_dist) is nn.Linear


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_higher_price_makes_a_smaller_model_that_still_knows() -> None:
    split = digits(600)
    sizes, right = [], []
    for penalty in (0.01, 100.0):
        model = learned(split)
        config = Config(penalty=penalty)
        TECHNIQUE.apply(model, config, surroundings(model))
        before = float(diffq.mebibytes(model).detach())
        train(model, split, {**SETTINGS, "epochs": 3}, seed=0, device="cpu", steps=[(TECHNIQUE, config)])
        sizes.append(float(diffq.mebibytes(model).detach()) / before)
        correct = evaluation.evaluate(model, split, device="cpu").correct
        TECHNIQUE.finalise(model, config)  # type: ignore[misc]
        assert evaluation.evaluate(model, split, device="cpu").correct == correct
        right.append(correct)
    assert sizes[1] < 0.9
    assert sizes[1] < sizes[0] - 0.1
    assert right[1] > 0.7 * right[0] > 100


def test_a_trial_ends_with_packed_weights(tmp_path: Path) -> None:
    """Through all stages, and beside structured pruning and token merging."""
    context = load_study(tiny_study(objectives=["top1_pct", "size_bytes", "params", "macs"])).context()
    storage = LocalStorage(tmp_path)

    def run(*steps: Any) -> Any:
        result = run_trial(TrialSpec("s", "t", Recipe(steps), 0, context, storage.url))
        assert result.status == "ok", result.failure
        return result

    start = (full("magnitude_prune", head_ratio=0.5, mlp_ratio=0.25), full("tome", r=1))
    whole, found = run(*start), run(*start, full("diffq", penalty=100.0))
    assert [s.kind for s in found.stages] == ["baseline", "surgery", "recovery"]
    assert found.conditions["parity_exact"]
    assert found.conditions["simulated"] is True
    assert found.metrics["params"] == whole.metrics["params"]
    assert found.metrics["macs"] == whole.metrics["macs"]
    folder = tmp_path / "stages" / found.stages[-1].key
    sizes = [artefact.size_bytes(f) for f in (folder, tmp_path / "stages" / whole.stages[-1].key)]
    assert sizes[0] < sizes[1]
    assert [part for part in artefact.load(folder).modules() if isinstance(part, MixedWidths)]
