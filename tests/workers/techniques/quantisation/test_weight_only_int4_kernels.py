"""Products with packed 4-bit weights: against the same weights unpacked, in every shape; CUDA against the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from workers.techniques.quantisation import weight_only_int4_kernels
from workers.techniques.quantisation.shared_affine import grouped_int4, pack_nibbles, packed_bytes
from workers.techniques.quantisation.weight_only import Config, empty_layer

SHAPES = [(48, 64, 32), (65, 37, 32), (8, 256, 128), (3, 130, 64)]


def weights(rows: int, columns: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As they are stored, scale, zero, and as float32."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    q, scale, zero = grouped_int4(weight, group)
    wide = [part.float().repeat_interleave(group, 1)[:, :columns] for part in (scale, zero)]
    return pack_nibbles(q), scale, zero, (q.float() - 8) * wide[0] + wide[1]


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_product_is_that_of_the_unpacked_weights(rows: int, columns: int, group: int, tokens: int) -> None:
    stored, scale, zero, weight = weights(rows, columns, group)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = weight_only_int4_kernels.product(x, weight_only_int4_kernels.pack(stored, scale, zero, columns, group))
    assert (found.dtype, found.shape) == (torch.bfloat16, (tokens, rows))
    expected = x.float() @ weight.T
    assert (found.float() - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_cuda_s_nibbles_by_hand() -> None:
    q = torch.tensor([[1, 2, 15, 0], [0, 15, 8, 9]], dtype=torch.uint8)
    assert weight_only_int4_kernels.neighbours(q).tolist() == [[0x12, 0xF0], [0x0F, 0x89]]


@pytest.mark.parametrize(("columns", "count"), [(32, 2), (64, 4), (96, 2), (128, 8), (192, 4), (384, 8)])
def test_tiles_fill_the_columns(columns: int, count: int) -> None:
    assert weight_only_int4_kernels.tiles(columns) == count


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a PyTorch that was built with CUDA; no device")
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_cuda_s_operators_take_the_shapes(rows: int, columns: int, group: int) -> None:
    """PyTorch's own rules of shapes, types and layouts; nothing is calculated."""
    with FakeTensorMode():
        scale = torch.empty(rows, -(-columns // group), dtype=torch.bfloat16, device="cuda")
        stored = torch.empty(rows, packed_bytes(columns, 4), dtype=torch.uint8, device="cuda")
        packed = weight_only_int4_kernels.pack(stored, scale, scale, columns, group)
        found = weight_only_int4_kernels.product(torch.empty(5, columns, dtype=torch.bfloat16, device="cuda"), packed)
    assert (found.shape, found.device.type) == ((5, rows), "cuda")


@pytest.mark.gpu(capability=(8, 0))
@pytest.mark.parametrize("tokens", [1, 17, 200])
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_cuda_s_product_is_that_of_the_cpu(rows: int, columns: int, group: int, tokens: int) -> None:
    stored, scale, zero, _ = weights(rows, columns, group)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = weight_only_int4_kernels.product(
        x, weight_only_int4_kernels.pack(stored, scale, zero, columns, group)
    ).float()
    packed = weight_only_int4_kernels.pack(stored.cuda(), scale.cuda(), zero.cuda(), columns, group)
    found = weight_only_int4_kernels.product(x.cuda(), packed).float().cpu()
    assert (found - expected).abs().max() <= 2**-6 * expected.abs().max()


@pytest.mark.gpu(capability=(8, 0))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_goes_to_cuda_and_back(dtype: torch.dtype) -> None:
    linear = nn.Linear(37, 65)
    layer = empty_layer(linear, Config(bits=4, kernel="packed"), 4)
    layer.quantise_(linear.weight)
    layer.bias = linear.bias.detach()
    x = torch.randn(2, 9, 37, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        expected = layer(x)
        found = layer.to("cuda")(x.cuda())
        assert found.dtype == dtype
        assert (found.cpu() - expected).abs().max() <= 2**-6 * expected.abs().max()
        assert torch.equal(layer.to("cpu")(x), expected)
