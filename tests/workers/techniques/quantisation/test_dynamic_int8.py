"""dynamic_int8: PyTorch's own module as the reference, sizes, and rebuilding from stored tensors."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from workers import artefact, models
from workers.tasks import TaskInfo
from workers.techniques.quantisation import dynamic_int8
from workers.techniques.quantisation.dynamic_int8 import Config, DynamicInt8Linear
from workers.techniques.quantisation.shared_affine import symmetric_int8
from workers.techniques.record import Applied

DATA = TaskInfo(num_classes=10, in_chans=1, image_size=8, class_names=tuple("0123456789"))
MODEL = {"family": "timm", "name": None, "create": {"patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 4}}
NOTHING: Any = None


def build() -> nn.Module:
    torch.manual_seed(0)
    return models.build(MODEL, DATA).eval()


def convert(model: nn.Module, **config: Any) -> Applied:
    return dynamic_int8.TECHNIQUE.apply(model, Config(**config), NOTHING)


def layer(linear: nn.Linear, *, per_channel: bool = True) -> DynamicInt8Linear:
    bias = None if linear.bias is None else linear.bias.detach()
    return DynamicInt8Linear(*symmetric_int8(linear.weight, per_channel=per_channel), bias)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape", [(37, 65), (64, 192), (1, 3)])
def test_dequantised_weight_is_within_half_a_step(shape: tuple[int, int], per_channel: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    q, scale = symmetric_int8(weight, per_channel=per_channel)
    step = scale[:, None] if per_channel else scale
    assert q.dtype == torch.int8
    assert ((q.float() * step - weight).abs() <= step * 0.5001).all()
    assert torch.allclose(scale.max(), weight.abs().max() / 127.5)


def test_rows_of_zeros_stay_zero() -> None:
    q, scale = symmetric_int8(torch.zeros(2, 5), per_channel=True)
    assert not q.any()
    assert (scale > 0).all()


def test_per_tensor_equals_pytorch_quantize_dynamic() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(37, 65)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every entry into torch.ao.quantization warns that it is deprecated
        theirs = torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(linear)), {nn.Linear})
    x = torch.randn(4, 11, 37)
    with torch.inference_mode():
        assert torch.equal(layer(linear, per_channel=False)(x), theirs(x))


@pytest.mark.parametrize("bias", [True, False])
def test_close_to_the_slow_integer_product(bias: bool) -> None:
    """The reference: activations to 7 bits over their own range (zero included), an exact product, the scales."""
    torch.manual_seed(0)
    linear = nn.Linear(37, 65, bias=bias)
    ours, x = layer(linear), torch.randn(9, 37)
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    step = (high - low) / 127
    zero = (-low / step).round()
    levels = ((x / step).round() + zero).clamp(0, 127) - zero
    exact = levels.double() @ ours.weight.double().T * (step.double() * ours.scale.double())
    expected = exact + (linear.bias.double() if bias else 0)
    assert torch.allclose(ours(x).double(), expected, atol=1e-5)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_every_linear_is_replaced_and_logits_stay_close(granularity: str) -> None:
    images = torch.randn(5, 1, 8, 8)
    with torch.inference_mode():
        expected = build()(images)
        applied = convert(build(), granularity=granularity)
        found = applied.model(images)
    assert len(applied.changed) == 2 * 4 + 1
    assert not [m for m in applied.model.modules() if isinstance(m, nn.Linear)]
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_skip_head_leaves_both_heads_of_a_distilled_model() -> None:
    section = {"family": "timm", "name": "deit_tiny_distilled_patch16_224", "create": {"patch_size": 2, "depth": 1}}
    model: Any = convert(models.build(section, DATA), skip_head=True).model
    assert isinstance(model.head, nn.Linear)
    assert isinstance(model.head_dist, nn.Linear)
    assert isinstance(model.blocks[0].mlp.fc1, DynamicInt8Linear)


def test_same_input_same_result_after_copying_and_moving() -> None:
    applied = convert(build())
    images = torch.randn(5, 1, 8, 8)
    with torch.inference_mode():
        first = applied.model(images)
        assert torch.equal(copy.deepcopy(applied.model)(images), first)
        assert torch.equal(applied.model.to("cpu")(images), first)
        assert torch.equal(convert(build()).model(images), first)


def test_new_values_reach_the_kernel() -> None:
    torch.manual_seed(0)
    one, other, x = layer(nn.Linear(8, 4)), layer(nn.Linear(8, 4)), torch.randn(2, 8)
    one(x)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x))


def test_size_of_a_deit_small() -> None:
    section = {"family": "timm", "name": "deit_small_patch16_224", "create": {}}
    data = TaskInfo(num_classes=1000, in_chans=3, image_size=224, class_names=())
    model = models.build(section, data)

    def size(steps: list[dict[str, Any]]) -> int:
        files = artefact.pack(model, model_description=models.describe(section, data), steps=steps)
        return sum(map(len, files.values()))

    whole = size([])
    applied = convert(model)
    packed = size([{"technique": "dynamic_int8", "version": 1, "resolved": applied.resolved}])
    assert whole == pytest.approx(84.2 * 2**20, rel=0.01)
    assert 3.7 < whole / packed < 3.95
    assert packed == pytest.approx(22.4 * 2**20, rel=0.01)


def test_check_refuses_cuda() -> None:
    info = models.model_info(build(), "cpu")
    assert dynamic_int8.TECHNIQUE.check(info, Config()) is None
    reason = dynamic_int8.TECHNIQUE.check(dataclasses.replace(info, device="cuda"), Config())
    assert reason is not None
    assert "CPU only" in reason
