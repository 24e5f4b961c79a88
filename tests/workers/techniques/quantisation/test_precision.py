"""precision: half the bytes, float32 in and out, and the arithmetic of the type."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from workers import artefact, models
from workers.tasks import TaskInfo
from workers.techniques.quantisation import precision
from workers.techniques.record import Applied, Surroundings

DATA = TaskInfo(num_classes=10, in_chans=1, image_size=8, class_names=tuple("0123456789"))
MODEL = {"family": "timm", "name": None, "create": {"patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 4}}
NOTHING: Any = None


def build() -> nn.Module:
    torch.manual_seed(0)
    return models.build(MODEL, DATA).eval()


def convert(model: nn.Module, dtype: str) -> Applied:
    surroundings: Surroundings = NOTHING
    return precision.TECHNIQUE.apply(model, precision.Config(dtype=dtype), surroundings)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 2**-7), ("fp16", 2**-10)])
def test_logits_are_float32_and_close(dtype: str, tolerance: float) -> None:
    model = build()
    images = torch.randn(5, 1, 8, 8)
    with torch.inference_mode():
        expected = model(images)
        applied = convert(model, dtype)
        found = applied.model(images)
    assert applied.changed == [name for name, _ in build().named_parameters()]
    assert {p.dtype for p in model.parameters()} == {precision.DTYPES[dtype]}
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 8 * tolerance * expected.abs().max()


def test_equals_the_model_run_in_that_type_by_hand() -> None:
    model = build()
    by_hand = copy.deepcopy(model).bfloat16()
    images = torch.randn(5, 1, 8, 8)
    assert torch.equal(convert(model, "bf16").model(images), by_hand(images.bfloat16()).float())


def test_the_file_is_half_as_large() -> None:
    def tensor_bytes(model: nn.Module) -> int:
        return len(artefact.pack(model, model_description={}, steps=[])[artefact.TENSORS])

    params = sum(p.numel() for p in build().parameters())
    whole, half = tensor_bytes(build()), tensor_bytes(convert(build(), "bf16").model)
    assert (whole - half, whole // half) == (pytest.approx(2 * params, abs=300), 1)
    assert half == pytest.approx(2 * params, rel=0.05)


def test_the_first_conversion_is_what_is_stored_and_buffers_keep_their_type() -> None:
    model = build()
    model.register_buffer("constant", torch.tensor([1.0 + 2**-20]))
    convert(model, "fp16")
    assert model.get_buffer("constant").dtype == torch.float32
    twin = precision.TECHNIQUE.rebuild(models.skeleton(models.describe(MODEL, DATA)), {"dtype": "fp16"})
    assert {p.dtype for p in twin.parameters()} == {torch.float16}


def test_distilled_training_output_is_float32_too() -> None:
    section = {"family": "timm", "name": "deit_tiny_distilled_patch16_224", "create": {"patch_size": 2, "depth": 1}}
    torch.manual_seed(0)
    model: Any = convert(models.build(section, DATA), "bf16").model
    model.train()
    model.set_distilled_training(True)
    both = model(torch.randn(2, 1, 8, 8))
    assert [o.dtype for o in both] == [torch.float32, torch.float32]


def test_check_allows_what_runs_and_gives_the_reason_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    info = models.model_info(build(), "cpu")
    assert precision.TECHNIQUE.check(info, precision.Config("bf16")) is None
    assert precision.TECHNIQUE.check(info, precision.Config("fp16")) is None
    precision._cpu_lacks.cache_clear()

    def absent(*args: Any) -> Any:
        raise RuntimeError('"conv2d" not implemented for "Half"\nmore')

    monkeypatch.setattr(precision.F, "conv2d", absent)
    reason = precision.TECHNIQUE.check(info, precision.Config("fp16"))
    precision._cpu_lacks.cache_clear()
    assert reason == 'this PyTorch has no fp16 CPU kernel: "conv2d" not implemented for "Half"'
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert "no bfloat16" in str(
        precision.TECHNIQUE.check(dataclasses.replace(info, device="cuda"), precision.Config("bf16"))
    )
