"""fp8: the format against PyTorch's own, values worked by hand, PyTorch's scaled product as the reference, stored bytes, CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.workers.techniques.models import images, surroundings, vit
from workers import artefact, models
from workers.tasks import TaskInfo
from workers.techniques.quantisation import fp8
from workers.techniques.quantisation.fp8 import LARGEST, VALUES, Config, Float8Linear, decoded, encoded, rounded
from workers.techniques.quantisation.shared_affine import NotQuantisable

DATA = TaskInfo(num_classes=10, in_chans=1, image_size=8, class_names=tuple("0123456789"))
MODEL = {"family": "timm", "name": None, "create": {"patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 4}}


def build() -> nn.Module:
    torch.manual_seed(0)
    return models.build(MODEL, DATA).eval()


def layer(inputs: int, outputs: int, *, bias: bool = True) -> tuple[nn.Linear, Float8Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    return linear, Float8Linear.of(linear)


def every_number() -> torch.Tensor:
    """The finite numbers of E4M3, ascending: 253, zero once."""
    found = torch.tensor(VALUES)
    return found[found.isfinite()].unique()


# --- the format -------------------------------------------------------------------------------------------------------


def test_each_byte_stands_for_what_pytorch_says() -> None:
    stored = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(
        torch.tensor(VALUES), stored.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True
    )
    assert sum(value != value for value in VALUES) == 2
    assert max(v for v in VALUES if v == v) == LARGEST


def test_values_by_hand() -> None:
    # The largest is 448, so the scale is 1; steps: 32 from 256 on, 1/8 from 1 on, 2^-9 below 2^-6.
    row = torch.tensor([[448.0, -300.0, 17.0, 1.0625, 1.1875, 2**-6, 1.5 * 2**-9, 2**-10]])
    codes, scale = encoded(row)
    assert scale.item() == 1
    assert codes.float().tolist() == [[448.0, -288.0, 16.0, 1.0, 1.25, 2**-6, 2**-8, 0.0]]  # ties go to even mantissas


@pytest.mark.parametrize("shape", [(37, 65), (64, 192), (1, 3)])
def test_what_is_stored_is_a_sixteenth_off_at_most(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    codes, scale = encoded(weight)
    found = decoded(codes.view(torch.uint8)) * scale
    smallest_step = scale * 2**-9
    assert ((found - weight).abs() <= torch.maximum(weight.abs() / 16, smallest_step / 2) * 1.0001).all()
    torch.testing.assert_close(found.abs().amax(1), weight.abs().amax(1))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-4])
def test_a_constant_row_is_exact(value: float) -> None:
    codes, scale = encoded(torch.full((2, 9), value))
    torch.testing.assert_close(codes.float() * scale, torch.full((2, 9), value), rtol=1e-6, atol=0)
    assert (scale > 0).all()


def test_rounding_in_plain_arithmetic_is_that_of_the_type() -> None:
    numbers = every_number()
    assert len(numbers) == 253
    between = (numbers[1:] + numbers[:-1]) / 2
    near = [v.nextafter(torch.full_like(v, end)) for v in (numbers, between) for end in (-500.0, 500.0)]
    torch.manual_seed(0)
    values = torch.cat([numbers, between, *near, torch.randn(10_000), 100 * torch.randn(10_000)]).clamp(-448, 448)
    assert torch.equal(rounded(values), values.to(torch.float8_e4m3fn).float())


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(64, 48, True), (37, 65, True), (16, 16, False)])
def test_product_is_pytorch_s_of_the_same_numbers(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    linear, found = layer(inputs, outputs, bias=bias)
    x = torch.randn(3, 5, inputs).to(dtype)
    weight, steps = encoded(linear.weight.detach())
    codes, scale = encoded(x.reshape(-1, inputs).float())
    expected = torch._scaled_mm(codes, weight.t(), scale_a=scale, scale_b=steps.t(), out_dtype=torch.float32)
    expected = (expected if linear.bias is None else expected + linear.bias.detach()).reshape(3, 5, outputs)
    with torch.inference_mode():
        product = found(x)
        plain = linear(x.float())
    assert product.dtype == dtype
    share = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert (product.float() - expected).abs().max() <= share * expected.abs().max()
    assert 0 < (product.float() - plain).abs().max() < 0.08 * plain.abs().max()  # rounding is there, and small


def test_a_large_channel_costs_small_ones_nothing() -> None:
    # 300 times as large as the others: steps of int8 would be larger than all of them.
    _, found = layer(32, 8, bias=False)
    x = torch.randn(20, 32)
    x[:, 3] = 300
    found.weight[:, 3] = 0
    small = decoded(found.weight) * found.scale[:, None]
    with torch.inference_mode():
        expected = x @ small.T
        assert (found(x) - expected).abs().max() < 0.05 * expected.abs().max()


def test_an_image_s_result_does_not_depend_on_the_others() -> None:
    model = fp8.TECHNIQUE.apply(vit(), Config(), surroundings(vit())).model
    batch = images(4)
    with torch.inference_mode():
        torch.testing.assert_close(model(batch)[:2], model(batch[:2]), rtol=1e-5, atol=1e-5)


def test_not_a_number_stays_one_in_its_own_token() -> None:
    _, found = layer(32, 8)
    x = torch.randn(3, 32)
    x[1, 7] = float("nan")
    with torch.inference_mode():
        assert found(x).isnan().any(dim=1).tolist() == [False, True, False]


def test_a_weight_that_is_not_finite_is_an_error_with_the_layer_s_name() -> None:
    model = build()
    model.get_submodule("blocks.1.mlp.fc1").weight.data[3, 5] = float("inf")  # type: ignore[union-attr, operator]
    with pytest.raises(NotQuantisable, match=r"blocks\.1\.mlp\.fc1"):
        fp8.TECHNIQUE.apply(model, Config(), surroundings(model))


def test_an_exported_layer_computes_the_same() -> None:
    _, found = layer(64, 48)
    x = torch.randn(3, 9, 64)
    program = torch.export.export(found, (x,)).module()
    with torch.inference_mode():
        torch.testing.assert_close(program(x), found(x), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_layer_computes_the_same() -> None:
    _, found = layer(64, 48)
    x = torch.randn(3, 9, 64)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(found)(x), found(x), rtol=1e-5, atol=1e-5)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_head", [False, True])
def test_a_reloaded_artefact_has_the_same_bits_and_a_byte_a_weight(skip_head: bool, tmp_path: Path) -> None:
    model = build()
    converted = fp8.TECHNIQUE.apply(model, Config(skip_head=skip_head), surroundings(model))
    steps = [{"technique": "fp8", "version": fp8.TECHNIQUE.version, "resolved": converted.resolved}]
    assert ("head" in converted.changed) is not skip_head
    artefact.save(converted.model, tmp_path, model_description=models.describe(MODEL, DATA), steps=steps)
    loaded = artefact.load(tmp_path)
    batch = torch.randn(5, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(loaded(batch), converted.model(batch))
    for name in converted.changed:
        part: Any = loaded.get_submodule(name)
        assert part.weight.dtype == torch.uint8
        assert part.weight.nbytes == part.in_features * part.out_features
        assert part.scale.dtype == torch.float32


def test_bytes_keep_their_type_when_the_model_is_converted() -> None:
    _, found = layer(32, 16)
    before = found.weight.clone()
    assert torch.equal(found.to(torch.bfloat16).weight, before)


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 6), (8, 9), (9, 0), (10, 0)])
def test_a_speed_is_claimed_only_where_the_trial_s_device_has_the_kernel(
    capability: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert fp8.TECHNIQUE.simulated(Config(), "cpu")  # whatever device is beside it
    assert fp8.TECHNIQUE.simulated(Config(), "cuda") is (capability in (None, (8, 0), (8, 6)))


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a PyTorch that was built with CUDA; no device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (37, 65)])
def test_cuda_s_operator_takes_the_shapes(
    inputs: int, outputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own rules of shapes, types and layouts; nothing is calculated."""
    monkeypatch.setattr(fp8, "has_kernel", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = Float8Linear(inputs, outputs, bias=True)
        for name, buffer in list(found.named_buffers()):
            setattr(found, name, torch.empty_like(buffer, device="cuda"))
        product = found(torch.empty(2, 9, inputs, dtype=dtype, device="cuda"))
        weight, scale = found.packing
    assert (product.shape, product.dtype, product.device.type) == ((2, 9, outputs), dtype, "cuda")
    assert (weight.dtype, weight.stride(0)) == (torch.float8_e4m3fn, 1)  # by columns, as the operator wants it
    assert scale.shape == (1, weight.shape[1])


@pytest.mark.gpu(capability=(8, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 17, 256])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (37, 65)])
def test_cuda_s_product_is_that_of_the_same_numbers(inputs: int, outputs: int, rows: int, dtype: torch.dtype) -> None:
    _, found = layer(inputs, outputs)
    x = torch.randn(2, rows, inputs).to(dtype)
    with torch.inference_mode():
        expected = found(x).float()
        product = found.to("cuda")(x.cuda())
        assert found.packing  # the kernel's own, so it was the kernel
    assert product.dtype == dtype
    assert (product.float().cpu() - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.gpu(capability=(8, 9))
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_cuda_s_compiled_model_computes_the_same() -> None:
    model = fp8.TECHNIQUE.apply(vit(), Config(), surroundings(vit())).model.to("cuda")
    batch = images(4).cuda()
    with torch.inference_mode():
        expected = model(batch)
        assert (torch.compile(model)(batch) - expected).abs().max() <= 0.05 * expected.abs().max()
