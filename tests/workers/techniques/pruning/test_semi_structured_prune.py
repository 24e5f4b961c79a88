"""semi_structured_prune: the pattern and its storage by hand, PyTorch's own packing as the reference, training, reloading, CUDA."""

from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from tests.workers.techniques.models import images, surroundings, vit
from tests.workers.techniques.quantised import require_reload
from tests.workers.techniques.vlm import FAMILIES, apply, describe, padded, vlm
from workers import artefact
from workers.inputs import Inputs
from workers.measuring.counting import count_macs, count_params
from workers.techniques.pruning import semi_structured_prune
from workers.techniques.pruning.semi_structured_prune import Config, SparseLinear, compress, expand
from workers.techniques.quantisation import weight_only
from workers.techniques.quantisation.shared_affine import NotQuantisable, pack_bits, unquantised

TECHNIQUE = semi_structured_prune.TECHNIQUE


def applied(model: Any, **config: Any) -> Any:
    return TECHNIQUE.apply(model, Config(**config), surroundings(model))


def layer(inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, SparseLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, dtype=dtype)
    return linear, SparseLinear.of(linear)


# --- pattern and packing ----------------------------------------------------------------------------------------------


def test_a_row_by_hand() -> None:
    row = torch.tensor([[1.0, -3, 2, 0, 5, 5, 5, 5, 0, 0, 0, -7]])
    values, positions = compress(row)
    assert values.tolist() == [[-3.0, 2, 5, 5, 0, -7]]  # of equal ones the first
    assert positions.tolist() == [[1, 2, 0, 1, 0, 3]]
    assert expand(values, positions, 12).tolist() == [[0.0, -3, 2, 0, 5, 5, 0, 0, 0, 0, 0, -7]]
    # Two bits each, a byte holding positions that lie a quarter of the row apart: 6 are 8 with padding, 2 bytes.
    assert pack_bits(positions, 2).tolist() == [[1 | 0 << 2 | 0 << 4, 2 | 1 << 2 | 3 << 4]]


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 8, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_left_is_bit_for_bit_and_the_rest_is_zero(columns: int, dtype: torch.dtype) -> None:
    weight = torch.randn(7, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = expand(*compress(weight), columns)
    assert found.dtype == dtype
    for start in range(0, columns, 4):
        group, kept = weight[:, start : start + 4], found[:, start : start + 4]
        smallest = group.abs().argsort(dim=1)[:, : max(0, group.shape[1] - 2)]
        assert torch.equal(kept, group.scatter(1, smallest, 0.0))


def test_every_pattern_survives_the_file() -> None:
    rows = torch.zeros(6, 4)
    for row, kept in zip(rows, combinations(range(4), 2), strict=True):
        row[list(kept)] = 1.0
    linear = nn.Linear(4, 6)
    linear.weight.data = rows
    assert torch.equal(SparseLinear.of(linear).dense(), rows)


def test_17_bits_a_weight_and_9() -> None:
    for dtype, bits in ((torch.float32, 17), (torch.bfloat16, 9)):
        _, found = layer(64, 32, dtype)
        assert 8 * (found.values.nbytes + found.positions.nbytes) == bits * 64 * 32


def test_the_kernels_packing_of_the_weight_holds_the_same_values() -> None:
    """PyTorch's own conversion to the layout of its CUTLASS kernels, which runs on the CPU."""
    _, found = layer(128, 64, torch.bfloat16)
    values, meta = sparse_semi_structured_from_dense_cutlass(found.dense().detach())
    assert torch.equal(values, found.values)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), found.dense())


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (37, 65), (2, 3)])
def test_the_product_is_that_of_the_weight_with_zeros(inputs: int, outputs: int) -> None:
    linear, found = layer(inputs, outputs)
    x = torch.randn(2, 5, inputs)
    expected = F.linear(x, expand(*compress(linear.weight), inputs), linear.bias)
    assert torch.equal(found(x), expected)
    assert torch.equal(found.plain()(x), expected)


def test_a_training_keeps_the_pattern_and_moves_what_is_left() -> None:
    _, found = layer(16, 8)
    before = found.dense().detach().clone()
    optimiser = torch.optim.AdamW(found.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        found(torch.randn(4, 16)).square().sum().backward()
        optimiser.step()
    after = found.dense()
    assert torch.equal(after == 0, before == 0)
    assert bool((after != before)[before != 0].all())


def test_the_gradient_is_the_dense_one_where_weights_are_left() -> None:
    _, found = layer(16, 8)
    plain, x = found.plain(), torch.randn(4, 16)
    found(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert found.values.grad is not None
    assert plain.weight.grad is not None
    kept = plain.weight.grad.reshape(8, 4, 4)[found.dense().reshape(8, 4, 4) != 0]
    torch.testing.assert_close(found.values.grad.flatten(), kept)


# --- the technique ----------------------------------------------------------------------------------------------------


def test_it_counts_and_is_timed_as_the_whole_layers() -> None:
    whole, found = vit(), vit()
    applied(found)
    twin = unquantised(found)
    with torch.inference_mode():
        assert torch.equal(twin(images()), found(images()))
    assert count_params(twin) == count_params(whole)
    assert count_macs(twin, (1, 3, 16, 16)) == count_macs(whole, (1, 3, 16, 16))


@pytest.mark.parametrize(("layers", "words"), [("mlp", {"fc1", "fc2"}), ("attention", {"qkv", "proj"})])
def test_a_choice_of_layers(layers: str, words: set[str]) -> None:
    assert {name.split(".")[-1] for name in applied(vit(), layers=layers).changed} == words


def test_a_quantiser_refuses_it() -> None:
    model = vit()
    applied(model)
    with pytest.raises(NotQuantisable, match="SparseLinear already"):
        weight_only.TECHNIQUE.apply(model, weight_only.Config(), surroundings(model))


@pytest.mark.parametrize("dtype", [None, "bf16", "fp16"])
def test_the_artefact_computes_the_same_and_is_as_small_as_it_says(dtype: str | None, tmp_path: Path) -> None:
    after: list[Any] = [("precision", {"dtype": dtype})] if dtype else []
    model = require_reload([("semi_structured_prune", {}), *after], tmp_path / "a")
    sparse = [part for part in model.modules() if isinstance(part, SparseLinear)]
    weights = sum(part.in_features * part.out_features for part in sparse)
    bits = 8 * sum(part.values.nbytes + part.positions.nbytes for part in sparse)
    assert bits == (9 if dtype else 17) * weights
    dense = sum(p.nbytes for name, p in model.named_parameters() if not name.endswith(".values"))
    size = (tmp_path / "a" / artefact.TENSORS).stat().st_size
    assert size < bits // 8 + dense + 20_000  # the header and nothing else


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vision_language_model(family: str, tmp_path: Path) -> None:
    model = vlm(family)
    found = apply(TECHNIQUE, model)
    assert not [name for name in found.changed if "pooler" in name or "head" in name or "transform" in name]
    steps = [{"technique": "semi_structured_prune", "version": 1, "resolved": found.resolved}]
    artefact.save(model, tmp_path / "a", model_description=describe(family), steps=steps)
    example = Inputs(padded())
    with torch.inference_mode():
        assert torch.equal(artefact.load(tmp_path / "a")(example), model(example))


# --- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [None, (7, 5), (8, 0), (9, 0)])
def test_a_speed_is_claimed_only_where_the_trial_s_device_has_the_kernel(
    capability: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert TECHNIQUE.simulated(Config(), "cpu")  # whatever device is beside it
    assert TECHNIQUE.simulated(Config(), "cuda") is (capability in (None, (7, 5)))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert TECHNIQUE.simulated(Config(), "cuda")


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (37, 65)])
def test_the_kernel_gets_whole_tiles_and_the_weights_of_now(
    inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense tensor stands in for PyTorch's sparse one, which needs a device; both are the weight of ``F.linear``."""
    asked: list[torch.Size] = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: asked.append(weight.shape) or weight)
    _, found = layer(inputs, outputs)
    x = torch.randn(5, inputs).bfloat16()
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(found.kernel_product(x), F.linear(x, found.dense().bfloat16()))
    assert len(asked) == 1
    assert not any(side % of for side, of in zip(asked[0], semi_structured_prune.MULTIPLE, strict=True))
    with torch.no_grad():
        found.values.mul_(2)  # a step of a training
        torch.testing.assert_close(found.kernel_product(x), F.linear(x, found.dense().bfloat16()))
        found.values.data = found.values.data.half()  # precision
        torch.testing.assert_close(found.kernel_product(x), F.linear(x.half(), found.dense()))
    assert copy.deepcopy(found)._packing is None


@pytest.mark.gpu(capability=(8, 0))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 17, 256])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 64), (37, 65)])
def test_cuda_s_product_is_that_of_the_weight_with_zeros(
    inputs: int, outputs: int, rows: int, dtype: torch.dtype
) -> None:
    _, found = layer(inputs, outputs, dtype)
    x = torch.randn(2, rows, inputs).to(dtype)
    found = found.to("cuda")
    with torch.inference_mode():
        expected = F.linear(x.double(), found.dense().double().cpu(), found.bias.double().cpu())  # type: ignore[union-attr]
        product = found(x.cuda())
        assert found._packing is not None  # it was the kernel
    assert product.dtype == dtype
    assert (product.double().cpu() - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.gpu(capability=(8, 0))
def test_cuda_trains_without_the_kernel_and_evaluates_with_it() -> None:
    model = vit()
    applied(model)
    model = model.to("cuda")
    batch = images().cuda()
    model.train()(batch).square().sum().backward()
    assert not [part for part in model.modules() if isinstance(part, SparseLinear) and part._packing is not None]
    with torch.inference_mode():
        found = model.eval()(batch)
        expected = unquantised(model)(batch)
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
