"""Pruning against the masked dense model, closed-form counts, and the ranking."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.techniques.models import VARIANTS, images, info, surroundings, vit
from workers.techniques import slicing
from workers.techniques.magnitude_prune import TECHNIQUE, Config, kept_heads, kept_hidden


def params(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(1))
    return int(counter.get_total_flops()) // 2


def masked(model: Any, heads: int, hidden: int) -> Any:
    """The dense model with the weakest heads and dimensions silenced, found by a slow ranking of its own."""
    dense = copy.deepcopy(model)
    for block in dense.blocks:
        attn, mlp = block.attn, block.mlp
        D, H = attn.head_dim, attn.num_heads

        def head_norm(h: int, attn: Any = attn, D: int = D, H: int = H) -> float:
            parts = [attn.qkv.weight[(j * H + h) * D : (j * H + h + 1) * D] for j in range(3)]
            parts.append(attn.proj.weight[:, h * D : (h + 1) * D])
            return torch.cat([p.flatten() for p in parts]).norm().item()

        for h in sorted(range(H), key=head_norm)[: H - heads]:
            attn.proj.weight.data[:, h * D : (h + 1) * D] = 0
        norms = torch.cat([mlp.fc1.weight, mlp.fc2.weight.T], dim=1).norm(dim=1)
        mlp.fc2.weight.data[:, norms.argsort()[: len(norms) - hidden]] = 0
    return dense


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("head_ratio", "mlp_ratio"), [(0.25, 0.25), (0.5, 0.0), (0.0, 0.6)])
def test_pruned_is_masked_dense(variant: str, head_ratio: float, mlp_ratio: float) -> None:
    config = Config(head_ratio=head_ratio, mlp_ratio=mlp_ratio, round_to=4)
    model = vit(variant)
    heads, hidden = kept_heads(4, config), kept_hidden(64, config)
    dense = masked(model, heads, hidden)
    applied = TECHNIQUE.apply(model, config, surroundings(model))
    assert applied.resolved == {"heads": [heads] * 3, "hidden": [hidden] * 3}
    torch.testing.assert_close(model(images()), dense(images()), atol=1e-5, rtol=1e-5)
    assert macs(model) < macs(dense)


@pytest.mark.parametrize("variant", ["class", "distil", "registers", "average", "layerscale", "qk_norm"])
def test_parameter_count_is_the_closed_form(variant: str) -> None:
    model = vit(variant, qkv_bias=True)
    config = Config(head_ratio=0.5, mlp_ratio=0.25)
    before = info(params=params(model))
    TECHNIQUE.apply(model, config, surroundings(model))
    # 2 of 4 heads of 8, 16 of 64 dimensions, in each of 3 blocks of width 32.
    assert before.params - params(model) == 3 * (2 * 8 * (4 * 32 + 3) + 16 * (2 * 32 + 1))
    after = TECHNIQUE.info_after(before, config)
    assert (after.params, after.num_heads, after.mlp_hidden) == (params(model), (2,) * 3, (48,) * 3)


def test_macs_are_the_closed_form() -> None:
    model = vit()
    whole = macs(model)
    TECHNIQUE.apply(model, Config(head_ratio=0.5, mlp_ratio=0.25), surroundings(model))
    N = 17
    linear = N * (2 * 8 * 4 * 32 + 16 * 2 * 32)
    attention = 2 * N * N * 16
    assert whole - macs(model) == 3 * (linear + attention)


@pytest.mark.parametrize(
    ("ratio", "round_to", "left"),
    [(0.0, 16, 60), (0.25, 1, 45), (0.25, 4, 44), (0.6, 16, 32), (0.1, 16, 48), (0.05, 4, 56)],
)
def test_hidden_dimensions_are_multiples(ratio: float, round_to: int, left: int) -> None:
    assert kept_hidden(60, Config(mlp_ratio=ratio, round_to=round_to)) == left


def test_at_least_one_head_and_one_multiple_stay() -> None:
    assert kept_heads(1, Config(head_ratio=0.6)) == 1
    assert kept_hidden(8, Config(mlp_ratio=0.6, round_to=16)) == 8


def test_scale_and_attributes_after_pruning() -> None:
    model = vit("qk_norm")
    TECHNIQUE.apply(model, Config(head_ratio=0.5), surroundings(model))
    for block in model.blocks:
        assert (block.attn.num_heads, block.attn.head_dim, block.attn.attn_dim) == (2, 8, 16)
        assert block.attn.scale == 8**-0.5
        assert block.attn.qkv.weight.shape == (48, 32)
        assert block.attn.q_norm.weight.shape == (8,)


def test_gate_rows_go_with_their_heads() -> None:
    from timm.layers import Attention

    torch.manual_seed(0)
    attn: Any = Attention(32, num_heads=4, qkv_bias=True, gated=True).eval()
    dense = copy.deepcopy(attn)
    dense.proj.weight.data[:, 8:16] = 0
    slicing.keep_heads(attn, torch.tensor([0, 2, 3]))
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(attn(x), dense(x), atol=1e-6, rtol=1e-5)


def test_equal_magnitudes_keep_the_first() -> None:
    kept: Tensor = slicing.largest(torch.ones(5), 3)
    assert kept.tolist() == [0, 1, 2]


def test_training_reaches_every_parameter() -> None:
    model = vit().train()
    TECHNIQUE.apply(model, Config(), surroundings(model))
    model(images()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_check_and_trains() -> None:
    assert TECHNIQUE.check(info(), Config()) is None
    assert "remove nothing from 4 heads" in str(TECHNIQUE.check(info(), Config(head_ratio=0.1, mlp_ratio=0.0)))
    assert TECHNIQUE.trains(Config())
    assert not TECHNIQUE.trains(Config(head_ratio=0.0, mlp_ratio=0.0))


def test_norms_over_heads_are_refused() -> None:
    model = vit(scale_attn_norm=True)
    with pytest.raises(ValueError, match="normalises over its heads"):
        TECHNIQUE.apply(model, Config(), surroundings(model))


def test_gated_mlps_are_refused() -> None:
    from timm.layers import SwiGLU

    model = vit(mlp_layer=SwiGLU)
    with pytest.raises(ValueError, match="must have timm's Attention and Mlp, found Attention and SwiGLU"):
        TECHNIQUE.apply(model, Config(), surroundings(model))
