"""Counts against published figures and against counts by hand, after every kind of change to the structure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from orchestrator.study.load import load_study
from tests.studies import tiny_study
from tests.workers.techniques.models import surroundings, vit
from workers.measuring.counting import OpaqueKernel, count_macs, count_params
from workers.run import run_trial
from workers.techniques import registry
from workers.techniques.record import defaults, make_config
from workers.trial import Recipe, Step, TrialSpec

SMALL = (1, 3, 16, 16)
C, DEPTH, HEADS, D, HIDDEN, CLASSES = 32, 3, 4, 8, 64, 5
"""Of the small model of the techniques' tests: 16 patches of 4 x 4 pixels and a class token."""


def changed(*steps: tuple[str, dict[str, Any]], device: str = "cpu") -> Any:
    """The small model after techniques; on the meta device as artefacts build it, from what the techniques resolved."""
    model, on_meta = vit(), vit(device="meta")
    for name, config in steps:
        technique = registry()[name]
        applied = technique.apply(model, make_config(technique.Config, config), surroundings(model))
        model, on_meta = applied.model, technique.rebuild(on_meta, applied.resolved)
    return (model if device == "cpu" else on_meta).eval()


def by_hand(
    attended: Sequence[int],
    after: Sequence[int],
    *,
    width: int = HEADS * D,
    hidden: int = HIDDEN,
    mixing: int | None = None,
) -> int:
    """MACs of the small model.

    Args:
        attended, after: tokens in the attention and in the MLP of each block.
        width: of all heads together; ``mixing``: of all heads of a block, None for exact attention.
    """
    total = 16 * (3 * 4 * 4) * C + C * CLASSES
    for n, m in zip(attended, after, strict=True):
        total += 4 * n * C * width + 2 * m * C * hidden + (2 * n * n * width if mixing is None else mixing)
    return total


def test_attention_pooling_is_counted() -> None:
    """Its query is a learned parameter, which a counter that hooks into graphs cannot follow in inference mode."""
    model = vit(global_pool="map", class_token=False, num_classes=CLASSES)
    tokens, pooled = 16, C * C + 2 * 16 * C * C + 2 * 16 * C + C * C + 2 * C * HIDDEN
    assert count_macs(model, SMALL) == by_hand([tokens] * 3, [tokens] * 3) + pooled
    assert all(parameter.requires_grad for parameter in model.parameters())


WHOLE = by_hand([17] * 3, [17] * 3)
TOME = ("tome", {"r": 2})
MERGED = sum(half * half * D for half in (8, 7, 6))
"""Comparing the even with the odd tokens: half of 16, 14 and 12 unprotected ones, by keys averaged over the heads."""
PRUNE = ("magnitude_prune", {"head_ratio": 0.25, "mlp_ratio": 0.5})
LANDMARKS, ITERATIONS = 4, 2
NYSTROM = ("nystrom", {"landmarks": LANDMARKS, "iterations": ITERATIONS})
BY_LANDMARKS = HEADS * (
    4 * 17 * LANDMARKS * D  # landmarks over tokens, tokens over landmarks, scores and values each
    + 2 * LANDMARKS**2 * D  # landmarks with landmarks, the inverse with its values
    + ITERATIONS * 4 * LANDMARKS**3
)
CASES: dict[str, tuple[tuple[tuple[str, dict[str, Any]], ...], int]] = {
    "whole": ((), WHOLE),
    "merged": ((TOME,), by_hand([17, 15, 13], [15, 13, 11]) + MERGED),
    "pruned": ((PRUNE,), by_hand([17] * 3, [17] * 3, width=3 * D, hidden=32)),
    "pruned and merged": ((PRUNE, TOME), by_hand([17, 15, 13], [15, 13, 11], width=3 * D, hidden=32) + MERGED),
    "landmarks": ((NYSTROM,), by_hand([17] * 3, [17] * 3, mixing=BY_LANDMARKS)),
    "half precision": ((("precision", {"dtype": "bf16"}),), WHOLE),
}


@pytest.mark.parametrize(
    ("name", "giga_macs", "params"),
    [
        ("vit_base_patch16_224", 17.564, 86_567_656),
        ("vit_large_patch16_224", 61.555, 304_326_632),
        ("deit_tiny_patch16_224", 1.254, 5_717_416),
    ],
)
def test_published_models(name: str, giga_macs: float, params: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    assert round(count_macs(model, (1, 3, 224, 224)) / 1e9, 3) == giga_macs
    assert count_params(model) == params


def test_tokens_that_tome_leaves_of_vit_b() -> None:
    """ToMe's decreasing schedule (arXiv 2210.09461) of r=16 merges [32, 29, ... 2, 0]; each block's MLP and the next attention see what is left."""
    tome = registry()["tome"]
    with torch.device("meta"):
        model: Any = timm.create_model("vit_base_patch16_224", pretrained=False)
    model = tome.apply(model, make_config(tome.Config, {"r": 16, "schedule": "decreasing"}), surroundings(vit())).model
    tokens, total = 197, 196 * 768 * 768 + 768 * 1000
    for r in (32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0):
        total += 4 * tokens * 768**2 + 2 * tokens**2 * 768
        total += (tokens - 1) // 2 * (tokens // 2) * 64 if r else 0
        tokens -= r
        total += 8 * tokens * 768**2
    assert tokens == 10
    assert count_macs(model, (1, 3, 224, 224)) == total


@pytest.mark.parametrize(
    ("case", "device"),
    [(c, d) for c in CASES for d in ("cpu", "meta") if (c, d) != ("landmarks", "meta")],  # which autocast does not know
)
def test_what_runs_is_counted(case: str, device: str) -> None:
    steps, expected = CASES[case]
    assert count_macs(changed(*steps, device=device), SMALL) == expected


def test_weights_after_pruning() -> None:
    def block(width: int, hidden: int) -> int:
        return C * 3 * width + 3 * width + width * C + C + C * hidden + hidden + hidden * C + C + 4 * C

    around = 3 * 16 * C + C + C + 17 * C + 2 * C + C * CLASSES + CLASSES
    assert count_params(changed()) == around + DEPTH * block(HEADS * D, HIDDEN)
    assert count_params(changed(PRUNE)) == around + DEPTH * block(3 * D, 32)
    for step in (TOME, NYSTROM, ("precision", {})):
        assert count_params(changed(step)) == count_params(changed())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_counted_on_every_path(device: str, fused: bool) -> None:
    model = changed(device=device)
    for block in model.blocks:
        block.attn.fused_attn = fused
    assert count_macs(model, SMALL) == WHOLE


class Attention(nn.Module):
    def __init__(self, mask: Tensor | None, causal: bool = False) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=self.mask, is_causal=self.causal)


@pytest.mark.parametrize(
    "model",
    [
        Attention(None),
        Attention(torch.zeros(1, 1, 16, 16)),
        Attention(torch.zeros(1, 1, 1, 16)),
        Attention(None, causal=True),
    ],
)
def test_a_mask_changes_nothing(model: Attention) -> None:
    assert count_macs(model, (1, 2, 16, 8)) == 2 * 2 * 16 * 16 * 8


class Products(nn.Module):
    """Operators that PyTorch's counter has no formula for; images (1, 1, 4, 6)."""

    def forward(self, images: Tensor) -> Tensor:
        a, v = images[0, 0], images[0, 0, 0]
        out = a @ v + torch.addmv(a[:, 0], a, v) + v @ v
        return out + torch.addbmm(a @ a.T, images[0], images[0].transpose(1, 2)).sum()


def test_operators_that_pytorch_leaves_out() -> None:
    assert count_macs(Products(), (1, 1, 4, 6)) == 4 * 6 + 4 * 6 + 6 + 4 * 6 * 4 + 4 * 6 * 4


def test_shared_weights_count_once_and_buffers_do_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    assert count_params(model) == 16 + 8


def test_a_shared_layer_runs_twice() -> None:
    layer = nn.Linear(6, 6)
    assert count_macs(nn.Sequential(layer, layer), (1, 1, 4, 6)) == 2 * 4 * 6 * 6


def test_the_model_is_left_as_it_was() -> None:
    model = changed().train()
    model.blocks[1].eval()
    before = [part.training for part in model.modules()]
    count_macs(model, SMALL)
    assert [part.training for part in model.modules()] == before
    with pytest.raises(ValueError, match="a batch of 1, the count is of one example"):
        count_macs(model, (2, 3, 16, 16))


# --- what cannot be seen ----------------------------------------------------------------------------------------------

OPAQUE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dynamic_int8", {}),
    ("weight_only", {"bits": 8}),
    ("weight_only", {"bits": 4}),
    ("weight_only", {"bits": 8, "kernel": "packed"}),
)


@pytest.mark.parametrize(("name", "config"), OPAQUE)
def test_packed_weights_are_refused(name: str, config: dict[str, Any]) -> None:
    model = changed((name, config))
    for count in (lambda: count_macs(model, SMALL), lambda: count_params(model)):
        with pytest.raises(
            OpaqueKernel, match=r"blocks\.0\.attn\.qkv is a \w+, .*count the model before its conversion"
        ):
            count()


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per", "ignore::UserWarning"
)
def test_pytorchs_own_packed_layers_are_refused() -> None:
    model = torch.ao.quantization.quantize_dynamic(changed(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(OpaqueKernel, match=r"blocks\.0\.attn\.qkv"):
        count_macs(model, SMALL)


class Operator(nn.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.call(images[0, 0])
        return found


@torch.library.custom_op("vitpareto_tests::product", mutates_args=())
def foreign(a: Tensor) -> Tensor:
    return a @ a.T


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (foreign, "vitpareto_tests.product"),
        (torch.linalg.inv, "linalg_inv"),
        (lambda a: torch._int_mm(a.to(torch.int8), a.to(torch.int8).T), "_int_mm"),
    ],
)
def test_an_operator_of_unknown_cost_is_refused(call: Any, words: str) -> None:
    with pytest.raises(OpaqueKernel, match=f"{words}.*has no known cost; count the model before its conversion"):
        count_macs(Operator(call), (1, 1, 32, 32))


@pytest.mark.parametrize(
    "call",
    [torch.linalg.vector_norm, torch.softmax, torch.sort, torch.diagonal],
    ids=lambda call: call.__name__,
)
def test_element_wise_work_is_nothing(call: Any) -> None:
    with_dim = (lambda a: call(a, dim=-1)) if call is torch.softmax else call
    model = Operator(lambda a: (with_dim(a), a)[1])
    assert count_macs(model, (1, 1, 32, 32)) == 0


def test_a_trial_counts_the_unquantised_twin(tmp_path: Path) -> None:
    config = load_study(tiny_study())
    rows = []
    for quantise in ((), (("dynamic_int8", {}),)):
        steps = (("nystrom", {"landmarks": 4}), *quantise)
        made = Recipe(tuple(Step(name, {**defaults(registry()[name].Config), **given}) for name, given in steps))
        rows.append(run_trial(TrialSpec("tiny", "t", made, 0, config.context(), str(tmp_path))))
    twin, packed = rows
    assert [row.failure for row in rows] == [None, None]
    assert packed.metrics["size_bytes"] < twin.metrics["size_bytes"]
    for name in ("macs", "params"):
        assert packed.metrics[name] == twin.metrics[name] > 0
