"""The ways to run an uncompressed model, and compiled ones in a process that compiles many."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

from workers.measuring.against_baseline import _faster
from workers.measuring.timing import Arm
from workers.measuring.ways import as_way, compile_model, way_names
from workers.node.conditions import fused


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=10, in_chans=1)
    return model.eval()


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_every_way_gives_the_models_logits_and_leaves_it_as_it_was(name: str) -> None:
    model = small_vit()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # as an environment variable of timm can make it
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    run = as_way(model, name)
    with torch.inference_mode():
        logits, expected = run(images), model(images)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, expected, atol=0.02 * float(expected.abs().max()))
    assert fused(run) is True
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.slow  # the compiler takes half a minute
def test_a_compiled_way_gives_the_models_logits() -> None:
    model = small_vit()
    images = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(as_way(model, "fp32+compile")(images), model(images), atol=1e-4)


def test_unknown_ways_are_refused_and_compiling_is_asked_for() -> None:
    with pytest.raises(ValueError, match="must be one of fp32, bf16, fp16"):
        as_way(nn.Linear(2, 2), "int8")
    assert way_names(compiled=False) == ["fp32", "bf16", "fp16"]
    assert way_names(compiled=True)[3:] == ["fp32+compile", "bf16+compile", "fp16+compile"]


# --- many compiled models of one process ------------------------------------------------------------------------------


class Compiled(nn.Module):
    """Adds one where it runs compiled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight + (1.0 if torch.compiler.is_compiling() else 0.0)


def test_the_tenth_model_of_a_process_is_compiled_as_the_first_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # needs no C++ compiler
    kept = compile_model(Compiled(2))
    for width in range(3, 13):
        assert compile_model(Compiled(width))(torch.zeros(width)).tolist() == [1.0] * width
    assert kept(torch.zeros(2)).tolist() == [1.0, 1.0]


class Packing(nn.Module):
    """Makes something at its first call, as integer layers do."""

    made: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.made is None:
            self.made = torch.compiler.is_compiling()
        return x * 2


def test_what_a_layer_makes_at_its_first_call_is_made_before_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = Packing()
    _faster(Arm(model, torch.zeros(1)))
    assert model.made is False
