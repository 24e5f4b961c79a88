"""Token merging against a slow reference written from the paper (arXiv 2210.09461, section 3), and its invariants."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.techniques.models import VARIANTS, images, info, surroundings, vit
from workers.measuring.counting import count_macs
from workers.techniques.tokens.shared_blocks import Tokens
from workers.techniques.tokens.shared_merging import MergingBlocks, attend_sized, merge
from workers.techniques.tokens.tome import SHAPES, TECHNIQUE, Config, match, reductions, token_counts


def merged(variant: str = "class", **config: Any) -> Any:
    model = vit(variant)
    return TECHNIQUE.apply(model, Config(**config), surroundings(model)).model


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_merge(x: Tensor, size: Tensor, metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """One image, token by token: x (N, C), size (N,), metric (N, D)."""
    N = len(x)
    r = min(r, (N - prefix) // 2)
    a_rows = [i for i in range(0, N, 2) if i >= prefix]
    b_rows = [i for i in range(1, N, 2) if i >= prefix]
    scores = {}
    for i in a_rows:
        cosines = [(F.cosine_similarity(metric[i], metric[j], dim=0).item(), j) for j in b_rows]
        scores[i] = max(cosines) if cosines else (-1.0, -1)
    gone = sorted(a_rows, key=lambda i: -scores[i][0])[:r]
    total, weight = x * size[:, None], size.clone()
    for i in gone:
        total[scores[i][1]] += total[i]
        weight[scores[i][1]] += size[i]
    order = [*range(prefix), *(i for i in a_rows if i not in gone), *b_rows]
    return (total / weight[:, None])[order], weight[order]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("tokens", [12, 17])
@pytest.mark.parametrize("r", [1, 4, 99])
def test_merge_equals_the_slow_reference(prefix: int, tokens: int, r: int) -> None:
    x, metric = random(3, tokens, 6), random(3, tokens, 4, seed=1)
    size = torch.randint(1, 5, (3, tokens, 1), generator=torch.Generator().manual_seed(2)).float()
    matching = match(metric, r, prefix)
    assert matching is not None
    out, out_size = merge(x, size, matching)
    for i in range(3):
        want, want_size = slow_merge(x[i], size[i, :, 0], metric[i], r, prefix)
        torch.testing.assert_close(out[i], want)
        torch.testing.assert_close(out_size[i, :, 0], want_size)
    torch.testing.assert_close(out[:, :prefix], x[:, :prefix])


def test_sizes_and_weighted_sums_are_conserved() -> None:
    x, size = random(2, 33, 8), torch.ones(2, 33, 1)
    total = x.sum(dim=1)
    for r in (5, 7, 3):
        matching = match(x, r, 1)
        assert matching is not None
        x, size = merge(x, size, matching)
        torch.testing.assert_close(size.sum(dim=1), torch.full((2, 1), 33.0))
        torch.testing.assert_close((x * size).sum(dim=1), total)
    assert x.shape[1] == 33 - 15


def test_destinations_say_where_each_token_went() -> None:
    x = random(2, 18, 4)
    matching = match(x, 5, 3)
    assert matching is not None
    where = matching.destinations(18)
    sizes = matching.sums(torch.ones(2, 18, 1))[..., 0]
    counted = torch.zeros(2, 13).scatter_add(1, where, torch.ones(2, 18))
    torch.testing.assert_close(counted, sizes)
    summed = torch.zeros(2, 13, 4).scatter_add(1, where[..., None].expand(-1, -1, 4), x)
    torch.testing.assert_close(summed, matching.sums(x))


def test_schedule_of_the_paper() -> None:
    assert reductions(16, SHAPES["decreasing"], 12) == [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    assert reductions(16, SHAPES["increasing"], 12) == [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32]
    assert reductions(13, SHAPES["constant"], 12) == [13] * 12
    assert reductions(7, SHAPES["decreasing"], 1) == [7]


def test_half_of_the_unprotected_tokens_is_the_limit() -> None:
    assert token_counts(198, 2, [10_000]) == [100]
    matching = match(random(1, 198, 4), 10_000, 2)
    assert matching is not None
    assert matching.sums(random(1, 198, 4)).shape == (1, 100, 4)
    assert match(random(1, 3, 4), 8, 2) is None
    assert match(random(1, 9, 4), 0, 1) is None


def test_proportional_attention_is_the_explicit_form() -> None:
    attn = vit("qk_norm").blocks[0].attn
    x, size = random(2, 9, 32), torch.arange(1.0, 10.0)[None, :, None].expand(2, -1, -1)
    q, k, v = attn.qkv(x).reshape(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    weights = (q @ k.transpose(-1, -2) * 8**-0.5).exp() * size.transpose(1, 2)[:, None]
    want = attn.proj((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).reshape(2, 9, 32))
    out, metric = attend_sized(attn, x, Tokens(x, size=size))
    torch.testing.assert_close(out, want, atol=5e-7, rtol=1e-5)
    torch.testing.assert_close(metric, k.mean(dim=1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_merging_it_is_timm(variant: str) -> None:
    torch.testing.assert_close(merged(variant, r=0)(images()), vit(variant)(images()), rtol=0, atol=0)


def test_an_attention_without_a_map_attends_its_own_way() -> None:
    class Own(torch.nn.Module):
        def attend_sized(self, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
            return x * 2, x if size is None else x * size

    x, size = random(2, 9, 32), torch.full((2, 9, 1), 3.0)
    for tokens, keys in ((Tokens(x), x), (Tokens(x, size=size), 3 * x)):
        out, metric = attend_sized(Own(), x, tokens)
        assert torch.equal(out, 2 * x)
        assert torch.equal(metric, keys)


def test_without_merging_drop_path_is_timm_s() -> None:
    model, twin = vit(drop_path_rate=0.3).train(), vit(drop_path_rate=0.3).train()
    TECHNIQUE.apply(model, Config(r=0), surroundings(model))
    torch.manual_seed(5)
    want = twin(images())
    torch.manual_seed(5)
    torch.testing.assert_close(model(images()), want, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_equals_a_slow_one(variant: str) -> None:
    """The whole model, image by image, with explicit attention and the slow merge."""
    model = merged(variant, r=3, schedule="decreasing")
    dense = vit(variant)
    x = dense.norm_pre(dense._pos_embed(dense.patch_embed(images())))
    rows = []
    for image in x:
        t, size = image, torch.ones(len(image))
        for block, r in zip(dense.blocks, reductions(3, SHAPES["decreasing"], 3), strict=True):
            attn, n = block.attn, len(t)
            q, k, v = attn.qkv(block.norm1(t)).reshape(n, 3, 4, 8).permute(1, 2, 0, 3).unbind(0)
            q, k = attn.q_norm(q), attn.k_norm(k)
            w = (q @ k.transpose(-1, -2) * 8**-0.5).exp() * size
            t = t + block.ls1(attn.proj((w / w.sum(-1, keepdim=True) @ v).transpose(0, 1).reshape(n, 32)))
            t, size = slow_merge(t, size, k.mean(dim=0), r, dense.num_prefix_tokens)
            t = t + block.ls2(block.mlp(block.norm2(t)))
        t = dense.norm(t)
        if dense.global_pool == "avg":  # the size-weighted mean
            t = (t * size[:, None]).sum(dim=0, keepdim=True) / size.sum()
        rows.append(dense.forward_head(t[None]))
    torch.testing.assert_close(model(images()), torch.cat(rows), atol=2e-5, rtol=1e-4)


def test_unequal_heads_after_pruning() -> None:
    from workers.techniques.pruning.magnitude_prune import TECHNIQUE as PRUNE

    model = vit()
    PRUNE.apply(model, PRUNE.Config(head_ratio=0.5, mlp_ratio=0.25), surroundings(model))
    want = model(images())
    TECHNIQUE.apply(model, Config(r=0), surroundings(model))
    torch.testing.assert_close(model(images()), want, rtol=0, atol=0)


def test_macs_follow_the_counts() -> None:
    """16 patch tokens become 13, 10 and 7; cosines of one half with the other are the cost."""
    macs = 16 * 48 * 32 + 32 * 5  # patch embedding, head
    macs += sum(4 * n * 32 * 32 + 2 * n * n * 32 for n in (17, 14, 11)) + sum(2 * m * 32 * 64 for m in (14, 11, 8))
    macs += 8 * (8 * 8 + 7 * 6 + 5 * 5)
    assert count_macs(merged(r=3), (1, 3, 16, 16)) == macs < count_macs(vit(), (1, 3, 16, 16))


def test_training_reaches_every_parameter() -> None:
    model = merged("layerscale", r=4).train()
    model(images()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_state_lives_in_the_call_only() -> None:
    model = merged(r=4)
    first = model(images(2))
    model(images(7, seed=5))
    torch.testing.assert_close(model(images(2)), first, rtol=0, atol=0)
    torch.testing.assert_close(model(images(2))[:1], model(images(2)[:1]), atol=1e-5, rtol=1e-5)


def test_names_of_modules_and_weights_stay() -> None:
    model = merged(r=4)
    assert isinstance(model.blocks, MergingBlocks)
    assert list(model.state_dict()) == list(vit().state_dict())
    assert isinstance(model.blocks[1].attn.qkv, torch.nn.Linear)


def test_check_wants_something_to_merge() -> None:
    assert TECHNIQUE.check(info(), Config(r=16)) is None
    assert TECHNIQUE.check(info(), Config(r=1)) is None
    assert "merges none of 17 tokens" in str(TECHNIQUE.check(info(), Config(r=0)))
    assert "merges none of 2 tokens" in str(TECHNIQUE.check(info(num_tokens=2), Config(r=8)))


def test_refuses_what_it_would_not_reach() -> None:
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, pretrained=False, depth=1, block_fn=_parallel())
    with pytest.raises(ValueError, match="must be timm's Block"):
        TECHNIQUE.apply(other, Config(), surroundings(other))


def _parallel() -> type:
    from timm.models.vision_transformer import ParallelThingsBlock

    class OneAttention(ParallelThingsBlock):  # type: ignore[misc]
        """Has an ``attn`` of another type."""

        @property
        def attn(self) -> Any:
            return self.attns

    return OneAttention
