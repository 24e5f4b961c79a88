"""What every quantiser must refuse, whoever wrote it: parameters that are NaN or infinite; and what NaN does in activations.

Codes are integers and have no NaN. A quantiser that takes such a model turns it into one with ordinary logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.workers.techniques import vlm as vision_language
from tests.workers.techniques.models import surroundings, vit
from workers.techniques import NAMES, registry
from workers.techniques.quantisation.fq_vit import LogIntSoftmax, log2_codes, powers_of_two
from workers.techniques.quantisation.repq_vit import MapQuantiser, QuantisedSoftmax, from_log2, sqrt2_codes
from workers.techniques.quantisation.shared_affine import NotQuantisable, require_finite_parameters
from workers.techniques.record import Surroundings, Technique

QUANTISERS = [registry()[name] for name in NAMES if registry()[name].family == "quantisation"]
every_quantiser = pytest.mark.parametrize(
    "technique", [t for t in QUANTISERS if "timm" in t.models], ids=lambda t: t.name
)
VISION_LANGUAGE = [(t, family) for t in QUANTISERS for family in t.models if family != "timm"]

PLACES = {
    "pos_embed": "pos_embed",
    "cls_token": "cls_token",
    "patch_embed.proj.bias": "the bias of patch_embed.proj",
    "blocks.0.norm1.weight": "the weight of blocks.0.norm1",
    "blocks.0.attn.qkv.bias": "the bias of blocks.0.attn.qkv",
    "blocks.1.mlp.fc1.weight": "the weight of blocks.1.mlp.fc1",
    "blocks.1.mlp.fc1.bias": "the bias of blocks.1.mlp.fc1",
    "blocks.1.mlp.fc2.bias": "the bias of blocks.1.mlp.fc2",
    "norm.bias": "the bias of norm",
    "head.bias": "the bias of head",
}
"""Parameters of every kind, and how an error names them."""


@contextmanager
def spoiled(model: nn.Module, name: str, value: float) -> Iterator[None]:
    """Sets the last number of a parameter, and sets it back."""
    numbers = model.get_parameter(name).data.view(-1)
    was = float(numbers[-1])
    numbers[-1] = value
    try:
        yield
    finally:
        numbers[-1] = was


@cache
def vision_language_model(family: str) -> tuple[Any, Surroundings]:
    model = vision_language.vlm(family)
    return model, vision_language.surroundings(model)


def require_refused(technique: Technique, model: Any, around: Any, message: str) -> None:
    """Asserts that the model is refused, and that it is what it was before."""
    modules, tensors = list(model.modules()), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NotQuantisable) as caught:
        technique.apply(model, technique.Config(), around)
    assert str(caught.value).startswith(message)
    assert list(model.modules()) == modules
    found = model.state_dict()
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0, equal_nan=True)


# --- parameters -------------------------------------------------------------------------------------------------------


@every_quantiser
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_parameter_that_is_not_finite_is_refused_by_its_name(technique: Technique, value: float) -> None:
    model = vit()
    around = surroundings(model)  # its teacher stays whole
    for place, named in PLACES.items():
        count = model.get_parameter(place).numel()
        message = (
            f"{named} must be finite to be quantised; it holds NaN or infinity (1 of {count} values, the first {value:g}). "
            "Train the model again"
        )
        with spoiled(model, place, value):
            require_refused(technique, model, around, message)


@pytest.mark.parametrize(("technique", "family"), VISION_LANGUAGE, ids=lambda v: getattr(v, "name", v))
def test_so_is_one_of_a_vision_language_model(technique: Technique, family: str) -> None:
    model, around = vision_language_model(family)
    name = next(n for n, _ in model.named_parameters() if n.endswith("position_embeddings.weight"))
    with spoiled(model, name, math.nan):
        require_refused(technique, model, around, f"the weight of {name.removesuffix('.weight')} must be finite")


@every_quantiser
def test_a_head_that_stays_as_it_is_must_be_finite_too(technique: Technique) -> None:
    field = {"skip_head": True} if hasattr(technique.Config, "skip_head") else {"last_layer": "float"}
    model = vit()
    around = surroundings(model)
    with (
        spoiled(model, "head.weight", math.nan),
        pytest.raises(NotQuantisable, match=r"^the weight of head must be finite"),
    ):
        technique.apply(model, technique.Config(**field), around)


def test_of_several_the_first_is_named_and_all_are_counted() -> None:
    model = vit()
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    count = len(list(model.parameters()))
    with pytest.raises(
        NotQuantisable, match=rf"^cls_token must .*\(32 of 32 values, the first nan\); parameters that do: {count}\."
    ):
        require_finite_parameters(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_all_that_is_finite_is_taken(dtype: torch.dtype) -> None:
    part = nn.ParameterDict({
        "extremes": nn.Parameter(torch.tensor([torch.finfo(dtype).min, torch.finfo(dtype).max, 0.0], dtype=dtype)),
        "empty": nn.Parameter(torch.empty(0, 3, dtype=dtype)),
        "nowhere": nn.Parameter(torch.empty(2, dtype=dtype, device="meta")),
        "whole": nn.Parameter(torch.tensor([1, 2]), requires_grad=False),
    })  # fmt: skip
    part.register_buffer("mask", torch.tensor([-math.inf, 0.0]))
    require_finite_parameters(part)


@every_quantiser
def test_loading_does_not_judge(technique: Technique) -> None:
    model = vit()
    applied = technique.apply(model, technique.Config(), surroundings(model))
    tensors = {key: value.clone() for key, value in applied.model.state_dict().items()}
    tensors["pos_embed"][0, 0, 0] = math.nan
    again = technique.rebuild(vit(device="meta"), applied.resolved)
    again.load_state_dict(tensors, strict=True, assign=True)
    assert int(again.get_parameter("pos_embed").isnan().sum()) == 1


# --- activations ------------------------------------------------------------------------------------------------------


def with_a_nan(x: Tensor) -> Tensor:
    """Puts a NaN into row 2 of the first map of x (B, H, N, N)."""
    x = x.clone()
    x[0, 0, 2, 3] = math.nan
    return x


def require_one_row_lost(found: Tensor, whole: Tensor) -> None:
    """Asserts that row 2 of the first map is NaN and that all others have the same bits as ``whole``."""
    assert bool(found[0, 0, 2].isnan().all())
    others = torch.ones(whole.shape[:-1], dtype=torch.bool)
    others[0, 0, 2] = False
    assert torch.equal(found[others], whole[others])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("integers", [True, False], ids=["log_int", "log2"])
def test_a_softmax_in_powers_of_two_passes_nan_on(bits: int, integers: bool) -> None:
    x = 4 * torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    softmax = LogIntSoftmax(bits, integers)
    softmax.logits.fix(float(x.min()), float(x.max()))
    require_one_row_lost(softmax(with_a_nan(x)), softmax(x))


def test_a_map_in_powers_of_sqrt_2_passes_nan_on() -> None:
    x = 4 * torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    softmax = QuantisedSoftmax(4)
    softmax.map.fix(0.0, 1.0)
    require_one_row_lost(softmax(with_a_nan(x)), softmax(x))
    quantiser: Any = MapQuantiser(4)
    quantiser.fix(0.0, 1.0)
    assert quantiser(torch.tensor([0.0, math.nan, 1.0])).isnan().tolist() == [False, True, False]


def test_weights_without_a_code_are_still_0() -> None:
    p = torch.tensor([1.0, 0.5, 2.0**-15, 2.0**-16, 0.0])
    assert powers_of_two(log2_codes(p), 4).tolist() == [1.0, 0.5, 2.0**-15, 0.0, 0.0]
    p = torch.tensor([1.0, 0.5, 2.0**-7, 2.0**-8, 0.0])
    assert from_log2(sqrt2_codes(p, 1.0), 1.0, 4).tolist() == [1.0, 0.5, 2.0**-7, 0.0, 0.0]
    softmax = LogIntSoftmax(4, integers=True)
    softmax.logits.fix(-100.0, 0.0)
    assert softmax(torch.tensor([[[[0.0, -100.0]]]])).tolist() == [[[[1.0, 0.0]]]]


@pytest.mark.parametrize("name", ["qat", "lsq", "diffq"])
def test_training_that_broke_another_parameter_is_not_packed(name: str) -> None:
    model, technique = vit(), registry()[name]
    applied = technique.apply(model, technique.Config(), surroundings(model))
    assert technique.finalise is not None
    with (
        spoiled(applied.model, "blocks.0.norm1.bias", math.nan),
        pytest.raises(NotQuantisable, match="the bias of blocks"),
    ):
        technique.finalise(applied.model, technique.Config())
