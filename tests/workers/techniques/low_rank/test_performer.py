"""Random features against the kernel that they approximate, a slow transcription, and token sizes against duplicates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.techniques.models import VARIANTS, images, info, surroundings, vit
from workers.measuring.counting import count_macs
from workers.techniques.low_rank.performer import TECHNIQUE, Config, PerformerAttention, performer_attention
from workers.techniques.low_rank.shared_random_features import feature_count, orthogonal_projection, positive_features
from workers.techniques.pruning import shared_slicing


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def qkv(tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0, dim: int = 16) -> Any:
    return torch.randn(3, 2, 3, tokens, dim, generator=seeded(seed), dtype=dtype).unbind(0)


def drawn(features: int, dim: int = 16, seed: int = 0) -> Tensor:
    return orthogonal_projection(features, dim, seeded(seed)).double()


def replaced(variant: str = "class", **config: Any) -> Any:
    model = vit(variant)
    return TECHNIQUE.apply(model, Config(**config), surroundings(model)).model


def phi(x: Tensor, w: Tensor) -> Tensor:
    """The paper's equation 5 for x (..., D), w (m, D), without any stabilisation."""
    return torch.exp(x @ w.T - x.square().sum(dim=-1, keepdim=True) / 2) / math.sqrt(len(w))


def slow(q: Tensor, k: Tensor, v: Tensor, w: Tensor, scale: float, size: Tensor | None = None) -> Tensor:
    """One query, key and head at a time."""
    out = torch.zeros_like(v)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        weights = phi(k[b, h] * scale**0.5, w) @ phi(q[b, h, i] * scale**0.5, w)
        if size is not None:
            weights = weights * size[b, :, 0]
        out[b, h, i] = weights @ v[b, h] / weights.sum()
    return out


@pytest.mark.parametrize(("head_dim", "share", "count"), [(64, 1.0, 266), (32, 1.0, 110), (64, 0.5, 133), (2, 0.25, 1)])
def test_number_of_features(head_dim: int, share: float, count: int) -> None:
    assert feature_count(head_dim, share) == count


def test_blocks_of_the_projection_are_orthogonal() -> None:
    w = orthogonal_projection(40, 16, seeded())
    assert w.shape == (40, 16)
    for block in w.split(16):
        unit = block / block.norm(dim=1, keepdim=True)
        torch.testing.assert_close(unit @ unit.T, torch.eye(len(block)), atol=1e-5, rtol=0)


def test_rows_of_the_projection_are_like_normal_vectors() -> None:
    """Lengths are chi-distributed (mean square D, variance 2 D) and directions have no preference."""
    rows = torch.cat([orthogonal_projection(16, 16, seeded(i)) for i in range(200)])
    squares = rows.square().sum(dim=1)
    assert abs(float(squares.mean()) - 16) < 0.4
    assert abs(float(squares.var()) - 32) < 4
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(16), atol=0.1, rtol=0)
    assert rows.mean(dim=0).abs().max() < 0.05


def test_features_times_offset_are_the_papers() -> None:
    q, k, _ = qkv(5)
    w = drawn(24)
    queries, keys, offset = positive_features(q, k, w, 0.25)
    found = offset.exp() * (queries @ keys.mT)
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 3, 4), (0, 1, 4, 2)):
        want = phi(q[b, h, i] * 0.5, w) @ phi(k[b, h, j] * 0.5, w)
        torch.testing.assert_close(found[b, h, i, j], want)
    assert float(queries.max()) == float(keys.max()) == 1.0


def test_products_of_features_have_the_kernels_mean() -> None:
    """Unbiased: the mean over many projections of phi(q) phi(k) is exp(q k / sqrt D)."""
    q, k, _ = qkv(3)
    q, k = 0.25 * q, 0.25 * k
    kernel = (q @ k.mT / 4).exp()
    total = torch.zeros_like(kernel)
    for i in range(100):
        queries, keys, offset = positive_features(q, k, drawn(64, seed=i), 0.25)
        total += offset.exp() * (queries @ keys.mT)
    assert ((total / 100 - kernel) / kernel).abs().max() < 0.05


def test_equals_the_formula() -> None:
    q, k, v = qkv(7)
    w = drawn(24)
    torch.testing.assert_close(performer_attention(q, k, v, w, 0.25), slow(q, k, v, w, 0.25))
    size = torch.randint(1, 5, (2, 7, 1), generator=seeded(1)).double()
    torch.testing.assert_close(performer_attention(q, k, v, w, 0.25, size), slow(q, k, v, w, 0.25, size))


def test_more_features_come_nearer_to_softmax() -> None:
    q, k, v = qkv(40)
    q, k = 0.5 * q, 0.5 * k
    want = F.scaled_dot_product_attention(q, k, v, scale=0.25)

    def error(features: int) -> float:
        outs = [performer_attention(q, k, v, drawn(features, seed=i), 0.25) for i in range(4)]
        return sum(float((out - want).square().mean()) for out in outs)

    few, more, most = error(16), error(128), error(1024)
    assert few > 3 * more > 9 * most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_key_of_size_s_is_s_equal_keys(dtype: torch.dtype) -> None:
    q, k, v = qkv(6, dtype)
    w, counts = drawn(44).to(dtype), torch.tensor([1, 3, 1, 2, 5, 1])
    repeated = [x.repeat_interleave(counts, dim=2) for x in (k, v)]
    want = performer_attention(q, *repeated, w, 0.25)
    size = counts.to(dtype)[None, :, None].expand(2, -1, -1)
    out = performer_attention(q, k, v, w, 0.25, size)
    assert (out - want).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-14)


def test_attend_sized_counts_merged_tokens() -> None:
    """Through the whole module: tokens that are repeated give what tokens with sizes give, and its metric is the keys' mean."""
    attn: PerformerAttention = replaced("qk_norm").blocks[0].attn
    x = torch.randn(2, 9, 32, generator=seeded())
    counts = torch.tensor([1, 1, 4, 1, 2, 1, 1, 3, 1])
    size = counts.float()[None, :, None].expand(2, -1, -1)
    out, metric = attn.attend_sized(x, size)
    first = counts.cumsum(0) - counts
    repeated = attn(x.repeat_interleave(counts, dim=1))
    torch.testing.assert_close(out, repeated[:, first], atol=1e-6, rtol=1e-5)
    assert metric.shape == (2, 9, 8)
    torch.testing.assert_close(metric, attn.split(x)[1].mean(dim=1))
    torch.testing.assert_close(attn.attend_sized(x, None)[0], attn(x))
    torch.testing.assert_close(attn.attend_sized(x, torch.ones(2, 9, 1))[0], attn(x))


@pytest.mark.parametrize("factor", [30.0, 1e3])
def test_extreme_logits_stay_finite(factor: float) -> None:
    q, k, v = (x.float() for x in qkv(20))
    q.requires_grad_()
    out = performer_attention(q * factor, k * factor, v, drawn(44).float(), 0.25)
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert bool(out.abs().max() <= v.abs().max() * (1 + 1e-5))
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype: torch.dtype) -> None:
    q, k, v = (x.float() for x in qkv(65))
    w = drawn(44).float()
    want = performer_attention(q, k, v, w, 0.25)
    out = performer_attention(q.to(dtype), k.to(dtype), v.to(dtype), w, 0.25)
    assert out.dtype == dtype
    assert (out.float() - want).abs().max() < 0.05 * want.abs().max()


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v = (x[:1, :1].clone().requires_grad_() for x in qkv(4, dim=8))
    size = torch.tensor([1.0, 2.0, 1.0, 3.0], dtype=torch.float64)[None, :, None]
    w = drawn(16, 8)
    assert torch.autograd.gradcheck(lambda *x: performer_attention(*x, w, 0.35, size), (q, k, v))


@pytest.mark.parametrize("variant", VARIANTS)
def test_module_is_timms_but_for_the_approximation(variant: str) -> None:
    """With the kernel itself in place of its estimate, the module computes what timm's does."""
    model, exact = replaced(variant), vit(variant)
    for attn, (q, k, v) in [(b.attn, b.attn.split(torch.randn(2, 9, 32, generator=seeded()))) for b in model.blocks]:
        torch.testing.assert_close(
            attn.mix(q, k, v).double(),
            slow(q.double(), k.double(), v.double(), attn.projection.double(), 8**-0.5),
            atol=1e-5,
            rtol=1e-4,
        )
    for block, other in zip(model.blocks, exact.blocks, strict=True):
        x = torch.randn(2, 9, 32, generator=seeded())
        q, k, v = block.attn.split(x)
        torch.testing.assert_close(block.attn.join(x, F.scaled_dot_product_attention(q, k, v)), other.attn(x))


def test_gate_and_output_norm_are_honoured() -> None:
    from timm.layers import Attention

    torch.manual_seed(0)
    for changes in ({"gated": True}, {"scale_norm": True, "norm_layer": torch.nn.LayerNorm}):
        attn = Attention(32, num_heads=4, qkv_bias=True, **changes).eval()
        mine, x = PerformerAttention(attn, orthogonal_projection(16, 8, seeded())), torch.randn(2, 9, 32)
        q, k, v = mine.split(x)
        torch.testing.assert_close(mine.join(x, F.scaled_dot_product_attention(q, k, v)), attn(x))


def test_a_pruned_model_keeps_its_own_dimensions() -> None:
    model = vit()
    shared_slicing.keep_heads(model.blocks[1].attn, torch.tensor([0, 3]))
    TECHNIQUE.apply(model, Config(), surroundings(model))
    assert [b.attn.num_heads for b in model.blocks] == [4, 2, 4]
    assert model(images()).shape == (4, 5)


def test_projections_come_from_the_seed_and_are_stored() -> None:
    one, two = (vit() for _ in range(2))
    applied = TECHNIQUE.apply(one, Config(), surroundings(one, seed=3))
    TECHNIQUE.apply(two, Config(), surroundings(two, seed=4))
    assert applied.resolved == {"features": [16, 16, 16]}
    stored = one.state_dict()["blocks.1.attn.projection"]
    assert stored.shape == (16, 8)
    assert not torch.equal(stored, two.state_dict()["blocks.1.attn.projection"])
    assert not torch.equal(stored, one.state_dict()["blocks.0.attn.projection"])
    assert sum(p.numel() for p in one.parameters()) == info().params


def test_macs_are_the_closed_form() -> None:
    """4 N m D a head and one product more for the totals, N m; exact attention has 2 N^2 D."""
    model = vit()
    whole = count_macs(model, (1, 3, 16, 16))
    TECHNIQUE.apply(model, Config(), surroundings(model))
    N, D, m = 17, 8, 16
    assert count_macs(model, (1, 3, 16, 16)) - whole == 3 * 4 * (4 * N * m * D + N * m - 2 * N * N * D)


def test_masks_are_refused_and_so_is_another_attention() -> None:
    model = replaced()
    with pytest.raises(ValueError, match="performer: attention masks are not possible"):
        model.blocks[0].attn(torch.zeros(1, 17, 32), is_causal=True)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn must be timm's Attention, found PerformerAttention"):
        TECHNIQUE.apply(model, Config(), surroundings(model))


def test_check_and_trains() -> None:
    assert TECHNIQUE.check(info(), Config()) is None
    assert "head_dim must be 2 or more" in str(TECHNIQUE.check(info(head_dim=1), Config()))
    assert TECHNIQUE.trains(Config())
    assert not TECHNIQUE.trains(Config(recover=False))
