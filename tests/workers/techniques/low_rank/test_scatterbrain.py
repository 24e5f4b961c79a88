"""Sparse and low-rank against a dense transcription with an explicit support, and its two limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.techniques.models import VARIANTS, images, info, surroundings, vit
from workers.measuring.counting import count_macs
from workers.techniques.low_rank.performer import performer_attention
from workers.techniques.low_rank.scatterbrain import TECHNIQUE, Config, blocks, neighbours, scatterbrain_attention
from workers.techniques.low_rank.shared_random_features import orthogonal_projection


def qkv(tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0, dim: int = 16) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, 3, tokens, dim, generator=generator, dtype=dtype).unbind(0)


def drawn(features: int = 24, dim: int = 16) -> Tensor:
    return orthogonal_projection(features, dim, torch.Generator().manual_seed(7)).double()


def replaced(variant: str = "class", **config: Any) -> Any:
    model = vit(variant)
    return TECHNIQUE.apply(model, Config(**config), surroundings(model)).model


def support(tokens: int, window: int, prefix: int) -> Tensor:
    """(N, N) bool, written down one pair at a time."""
    near = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        for j in range(tokens):
            if i < prefix or j < prefix:
                near[i, j] = True
            elif window:
                near[i, j] = abs((i - prefix) // window - (j - prefix) // window) <= 1
    return near


def dense(q: Tensor, k: Tensor, v: Tensor, w: Tensor, window: int, prefix: int, scale: float) -> Tensor:
    """The paper's estimate with all its N by N matrices, nothing stabilised."""

    def phi(x: Tensor) -> Tensor:
        x = x * math.sqrt(scale)
        return (x @ w.T - x.square().sum(dim=-1, keepdim=True) / 2).exp() / math.sqrt(len(w))

    low_rank = phi(q) @ phi(k).mT
    sparse = ((scale * q @ k.mT).exp() - low_rank) * support(q.shape[-2], window, prefix)
    weights = sparse + low_rank
    return weights @ v / weights.sum(dim=-1, keepdim=True)


def test_blocks_and_their_neighbours() -> None:
    x = torch.arange(1.0, 8.0)[:, None]
    assert blocks(x, 3)[..., 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert neighbours(x, 3)[..., 0].tolist() == [
        [0, 0, 0, 1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, 6, 7, 0, 0],
        [4, 5, 6, 7, 0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize("tokens", [17, 24, 25])
@pytest.mark.parametrize("window", [0, 1, 3, 4, 10, 30])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_equals_the_dense_formula(tokens: int, window: int, prefix: int) -> None:
    q, k, v = qkv(tokens)
    w = drawn()
    found = scatterbrain_attention(q, k, v, w, window, prefix, 0.25)
    torch.testing.assert_close(found, dense(q, k, v, w, window, prefix, 0.25))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("window", [10, 64])
def test_a_window_over_everything_is_exact(window: int, prefix: int, dtype: torch.dtype, error: float) -> None:
    """All of the random features' total has to cancel; in float32 that costs digits."""
    q, k, v = qkv(20, dtype)
    want = (q.double() @ k.double().mT * 0.25).softmax(-1) @ v.double()
    found = scatterbrain_attention(q, k, v, drawn().to(dtype), window, prefix, 0.25)
    assert (found - want).abs().max() < error


def test_no_window_is_performer() -> None:
    q, k, v = qkv(20)
    found = scatterbrain_attention(q, k, v, drawn(), 0, 0, 0.25)
    torch.testing.assert_close(found, performer_attention(q, k, v, drawn(), 0.25))


def test_prefix_tokens_attend_exactly() -> None:
    q, k, v = qkv(20)
    found = scatterbrain_attention(q, k, v, drawn(), 3, 2, 0.25)
    torch.testing.assert_close(found[:, :, :2], F.scaled_dot_product_attention(q, k, v, scale=0.25)[:, :, :2])


def test_nearer_to_softmax_than_either_part() -> None:
    """Keys that are strongest near the query, which random features of few dimensions miss."""
    q, k, v = qkv(48)
    k = 0.3 * k + 2.0 * q
    want = F.scaled_dot_product_attention(q, k, v, scale=0.25)

    def error(window: int) -> float:
        return float((scatterbrain_attention(q, k, v, drawn(), window, 0, 0.25) - want).square().mean())

    assert error(4) < 0.2 * error(0)


@pytest.mark.parametrize("factor", [1.0, 10.0, 100.0])
def test_extreme_logits_stay_finite(factor: float) -> None:
    q, k, v = (x.float() for x in qkv(30))
    q.requires_grad_()
    out = scatterbrain_attention(q * factor, k * factor, v, drawn().float(), 4, 1, 0.25)
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype: torch.dtype) -> None:
    q, k, v = (x.float() for x in qkv(65))
    want = scatterbrain_attention(q, k, v, drawn().float(), 8, 1, 0.25)
    out = scatterbrain_attention(q.to(dtype), k.to(dtype), v.to(dtype), drawn().float(), 8, 1, 0.25)
    assert out.dtype == dtype
    assert (out.float() - want).abs().max() < 0.05 * want.abs().max()


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v = (x[:1, :1].clone().requires_grad_() for x in qkv(9, dim=4))
    w = drawn(5, 4)
    assert torch.autograd.gradcheck(lambda *x: scatterbrain_attention(*x, w, 2, 1, 0.5), (q, k, v))


@pytest.mark.parametrize("variant", VARIANTS)
def test_module_is_timm_where_the_window_covers_all(variant: str) -> None:
    torch.testing.assert_close(replaced(variant, window=16)(images()), vit(variant)(images()), atol=1e-4, rtol=1e-4)
    model = replaced(variant, window=4)
    prefix = vit(variant).num_prefix_tokens
    x = torch.randn(2, 16 + prefix, 32, generator=torch.Generator().manual_seed(0))
    attn = model.blocks[0].attn
    q, k, v = (t.double() for t in attn.split(x))
    want = dense(q, k, v, attn.projection.double(), 4, prefix, 8**-0.5)
    torch.testing.assert_close(attn.mix(*attn.split(x)).double(), want, atol=1e-5, rtol=1e-4)


def test_macs_are_the_closed_form() -> None:
    """No N by N product: N (4 m D + m + 3 w (2 D + m)) over patches, and the prefix token's row and column."""
    model = vit(img_size=64)
    whole = count_macs(model, (1, 3, 64, 64))
    TECHNIQUE.apply(model, Config(window=16, features=1.0), surroundings(model))
    N, D, m, w, prefix = 256, 8, 16, 16, 1
    local = N * (4 * m * D + m + 3 * w * (2 * D + m)) + 2 * N * D * prefix
    first = 2 * (N + prefix) * D * prefix
    assert count_macs(model, (1, 3, 64, 64)) - whole == 3 * 4 * (local + first - 2 * (N + prefix) ** 2 * D)


def test_check_and_trains() -> None:
    assert TECHNIQUE.check(info(), Config(window=5)) is None
    assert TECHNIQUE.check(info(), Config(window=6)) == (
        "window=6: three windows must be fewer than the 16 patch tokens, or exact attention costs less"
    )
    assert TECHNIQUE.check(info(num_tokens=21, num_prefix_tokens=5), Config(window=6)) is not None
    assert "head_dim must be 2 or more" in str(TECHNIQUE.check(info(head_dim=1), Config(window=4)))
    assert TECHNIQUE.trains(Config())
    assert not TECHNIQUE.trains(Config(recover=False))


def test_resolved_values_and_refusals() -> None:
    model = vit("registers")
    applied = TECHNIQUE.apply(model, Config(window=4), surroundings(model))
    assert applied.resolved == {"features": [8, 8, 8], "window": 4, "prefix": 5}
    with pytest.raises(ValueError, match="scatterbrain: attention masks are not possible"):
        model.blocks[0].attn(torch.zeros(1, 21, 32), is_causal=True)
    with pytest.raises(ValueError, match="found ScatterbrainAttention"):
        TECHNIQUE.apply(model, Config(window=4), surroundings(model))
