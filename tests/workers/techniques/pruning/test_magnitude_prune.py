"""Pruning against the masked dense model, closed-form counts, and the ranking."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import SwiGLU, SwiGLUPacked
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.workers.artefact.test_artefact import one_thread  # noqa: F401 - a fixture
from tests.workers.techniques.models import VARIANTS, images, info, surroundings, vit
from tests.workers.techniques.reduced import built, described
from workers.models import model_info
from workers.techniques.pruning import shared_slicing
from workers.techniques.pruning.magnitude_prune import TECHNIQUE, Config, kept_dims, kept_whole
from workers.techniques.pruning.shared_slicing import first_layers


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
    heads, hidden = kept_whole(4, head_ratio), kept_dims(64, mlp_ratio, 4)
    dense = masked(model, heads, hidden)
    applied = TECHNIQUE.apply(model, config, surroundings(model))
    assert applied.resolved == {
        "channels": 32, "heads": [heads] * 3, "head_dims": [8] * 3, "hidden": [hidden] * 3, "blocks": [0, 1, 2],
    }  # fmt: skip
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


@pytest.mark.parametrize("variant", ["class", "distil", "registers", "average", "layerscale"])
def test_head_dimensions_are_those_of_the_masked_dense_model(variant: str) -> None:
    """Each head loses its own weakest dimensions, of queries and keys and of values apart; the softmax scale stays 8^-0.5."""
    model, dense = vit(variant, qkv_bias=True), vit(variant, qkv_bias=True)
    for block in dense.blocks:
        qkv, proj = block.attn.qkv, block.attn.proj
        for h in range(4):
            rows = torch.arange(h * 8, h * 8 + 8)
            seen = torch.cat([qkv.weight[rows], qkv.weight[32 + rows]], dim=1).norm(dim=1)
            told = torch.cat([qkv.weight[64 + rows], proj.weight[:, rows].T], dim=1).norm(dim=1)
            weak = rows[seen.argsort()[:4]]
            qkv.weight.data[weak] = 0
            qkv.bias.data[weak] = 0
            proj.weight.data[:, rows[told.argsort()[:4]]] = 0
    config = Config(head_ratio=0.0, mlp_ratio=0.0, head_dim_ratio=0.5, round_to=4)
    applied = TECHNIQUE.apply(model, config, surroundings(model))
    assert applied.resolved["head_dims"] == [4] * 3
    for block in model.blocks:
        attn = block.attn
        assert (attn.num_heads, attn.head_dim, attn.attn_dim, attn.scale) == (4, 4, 16, 0.5)
    torch.testing.assert_close(model(images()), dense(images()), atol=1e-5, rtol=1e-5)


def test_channels_are_those_of_a_model_that_norms_over_fewer() -> None:
    """A dense model whose norms see the strongest channels only, and in which the others are never read."""
    model, dense = vit("layerscale"), vit("layerscale")
    strength = shared_slicing.channel_magnitudes(dense)
    kept = strength.argsort(descending=True)[:24].sort().values

    def narrow(norm: Any, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[..., kept] = torch.nn.functional.layer_norm(
            x[..., kept], (24,), norm.weight[kept], norm.bias[kept], norm.eps
        )
        return out

    for norm in [m for m in dense.modules() if isinstance(m, torch.nn.LayerNorm)]:
        norm.forward = lambda x, norm=norm: narrow(norm, x)
    config = Config(head_ratio=0.0, mlp_ratio=0.0, embed_ratio=0.25)
    applied = TECHNIQUE.apply(model, config, surroundings(model))
    assert applied.resolved["channels"] == model.embed_dim == 24
    assert "patch_embed" in applied.changed
    torch.testing.assert_close(model(images()), dense(images()), atol=1e-5, rtol=1e-5)


def test_the_block_that_writes_least_goes() -> None:
    model, dense = vit("layerscale"), vit("layerscale")
    for m in (model, dense):
        for part in (m.blocks[1].attn.proj, m.blocks[1].mlp.fc2):
            part.weight.data *= 0.1
    dense.blocks = torch.nn.Sequential(dense.blocks[0], dense.blocks[2])
    config = Config(head_ratio=0.0, mlp_ratio=0.0, depth_ratio=0.3)
    applied = TECHNIQUE.apply(model, config, surroundings(model))
    assert applied.changed == ["blocks"]
    assert applied.resolved["blocks"] == [0, 2]
    assert len(model.blocks) == len(model.feature_info) == 2
    torch.testing.assert_close(model(images()), dense(images()))


@pytest.mark.parametrize("variant", ["class", "distil", "average"])
def test_everything_at_once(variant: str) -> None:
    config = Config(head_ratio=0.5, mlp_ratio=0.5, head_dim_ratio=0.5, embed_ratio=0.25, depth_ratio=0.3, round_to=4)
    model = vit(variant, qkv_bias=True)
    before = model_info(model)
    applied = TECHNIQUE.apply(model, config, surroundings(model))
    blocks = applied.resolved.pop("blocks")
    assert len(set(blocks)) == 2
    assert blocks == sorted(blocks)
    assert applied.resolved == {"channels": 24, "heads": [2, 2], "head_dims": [4, 4], "hidden": [32, 32]}
    after = TECHNIQUE.info_after(before, config)
    assert after == model_info(model)
    skeleton = TECHNIQUE.rebuild(vit(variant, qkv_bias=True, device="meta"), applied.resolved)
    skeleton.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, strict=True, assign=True)
    assert torch.equal(skeleton.eval()(images()), model(images()))


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
    assert kept_dims(60, ratio, round_to) == left


def test_at_least_one_head_and_one_multiple_stay() -> None:
    assert kept_whole(1, 0.6) == 1
    assert kept_dims(8, 0.6, 16) == 8


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
    shared_slicing.keep_heads(attn, torch.tensor([0, 2, 3]))
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(attn(x), dense(x), atol=1e-6, rtol=1e-5)


def test_equal_magnitudes_keep_the_first() -> None:
    kept: Tensor = shared_slicing.largest(torch.ones(5), 3)
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


def test_what_cannot_be_removed_is_refused_with_a_reason() -> None:
    some = Config(head_dim_ratio=0.5)
    reason = "queries and keys are normalised over the dimensions of a head, none of which can be removed"
    assert TECHNIQUE.check(info(has_qk_norm=True), some) == f"head_dim_ratio=0.5: {reason}; must be 0"
    assert TECHNIQUE.check(info(has_qk_norm=True), Config()) is None
    model = vit("qk_norm")
    with pytest.raises(ValueError, match=r"magnitude_prune: head_dim_ratio=0\.5: queries and keys are normalised"):
        TECHNIQUE.apply(model, some, surroundings(model))
    pooled = vit(global_pool="map", class_token=False)
    with pytest.raises(ValueError, match="the model pools by attention over its channels"):
        TECHNIQUE.apply(pooled, Config(embed_ratio=0.5), surroundings(pooled))


def test_norms_over_heads_are_refused() -> None:
    model = vit(scale_attn_norm=True)
    with pytest.raises(ValueError, match=r"normalise over all heads together \(scale_attn_norm\)"):
        TECHNIQUE.apply(model, Config(), surroundings(model))


@pytest.mark.parametrize("mlp", [SwiGLUPacked, SwiGLU], ids=["packed", "apart"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gated_dimension_goes_with_its_gate(mlp: Any, bias: bool) -> None:
    """What is left computes what the whole model does when the weakest dimensions give nothing."""
    model, whole = vit(), vit()
    generator = torch.Generator().manual_seed(3)
    for i in range(3):
        gated = mlp(32, 64, bias=bias)
        for parameter in gated.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        model.blocks[i].mlp, whole.blocks[i].mlp = copy.deepcopy(gated), gated
    hidden = whole.blocks[0].mlp.fc2.in_features
    for block in whole.blocks:
        first = torch.cat([layer.weight for layer in first_layers(block.mlp).values()]).reshape(2, hidden, 32)
        strength = first.square().sum(dim=(0, 2)) + block.mlp.fc2.weight.square().sum(dim=0)
        block.mlp.fc2.weight.data[:, strength.argsort()[: hidden // 2]] = 0
    made = TECHNIQUE.apply(model, Config(head_ratio=0.0, mlp_ratio=0.5), surroundings(model))
    assert made.resolved["hidden"] == [hidden // 2] * 3
    with torch.no_grad():
        torch.testing.assert_close(made.model(images()), whole(images()))


@pytest.mark.parametrize("pruned", [{"embed_ratio": 0.5}, {"depth_ratio": 0.3}])
def test_post_norm_blocks_are_ranked_by_the_norms_that_write(pruned: dict[str, float]) -> None:
    """The rows before a norm say nothing: it takes their size out again."""
    model: Any = built(described("vit_base_patch16_rpn_224", depth=3))
    for i, block in enumerate(model.blocks):
        block.norm1.weight.data, block.norm2.weight.data = torch.full((64,), 1.0 + i), torch.full((64,), 1.0)
        block.attn.proj.weight.data *= 10 - 3 * i
    config = Config(head_ratio=0.0, mlp_ratio=0.0, **pruned)
    made = TECHNIQUE.apply(model, config, surroundings(model))
    assert made.resolved["blocks"] == ([1, 2] if "depth_ratio" in pruned else [0, 1, 2])
    assert made.model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
