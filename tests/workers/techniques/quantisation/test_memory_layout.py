"""Weights that lie column after column in memory: a technique before may leave them so, and kernels read memory as it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.workers.techniques.models import images, surroundings
from tests.workers.techniques.test_contract import SAMPLES
from workers import artefact, models
from workers.tasks import TaskInfo
from workers.techniques import NAMES, registry
from workers.techniques.quantisation import shared_integer_linear, weight_only
from workers.techniques.quantisation.dynamic_int8 import DynamicInt8Linear
from workers.techniques.quantisation.fp8 import Float8Linear
from workers.techniques.quantisation.shared_affine import pack_bits, symmetric_int8
from workers.techniques.quantisation.shared_integer_linear import IntegerLinear
from workers.techniques.record import make_config

SIZE = {"patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4}
DATA = TaskInfo(num_classes=5, in_chans=3, image_size=16, class_names=tuple("01234"))


def by_columns(weight: Tensor) -> Tensor:
    """The same values, in memory column after column."""
    return weight.detach().t().contiguous().t()


def linears() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    rows, columns = nn.Linear(64, 48), nn.Linear(64, 48)
    columns.load_state_dict(rows.state_dict())
    columns.weight = nn.Parameter(by_columns(rows.weight))
    assert columns.weight.stride() != rows.weight.stride()
    return rows, columns


def weight_only_layer(linear: nn.Linear, **config: Any) -> nn.Module:
    made = weight_only.Config(**config)
    layer = weight_only.empty_layer(linear, made, int(made.bits))
    layer.quantise_(linear.weight)
    layer.bias = linear.bias.detach()
    return layer


LAYERS: dict[str, Any] = {
    "integers of tokens": IntegerLinear.of,
    "integers with a scale": lambda linear: IntegerLinear.of(linear, 0.02, 128),
    "fp8": Float8Linear.of,
    "dynamic": lambda linear: DynamicInt8Linear(*symmetric_int8(linear.weight, per_channel=True), linear.bias),
    "dynamic, one scale": lambda linear: DynamicInt8Linear(
        *symmetric_int8(linear.weight, per_channel=False), linear.bias
    ),
    "int8 packed": lambda linear: weight_only_layer(linear, kernel="packed"),
    "int8 dequantised": weight_only_layer,
    "int8 in groups": lambda linear: weight_only_layer(linear, granularity="group"),
    "int4 packed": lambda linear: weight_only_layer(linear, bits=4, kernel="packed"),
    "int3": lambda linear: weight_only_layer(linear, bits=3, granularity="per_channel"),
}


@torch.inference_mode()
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("kernel", [False, True])
def test_a_layer_computes_the_same_of_both(make: Any, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With oneDNN's kernel too where the CPU has no VNNI: its sums may saturate there, in both."""
    monkeypatch.setattr(shared_integer_linear, "CPU_KERNEL", kernel and torch.backends.mkldnn.is_available())
    x = torch.randn(17, 64, generator=torch.Generator().manual_seed(1))
    rows, columns = map(make, linears())
    assert torch.equal(columns(x), rows(x))
    torch.testing.assert_close(rows(by_columns(x)), rows(x), atol=1e-6, rtol=1e-6)
    assert all(tensor.is_contiguous() for tensor in columns.state_dict().values())


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["integers of tokens", "dynamic", "int8 packed", "fp8"])
def test_buffers_that_lie_so_are_packed_as_well(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are where a layer got its tensors from elsewhere."""
    monkeypatch.setattr(shared_integer_linear, "CPU_KERNEL", torch.backends.mkldnn.is_available())
    x = torch.randn(17, 64, generator=torch.Generator().manual_seed(1))
    layer = LAYERS[kind](linears()[0])
    expected = layer(x)
    layer.load_state_dict({**layer.state_dict(), "weight": by_columns(layer.weight)}, assign=True)
    assert not layer.weight.is_contiguous()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_bits_lie_row_after_row(bits: int) -> None:
    q = torch.randint(0, 2**bits, (6, 24), generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(by_columns(q), bits)
    assert packed.is_contiguous()
    assert torch.equal(packed, pack_bits(q, bits))


QUANTISERS = [(name, SAMPLES[name]) for name in NAMES if registry()[name].family == "quantisation"]
QUANTISERS.append(("gptq", {"bits": 8, "images": 64}))


@pytest.mark.parametrize(("name", "config"), QUANTISERS)
def test_a_quantiser_of_such_a_model_ships_what_it_computes(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    section = {"family": "timm", "name": None, "create": SIZE}
    torch.manual_seed(0)
    model: Any = models.build(section, DATA).eval()
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(by_columns(part.weight))
    technique = registry()[name]
    made = make_config(technique.Config, config)
    applied = technique.apply(model, made, surroundings(model))
    if technique.finalise is not None:
        applied.resolved |= technique.finalise(applied.model, made)
    step = {"technique": name, "version": technique.version, "resolved": applied.resolved}
    artefact.save(applied.model, tmp_path, model_description=models.describe(section, DATA), steps=[step])
    loaded = artefact.load(tmp_path)
    with torch.inference_mode():
        assert torch.equal(loaded(images()), applied.model.eval()(images()))
    odd = [key for key, tensor in applied.model.state_dict().items() if not tensor.is_contiguous()]
    assert odd == []
