"""Nystrom attention against exact softmax, a direct transcription of the formula, and residuals measured before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.techniques.models import VARIANTS, images, info, surroundings, vit
from workers.techniques.low_rank.nystrom import (
    TECHNIQUE,
    Config,
    NystromAttention,
    nystrom_attention,
    pseudo_inverse,
    segment_means,
)


def qkv(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0, dim: int = 16) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, 3, tokens, dim, generator=generator, dtype=dtype).unbind(0)


def replaced(variant: str = "class", **config: Any) -> Any:
    model = vit(variant)
    return TECHNIQUE.apply(model, Config(**config), surroundings(model)).model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("landmarks", [20, 128])
def test_as_many_landmarks_as_tokens_is_exact(dtype: torch.dtype, landmarks: int) -> None:
    q, k, v = qkv(20, dtype)
    want = (q.double() @ k.double().mT * 0.25).softmax(-1) @ v.double()
    out = nystrom_attention(q, k, v, landmarks, 6, 0.25)
    # Relative; a unit in the last place of the largest value is 1.2e-7.
    assert (out - want).abs().max() <= 3e-7 * want.abs().max()


def test_three_factors_at_full_rank_are_exact_too() -> None:
    """A pinv(A) A = A: the formula itself, which the shortcut for m >= N does not go through."""
    q, k, v = qkv(20, torch.float64)
    core = (q @ k.transpose(-1, -2) * 0.25).softmax(-1)
    approximate = core @ pseudo_inverse(core, 40) @ (core @ v)
    assert (approximate - core @ v).abs().max() < 1e-9


@pytest.mark.parametrize(("tokens", "landmarks"), [(24, 8), (23, 8), (17, 16), (197, 32), (65, 24)])
def test_segments_of_any_length(tokens: int, landmarks: int) -> None:
    (x, _, _) = qkv(tokens)
    s = tokens // landmarks
    lengths = [s] * ((s + 1) * landmarks - tokens)
    lengths += [s + 1] * (landmarks - len(lengths))
    assert sum(lengths) == tokens
    want = torch.stack([part.mean(dim=-2) for part in x.split(lengths, dim=-2)], dim=-2)
    torch.testing.assert_close(segment_means(x, landmarks), want)


def test_residual_of_the_inverse_falls_as_stated() -> None:
    q, k, _ = qkv(32, torch.float64, dim=64)
    core = (q @ k.transpose(-1, -2) / 8).softmax(-1)
    eye = torch.eye(32, dtype=core.dtype)
    residual = [float((core @ pseudo_inverse(core, i) - eye).norm(dim=(-1, -2)).mean()) for i in (2, 6, 10, 20)]
    bounds = [
        (4.5, 4.7),
        (1.7, 1.9),
        (0.5, 1.1),
        (0.0, 5e-4),
    ]  # measured before this was written: 4.6, 1.8, 1.0, 5e-4
    assert all(low <= r <= high for r, (low, high) in zip(residual, bounds, strict=True)), residual


@pytest.mark.parametrize("tokens", [24, 23, 65])
def test_equals_the_formula(tokens: int) -> None:
    q, k, v = qkv(tokens, torch.float64)

    def means(x: Tensor) -> Tensor:
        return segment_means(x, 8)

    z = torch.linalg.pinv((means(q) @ means(k).mT / 4).softmax(-1))
    want = (q @ means(k).mT / 4).softmax(-1) @ z @ ((means(q) @ k.mT / 4).softmax(-1) @ v)
    torch.testing.assert_close(nystrom_attention(q, k, v, 8, 40, 0.25), want, atol=1e-6, rtol=1e-6)


def test_many_iterations_are_worse_than_the_papers_six() -> None:
    """The inverse of nearly singular landmarks magnifies what they leave out, in exact arithmetic too."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(8, 4, 33, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)
    off = {i: float((nystrom_attention(q, k, v, 8, i, 0.25) - exact).norm() / exact.norm()) for i in (6, 15, 20)}
    assert off[6] < 1 < off[15] < off[20]


def test_an_image_does_not_depend_on_its_batch() -> None:
    q, k, v = qkv(33)
    k = k * torch.tensor([1.0, 30.0])[:, None, None, None]
    together = nystrom_attention(q, k, v, 8, 2, 0.25)
    for i in range(2):
        alone = nystrom_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], 8, 2, 0.25)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_head_does_not_depend_on_the_others() -> None:
    q, k, v = qkv(33)
    k = k * torch.tensor([1.0, 30.0, 0.1])[:, None, None]
    together = nystrom_attention(q, k, v, 8, 2, 0.25)
    for h in range(3):
        alone = nystrom_attention(q[:, h : h + 1], k[:, h : h + 1], v[:, h : h + 1], 8, 2, 0.25)
        torch.testing.assert_close(together[:, h : h + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype: torch.dtype) -> None:
    q, k, v = qkv(65)
    want = nystrom_attention(q, k, v, 16, 6, 0.25)
    out = nystrom_attention(q.to(dtype), k.to(dtype), v.to(dtype), 16, 6, 0.25)
    assert out.dtype == dtype
    assert (out.float() - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_module_is_timm_where_the_landmarks_suffice(variant: str) -> None:
    torch.testing.assert_close(replaced(variant, landmarks=128)(images()), vit(variant)(images()), atol=2e-6, rtol=1e-6)
    assert (replaced(variant, landmarks=8)(images()) - vit(variant)(images())).abs().max() > 1e-4


def test_gate_and_output_norm_are_honoured() -> None:
    from timm.layers import Attention

    torch.manual_seed(0)
    for changes in ({"gated": True}, {"scale_norm": True, "norm_layer": torch.nn.LayerNorm}):
        attn = Attention(32, num_heads=4, qkv_bias=True, **changes).eval()
        x = torch.randn(2, 9, 32)
        torch.testing.assert_close(NystromAttention(attn, 9, 6)(x), attn(x))


def test_names_of_modules_and_weights_stay() -> None:
    model = replaced(landmarks=8)
    assert list(model.state_dict()) == list(vit().state_dict())
    assert isinstance(model.blocks[1].attn.qkv, torch.nn.Linear)


def test_gradients_are_finite() -> None:
    model = replaced("qk_norm", landmarks=8, iterations=6).train()
    F.cross_entropy(model(images()), torch.arange(4)).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="masks are not possible"):
        replaced(landmarks=8).blocks[0].attn(torch.zeros(1, 17, 32), attn_mask=torch.zeros(1, 1, 17, 17))


def test_asks_for_training_where_told_to() -> None:
    assert TECHNIQUE.trains(Config(recover=True))
    assert not TECHNIQUE.trains(Config())


def test_check_wants_fewer_landmarks_than_tokens() -> None:
    assert TECHNIQUE.check(info(), Config(landmarks=16)) is None
    assert TECHNIQUE.check(info(), Config(landmarks=17)) == (
        "landmarks=17 must be below the 17 tokens: otherwise it is exact attention"
    )


def test_refuses_a_model_whose_tokens_are_merged() -> None:
    model = replaced(landmarks=8)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn must be timm's Attention, found NystromAttention"):
        TECHNIQUE.apply(model, Config(landmarks=8), surroundings(model))
