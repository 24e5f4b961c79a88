"""Projected keys and values against a transcription of the formula, the start of the projections, and what they share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.workers.techniques.models import VARIANTS, images, info, surroundings, vit
from workers import artefact
from workers.measuring.counting import count_macs
from workers.techniques.low_rank.linformer import TECHNIQUE, Config, linformer_attention, segment_projection

SHARING = ("heads", "key_value", "layers")


def replaced(variant: str = "class", **config: Any) -> Any:
    model = vit(variant)
    return TECHNIQUE.apply(model, Config(**config), surroundings(model)).model


def test_start_is_the_prefix_and_means_of_segments() -> None:
    assert segment_projection(4, 8, 1).tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, pytest.approx(1 / 3), pytest.approx(1 / 3), pytest.approx(1 / 3), 0, 0, 0, 0],
        [0, 0, 0, 0, 0.5, 0.5, 0, 0],
        [0, 0, 0, 0, 0, 0, 0.5, 0.5],
    ]
    weight = segment_projection(96, 577, 1)
    torch.testing.assert_close(weight.sum(dim=1), torch.ones(96))
    assert set((weight > 0).sum(dim=0).tolist()) == {1}


def test_one_projection_a_token_is_exact() -> None:
    q, k, v = torch.randn(3, 2, 3, 9, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    start = segment_projection(9, 9, 1)
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(linformer_attention(q, k, v, start, start, 8**-0.5), want)


def test_equals_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 8, generator=generator, dtype=torch.float64).unbind(0)
    E, G = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64).unbind(0)
    out = linformer_attention(q, k, v, E, G, 0.3)
    for b in range(2):
        for h in range(3):
            weights = (0.3 * q[b, h] @ (E @ k[b, h]).T).softmax(dim=-1)
            torch.testing.assert_close(out[b, h], weights @ (G @ v[b, h]))


@pytest.mark.parametrize("sharing", SHARING)
def test_parameters_by_what_is_shared(sharing: str) -> None:
    model = replaced(k=6, sharing=sharing)
    added = {"heads": 6, "key_value": 3, "layers": 1}[sharing] * 6 * 17
    assert sum(p.numel() for p in model.parameters()) == info().params + added
    assert TECHNIQUE.info_after(info(), Config(k=6, sharing=sharing)).params == info().params + added
    attns = [b.attn for b in model.blocks]
    assert (attns[0].keys is attns[0].values) == (sharing != "heads")
    assert (attns[0].keys is attns[1].keys) == (sharing == "layers")


@pytest.mark.parametrize("sharing", SHARING)
def test_training_moves_every_projection_and_they_stay_shared(sharing: str) -> None:
    model = replaced("qk_norm", k=6, sharing=sharing).train()
    start = segment_projection(6, 17, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(images()), torch.arange(4)).backward()
    optimizer.step()
    for block in model.blocks:
        for part in (block.attn.keys, block.attn.values):
            assert not torch.equal(part.weight, start)
    again = copy.deepcopy(model)
    assert (again.blocks[0].attn.keys is again.blocks[2].attn.keys) == (sharing == "layers")


@pytest.mark.parametrize("sharing", SHARING)
def test_an_artefact_holds_a_shared_projection_once(sharing: str, tmp_path: Path) -> None:
    create = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
    description = {"family": "timm", "name": None, "create": create}
    model = vit(mlp_ratio=4.0)
    applied = TECHNIQUE.apply(model, Config(k=6, sharing=sharing), surroundings(model))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.keys.weight += 0.1
    step = {"technique": "linformer", "version": TECHNIQUE.version, "resolved": applied.resolved}
    artefact.save(model, tmp_path, model_description=description, steps=[step])
    found = artefact.load(tmp_path)
    assert torch.equal(found(images()), model(images()))
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in model.parameters())


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 5, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    E, G = (torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda *x: linformer_attention(*x, 0.5), (q, k, v, E, G))


@pytest.mark.parametrize("variant", VARIANTS)
def test_module_is_timm_with_averaged_keys_and_values(variant: str) -> None:
    """k - prefix = 8 of 16 patches: each projected token is the mean of two neighbours."""
    prefix = vit(variant).num_prefix_tokens
    model, exact = replaced(variant, k=8 + prefix), vit(variant)
    x = torch.randn(2, 16 + prefix, 32, generator=torch.Generator().manual_seed(0))
    for block, other in zip(model.blocks, exact.blocks, strict=True):
        q, k, v = block.attn.split(x)
        k, v = (torch.cat([t[:, :, :prefix], t[:, :, prefix:].reshape(2, 4, 8, 2, 8).mean(3)], dim=2) for t in (k, v))
        mixed = (q @ k.mT * 8**-0.5).softmax(-1) @ v
        torch.testing.assert_close(block.attn(x), block.attn.join(x, mixed), atol=1e-5, rtol=1e-4)
        full = block.attn.join(x, F.scaled_dot_product_attention(*block.attn.split(x)))
        torch.testing.assert_close(full, other.attn(x))


def test_macs_are_the_closed_form() -> None:
    model = vit()
    whole = count_macs(model, (1, 3, 16, 16))
    TECHNIQUE.apply(model, Config(k=6), surroundings(model))
    N, D, K = 17, 8, 6
    assert count_macs(model, (1, 3, 16, 16)) - whole == 3 * 4 * (4 * N * K * D - 2 * N * N * D)


def test_another_number_of_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="linformer: the projections are made for 17 tokens, got 16"):
        replaced(k=6).blocks[0].attn(torch.zeros(1, 16, 32))
    with pytest.raises(ValueError, match="linformer: attention masks are not possible"):
        replaced(k=6).blocks[0].attn(torch.zeros(1, 17, 32), is_causal=True)
    model = replaced(k=6)
    with pytest.raises(ValueError, match="found LinformerAttention"):
        TECHNIQUE.apply(model, Config(k=6), surroundings(model))


def test_check_and_trains() -> None:
    assert TECHNIQUE.check(info(), Config(k=16)) is None
    assert TECHNIQUE.check(info(), Config(k=17)) == (
        "k=17 must be below the 17 tokens: otherwise nothing is projected away"
    )
    assert TECHNIQUE.check(info(num_prefix_tokens=5, num_tokens=21), Config(k=5)) == (
        "k=5 must exceed the 5 prefix tokens, each of which keeps a row"
    )
    assert TECHNIQUE.trains(Config())
