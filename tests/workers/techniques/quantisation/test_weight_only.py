"""weight_only: closed-form rounding, exact packing, torchao's arithmetic as the reference, both kernels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from workers import artefact, models
from workers.tasks import TaskInfo
from workers.techniques import registry
from workers.techniques.quantisation import weight_only, weight_only_int4_kernels
from workers.techniques.quantisation.shared_affine import (
    NotQuantisable,
    grouped_affine,
    grouped_int4,
    pack_bits,
    pack_nibbles,
    packed_bytes,
    symmetric_int8,
    unpack_bits,
    unpack_nibbles,
)
from workers.techniques.quantisation.weight_only import Config, GroupedLinear, Int8Linear
from workers.techniques.record import Applied

DATA = TaskInfo(num_classes=10, in_chans=1, image_size=8, class_names=tuple("0123456789"))
MODEL = {"family": "timm", "name": None, "create": {"patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 4}}
NOTHING: Any = None


def build(**create: Any) -> nn.Module:
    torch.manual_seed(0)
    section = {**MODEL, "create": {**MODEL["create"], **create}}
    return models.build(section, DATA).eval()


def convert(model: nn.Module, **config: Any) -> Applied:
    return weight_only.TECHNIQUE.apply(model, Config(**config), NOTHING)


def quantised(linear: nn.Linear, config: Config) -> Any:
    layer: Any = weight_only.empty_layer(linear, config, int(config.bits))
    layer.quantise_(linear.weight)
    layer.bias = linear.bias.detach()
    return layer


@pytest.mark.parametrize("columns", [1, 2, 37, 64])
def test_nibbles_survive_packing_in_exactly_half_the_bytes(columns: int) -> None:
    q = torch.randint(0, 16, (5, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_nibbles(q)
    assert (packed.dtype, packed.shape) == (torch.uint8, (5, (columns + 1) // 2))
    assert torch.equal(unpack_nibbles(packed, columns), q)


@pytest.mark.parametrize("bits", range(1, 16))
@pytest.mark.parametrize("columns", [1, 3, 7, 8, 37, 64, 129])
def test_any_width_survives_packing(bits: int, columns: int) -> None:
    q = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(bits))
    q[0], q[1] = 0, 2**bits - 1
    packed = pack_bits(q.to(torch.uint8 if bits <= 8 else torch.int32), bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (5, packed_bytes(columns, bits)))
    assert torch.equal(unpack_bits(packed, bits, columns).long(), q)
    whole = bits * columns / 8
    assert (
        whole <= packed_bytes(columns, bits) < whole + bits.bit_count()
    )  # a plane of each power of two ends at a byte
    if columns % 8 == 0:
        assert packed_bytes(columns, bits) == whole


def test_packing_by_hand() -> None:
    q = torch.tensor([[1, 2, 3, 0, 5, 6]], dtype=torch.uint8)  # 3 bits: a plane of the lower two, one of the highest
    low = [1 | 3 << 2 | 1 << 4, 2 | 0 << 2 | 2 << 4]  # columns 0, 2, 4 and 1, 3, 5
    high = [1 << 4 | 1 << 5]  # columns 4 and 5 are 4 or more
    assert pack_bits(q, 3).tolist() == [low + high]


@pytest.mark.parametrize("bits", [0, 16])
def test_there_are_widths_from_1_to_15(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be from 1 to 15"):
        packed_bytes(8, bits)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("rows", "columns", "group"), [(65, 64, 32), (3, 37, 32), (8, 20, 64), (4, 129, None)])
def test_every_width_is_within_half_a_step(bits: int, rows: int, columns: int, group: int | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns) + 0.3
    granularity = "per_channel" if group is None else "group"
    config = Config(bits=bits, granularity=granularity, group_size=group or 32)
    linear = nn.Linear(columns, rows)
    linear.weight.data = weight
    layer = quantised(linear, config)
    error = (layer.dequantised(torch.float32) - weight).abs()
    if bits == 8 and group is None:
        assert (error <= 0.501 * layer.scale[:, None]).all()
        return
    of_column = torch.arange(columns) // (group or columns)
    step, zero = layer.scale.float()[:, of_column], layer.zero.float()[:, of_column].abs()
    stored = 2**-8 if group else 2**-22
    assert (error <= 0.5 * step + ((2**bits - 1) * step + zero) * stored).all()
    assert layer.weight.shape == (rows, packed_bytes(columns, bits))


@pytest.mark.parametrize(("rows", "columns", "group"), [(65, 64, 32), (3, 37, 32), (8, 20, 64), (16, 256, 128)])
def test_int4_weight_is_within_half_a_step(rows: int, columns: int, group: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows)
    linear.weight.data += 0.3  # an offset that symmetric levels would waste
    layer = quantised(linear, Config(bits=4, group_size=group))
    groups = -(-columns // group)
    assert (layer.scale.shape, layer.zero.shape) == ((rows, groups), (rows, groups))
    error = (layer.dequantised(torch.float32) - linear.weight).abs()
    of_column = torch.arange(columns) // group
    step, zero = layer.scale.float()[:, of_column], layer.zero.float()[:, of_column].abs()
    # half a step, and at the ends of the range the bfloat16 rounding (2^-8) of scale and zero
    assert (error <= 0.5 * step + (15 * step + zero) * 2**-8).all()


def test_int4_levels_by_hand() -> None:
    weight = torch.tensor([[0.0, 1.0, 7.4, 15.0, -8.0, -8.0, -8.0, -8.0]])
    q, scale, zero = grouped_int4(weight, 4)
    assert torch.equal(q[0, :4], torch.tensor([0, 1, 7, 15], dtype=torch.uint8))
    assert (scale[0, 0], zero[0, 0]) == (1.0, 8.0)
    layer = weight_only.empty_layer(nn.Linear(8, 1), Config(bits=4), 4)
    assert isinstance(layer, GroupedLinear)
    layer.group_size, layer.weight, layer.scale, layer.zero = 4, pack_nibbles(q), scale, zero
    expected = torch.tensor([[0.0, 1.0, 7.0, 15.0, -8.0, -8.0, -8.0, -8.0]])
    assert torch.allclose(layer.dequantised(torch.float32), expected, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-8, 0.1, -3.0, 1000.0])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_constant_row_keeps_its_value_as_stored(value: float, bits: int) -> None:
    weight = torch.full((2, 40), value)
    for group, dtype in ((32, torch.bfloat16), (40, torch.float32)):
        q, scale, zero = grouped_affine(weight, bits, group, dtype)
        assert bool((scale.float() > 0).all())
        assert int(q.max()) < 2**bits
        found = (q.float() - 2 ** (bits - 1)) * scale.float()[:, :1] + zero.float()[:, :1]
        smallest = torch.finfo(torch.float32).eps * 2**bits  # levels of the smallest scale
        assert (found - weight).abs().max() <= abs(value) * torch.finfo(dtype).eps + smallest


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error_with_the_layer_s_name(value: float) -> None:
    model: Any = build()
    model.blocks[1].mlp.fc1.weight.data[3, 5] = value
    with pytest.raises(NotQuantisable, match=r"the weight of blocks\.1\.mlp\.fc1 must be finite"):
        convert(model)


@pytest.mark.parametrize("name", ["weight_only", "dynamic_int8"])
def test_a_model_is_quantised_once_only(name: str) -> None:
    model, technique = convert(build(), bits=3).model, registry()[name]
    with pytest.raises(NotQuantisable, match=r"blocks\.0\.attn\.qkv is a GroupedLinear already"):
        technique.apply(model, technique.Config(), NOTHING)


@pytest.mark.filterwarnings("ignore")  # importing torchao warns, differently from version to version
def test_arithmetic_is_torchao_s() -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    torch.manual_seed(0)
    weight = torch.randn(24, 128)
    block = (1, 128)
    scale, zero_point = primitives.choose_qparams_affine(
        weight,
        primitives.MappingType.SYMMETRIC,
        block,
        torch.int8,
        eps=torch.finfo(torch.float32).eps,
        zero_point_dtype=torch.int64,
    )
    theirs = primitives.quantize_affine(weight, block, scale, zero_point, torch.int8)
    q, ours = symmetric_int8(weight, per_channel=True)
    assert torch.allclose(ours, scale.flatten(), rtol=1e-6)
    assert torch.equal(q, theirs)
    scale, zero = primitives._choose_qparams_affine_tinygemm(
        weight,
        primitives.MappingType.ASYMMETRIC,
        (1, 32),
        torch.int32,
        0,
        15,
        torch.finfo(torch.float32).eps,
        torch.bfloat16,
        torch.bfloat16,
    )
    _, our_scale, our_zero = grouped_int4(weight, 32)
    assert torch.allclose(our_scale.float(), scale.view(24, 4).float(), rtol=2**-7)
    assert torch.allclose(our_zero.float(), zero.view(24, 4).float(), atol=float(scale.max()) / 16)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "rows"), [(64, 48), (40, 10), (37, 65), (8, 1)])
def test_packed_kernel_multiplies_the_same_weight(bits: int, dtype: torch.dtype, columns: int, rows: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(columns, rows), torch.randn(2, 7, columns, dtype=dtype)
    plain = quantised(linear, Config(bits=bits))
    packed = quantised(linear, Config(bits=bits, kernel="packed"))
    weight = plain.dequantised(torch.float32)
    expected = x.float() @ weight.T + linear.bias
    for layer, tolerance in ((plain, 1e-5 if dtype == torch.float32 else 2**-6), (packed, 2**-6)):
        assert layer(x).dtype == dtype
        assert layer(x).shape == (2, 7, rows)
        assert (layer(x).float() - expected).abs().max() < tolerance * expected.abs().max()


CONFIGS: list[dict[str, Any]] = [
    {"bits": 8},
    {"bits": 4},
    {"bits": 4, "group_size": 64, "skip_head": True},
    {"bits": 4, "granularity": "per_channel"},
    {"bits": 8, "granularity": "group"},
    *({"bits": bits} for bits in (2, 3, 5, 6, 7)),
    {"bits": 3, "granularity": "per_channel"},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_reloaded_artefact_has_the_same_bits(config: dict[str, Any], tmp_path: Path) -> None:
    applied = convert(build(embed_dim=36), **config)  # 36 is no multiple of a group
    steps = [{"technique": "weight_only", "version": weight_only.TECHNIQUE.version, "resolved": applied.resolved}]
    section = {**MODEL, "create": {**MODEL["create"], "embed_dim": 36}}
    artefact.save(applied.model, tmp_path, model_description=models.describe(section, DATA), steps=steps)
    images = torch.randn(5, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(artefact.load(tmp_path)(images), applied.model(images))


@pytest.mark.parametrize("config", CONFIGS)
def test_logits_are_those_of_the_dequantised_model(config: dict[str, Any]) -> None:
    images = torch.randn(5, 1, 8, 8)
    reference, applied = build(), convert(build(), **config)
    with torch.inference_mode():
        before = reference(images)
        for name in applied.changed:
            layer: Any = applied.model.get_submodule(name)
            reference.get_parameter(f"{name}.weight").copy_(layer.dequantised(torch.float32))
        assert torch.equal(applied.model(images), reference(images))
        assert not torch.equal(reference(images), before)
        assert torch.equal(convert(build(), **config).model(images), applied.model(images))
    assert ("head" in applied.changed) != config.get("skip_head", False)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_tied_weights_are_stored_once(bits: int, tmp_path: Path) -> None:
    sizes = []
    for tied in (False, True):
        model: Any = build()
        if tied:
            model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
        applied = convert(model, bits=bits)
        steps = [{"technique": "weight_only", "version": 1, "resolved": applied.resolved}]
        artefact.save(model, tmp_path / "a", model_description=models.describe(MODEL, DATA), steps=steps)
        loaded: Any = artefact.load(tmp_path / "a")
        images = torch.randn(2, 1, 8, 8)
        with torch.inference_mode():
            assert torch.equal(loaded(images), model(images))
        sizes.append((tmp_path / "a" / artefact.TENSORS).stat().st_size)
    layer = model.blocks[0].mlp.fc1
    parts = [layer.weight, layer.scale, *([layer.zero] if bits != 8 else [])]
    assert sizes[0] - sizes[1] == pytest.approx(sum(part.nbytes for part in parts), abs=500)  # and the names in front
    assert loaded.blocks[1].mlp.fc1.weight.data_ptr() == loaded.blocks[0].mlp.fc1.weight.data_ptr()


def test_odd_dimensions_of_a_pruned_model() -> None:
    model: Any = build()
    model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2 = nn.Linear(64, 101), nn.Linear(101, 64)
    applied = convert(model, bits=4, group_size=32)
    assert applied.model(torch.randn(2, 1, 8, 8)).isfinite().all()
    fc2: Any = model.blocks[0].mlp.fc2
    assert (fc2.weight.shape, fc2.scale.shape) == ((64, 51), (64, 4))


@pytest.mark.parametrize(("bits", "bytes_a_weight"), [(8, 1.0), (4, 0.5 + 2 * 2 / 32), (3, 3 / 8 + 2 * 2 / 32)])
def test_bytes_are_exactly_those_of_the_format(bits: int, bytes_a_weight: float) -> None:
    section = {"family": "timm", "name": "deit_small_patch16_224", "create": {}}
    data = TaskInfo(num_classes=1000, in_chans=3, image_size=224, class_names=())
    model = models.build(section, data)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    weights, rows = sum(m.weight.numel() for m in linears), sum(m.out_features for m in linears)
    rest = sum(p.numel() for p in model.parameters()) - weights
    whole = sum(t.nbytes for t in model.state_dict().values())
    convert(model, bits=bits)
    expected = weights * bytes_a_weight + (4 * rows if bits == 8 else 0) + 4 * rest
    stored = {k: v.nbytes for k, v in model.state_dict().items()}
    assert sum(stored.values()) == expected
    packed = len(artefact.pack(model, model_description={}, steps=[])[artefact.TENSORS])
    assert 0 < packed - expected < 30_000  # the names and shapes in front of the tensors
    low, high = {8: (3.7, 3.95), 4: (5.6, 6.2), 3: (7.0, 7.8)}[bits]
    assert low < whole / packed < high


def test_scales_keep_their_type_when_the_model_is_moved() -> None:
    layer = quantised(nn.Linear(64, 48), Config(bits=4, kernel="packed"))
    x = torch.randn(3, 64)
    first = layer(x)
    assert layer._packing is not None
    layer.to("cpu")
    assert layer._packing is None
    assert torch.equal(layer(x), first)
    assert set(layer.state_dict()) == {"weight", "scale", "zero", "bias"}


def test_check_refuses_the_packed_kernel_of_8_bits_on_cuda_only() -> None:
    info = models.model_info(build(), "cpu")
    cuda = dataclasses.replace(info, device="cuda")
    assert weight_only.TECHNIQUE.check(info, Config(bits=4, kernel="packed")) is None
    assert weight_only.TECHNIQUE.check(cuda, Config(bits=4)) is None
    assert weight_only.TECHNIQUE.check(cuda, Config(bits=4, kernel="packed")) == weight_only_int4_kernels.lacking(
        "cuda"
    )
    assert "CPU only, not on cuda" in str(weight_only.TECHNIQUE.check(cuda, Config(bits="mixed", kernel="packed")))
    assert "CPU only, not on cuda" in str(weight_only.TECHNIQUE.check(cuda, Config(kernel="packed")))


@pytest.mark.parametrize(
    ("bits", "granularity", "kernel"),
    [
        (8, "auto", True), (8, "per_channel", True), (8, "group", False), (4, "auto", True), (4, "group", True),
        (4, "per_channel", False), (3, "auto", False), (6, "per_channel", False),
    ],
)  # fmt: skip
def test_a_format_has_a_kernel_or_is_simulated(bits: int, granularity: str, kernel: bool) -> None:
    config = Config(bits=bits, granularity=granularity, kernel="packed")
    assert weight_only.TECHNIQUE.simulated(config, "cpu") is not kernel
    reason = weight_only.TECHNIQUE.check(models.model_info(build(), "cpu"), config)
    assert (reason is None) is kernel
    if reason is not None:
        assert f"not {bits} bits with granularity {granularity}" in reason


def test_layers_hold_no_float_weight() -> None:
    model = convert(build(), bits=8).model
    layers = [m for m in model.modules() if isinstance(m, Int8Linear)]
    assert len(layers) == 9
    assert not [p for layer in layers for p in layer.parameters()]
