"""EViT: the paper's token trace, the fused token in closed form, the whole model against a slow one, and its MACs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.workers.techniques.models import VARIANTS, images, info, surroundings, vit
from workers.measuring.counting import count_macs
from workers.techniques.tokens.evit import TECHNIQUE, Config, FusingBlocks, fuse, kept_count, patch_counts


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fused(variant: str = "class", changes: dict[str, Any] | None = None, **config: Any) -> Any:
    model = vit(variant, **(changes or {}))
    return TECHNIQUE.apply(model, Config(**config), surroundings(model)).model


def test_trace_of_the_paper() -> None:
    assert patch_counts(196, 0.7, (3, 6, 9)) == [139, 99, 71]
    assert patch_counts(196, 0.5, (3, 6, 9)) == [99, 51, 27]
    assert patch_counts(10, 0.7, (0,)) == [8]  # 0.7 x 10 is 7.000000000000001 in binary


def test_a_single_token_is_not_replaced_by_itself() -> None:
    assert kept_count(4, 0.7) == 4  # ceil(2.8) = 3 would fuse one
    assert kept_count(10, 1.0) == 10
    assert patch_counts(3, 0.7, (0, 1, 2)) == [3, 3, 3]


def test_fused_token_by_hand() -> None:
    x = torch.arange(12.0).reshape(1, 6, 2)
    score = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])  # of rows 1 to 5
    out = fuse(x, score, kept=2, prefix=1)
    want = [[0, 1], [4, 5], [8, 9], [0.1 * 2 + 0.05 * 6 + 0.15 * 10, 0.1 * 3 + 0.05 * 7 + 0.15 * 11]]
    torch.testing.assert_close(out, torch.tensor([want]))


def test_gradients_of_the_fused_token() -> None:
    x = random(2, 7, 3).double().requires_grad_()
    score = random(2, 6, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: fuse(a, b, 2, 1), (x, score))


def test_tokens_of_every_mlp_and_macs_follow_the_trace() -> None:
    """12 blocks on 14 x 14 patches: 197 tokens until the MLP of block 3, then 140, 100 and 72 with the class token."""
    model = fused(changes={"img_size": 56, "depth": 12}, keep=0.7)
    seen: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with torch.inference_mode():
        model(images(1, size=56))
    assert seen == [197] * 3 + [140] * 3 + [100] * 3 + [72] * 3
    into_attention = [197] * 4 + [140] * 3 + [100] * 3 + [72] * 2
    macs = 196 * 4 * 4 * 3 * 32 + 32 * 5  # patch embedding, head
    macs += sum(4 * n * 32 * 32 + 2 * n * n * 32 for n in into_attention) + sum(2 * m * 32 * 64 for m in seen)
    macs += sum(n * 32 for n in (197, 140, 100))  # the class token's row of the map, beside fused attention
    assert count_macs(model, (1, 3, 56, 56)) == macs


@pytest.mark.parametrize("mode", [True, False])
def test_training_reduces_as_evaluation_does(mode: bool) -> None:
    model = fused("layerscale", keep=0.5).train(mode)
    torch.testing.assert_close(model(images()), fused("layerscale", keep=0.5)(images()), rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_equals_a_slow_one(variant: str) -> None:
    """The whole model, image by image, with explicit attention maps."""
    model = fused(variant, keep=0.6)
    dense = vit(variant)
    prefix = dense.num_prefix_tokens
    x = dense.norm_pre(dense._pos_embed(dense.patch_embed(images())))
    rows = []
    for image in x:
        t = image
        for block in dense.blocks:
            attn, n = block.attn, len(t)
            q, k, v = attn.qkv(block.norm1(t)).reshape(n, 3, 4, 8).permute(1, 2, 0, 3).unbind(0)
            q, k = attn.q_norm(q), attn.k_norm(k)
            w = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
            t = t + block.ls1(attn.proj((w @ v).transpose(0, 1).reshape(n, 32)))
            asking = w[:, : 2 if variant == "distil" else 1]
            if variant == "average":
                asking = (q.mean(1, keepdim=True) @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
            score = asking[:, :, prefix:].mean(dim=(0, 1)).tolist()
            kept = math.ceil(0.6 * len(score))
            order = sorted(range(len(score)), key=lambda i: -score[i])
            assert len(score) - kept > 1
            rest = sum(score[i] * t[prefix + i] for i in order[kept:])
            t = torch.stack([*t[:prefix], *(t[prefix + i] for i in sorted(order[:kept])), rest])
            t = t + block.ls2(block.mlp(block.norm2(t)))
        rows.append(dense.forward_head(dense.norm(t[None])))
    torch.testing.assert_close(model(images()), torch.cat(rows), atol=2e-5, rtol=1e-4)


def test_training_reaches_every_parameter() -> None:
    model = fused("layerscale").train()
    model(images()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_names_of_weights_stay() -> None:
    model = fused()
    assert isinstance(model.blocks, FusingBlocks)
    assert list(model.state_dict()) == list(vit().state_dict())


def test_heads_that_differ_after_pruning() -> None:
    from workers.techniques.pruning.magnitude_prune import TECHNIQUE as PRUNE

    model, twin = vit(), vit()
    for m in (model, twin):
        PRUNE.apply(m, PRUNE.Config(head_ratio=0.5, mlp_ratio=0.25), surroundings(m))
    TECHNIQUE.apply(model, Config(keep=1.0), surroundings(model))
    torch.testing.assert_close(model(images()), twin(images()), rtol=0, atol=0)


def test_check_wants_something_to_fuse() -> None:
    assert TECHNIQUE.check(info(), Config()) is None
    assert "keep=1 fuses none of 16 patch tokens" in str(TECHNIQUE.check(info(), Config(keep=1.0)))
    assert "fuses none of 4 patch tokens" in str(TECHNIQUE.check(info(num_tokens=5), Config(keep=0.7)))
