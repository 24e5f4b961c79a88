"""PiToMe: energies in closed form, the matching against a slow reference, protected tokens, and what merging conserves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.techniques.models import VARIANTS, images, info, surroundings, vit
from workers.measuring.counting import count_macs
from workers.techniques.tokens.pitome import TECHNIQUE, Config, energies, margin, match, merged_counts
from workers.techniques.tokens.shared_merging import MergingBlocks, merge


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def merged(variant: str = "class", **config: Any) -> Any:
    model = vit(variant)
    return TECHNIQUE.apply(model, Config(**config), surroundings(model)).model


def slow_merge(x: Tensor, size: Tensor, keys: Tensor, r: int, margin: float, prefix: int) -> tuple[Tensor, Tensor]:
    """One image, token by token: x (N, C), size (N,), keys (N, D)."""
    patches = range(prefix, len(x))
    energy = {}
    for i in patches:
        differences = [F.cosine_similarity(keys[i], keys[j], dim=0).item() - margin for j in patches]
        energy[i] = sum(d if d > 0 else math.exp(d) - 1 for d in differences) / len(patches)
    order = sorted(patches, key=lambda i: -energy[i])
    gone, takers = order[: 2 * r : 2], order[1 : 2 * r : 2]
    total, weight = x * size[:, None], size.clone()
    for i in gone:
        partner = max(takers, key=lambda j: F.cosine_similarity(keys[i], keys[j], dim=0).item())
        total[partner] += total[i]
        weight[partner] += size[i]
    left = [*range(prefix), *sorted(order[2 * r :]), *takers]
    return (total / weight[:, None])[left], weight[left]


def test_energy_by_hand() -> None:
    cosines = torch.tensor([[[1.0, 0.9, 0.0], [0.9, 1.0, -1.0], [0.0, -1.0, 1.0]]])
    want = [
        (0.5 + 0.4 + math.expm1(-0.5)) / 3,
        (0.4 + 0.5 + math.expm1(-1.5)) / 3,
        (math.expm1(-0.5) + math.expm1(-1.5) + 0.5) / 3,
    ]
    torch.testing.assert_close(energies(cosines, 0.5), torch.tensor([want]))


def test_margin_falls_linearly_over_the_depth() -> None:
    assert [margin(i, 12) for i in (0, 4, 6, 11)] == pytest.approx([0.75, 0.5, 0.375, 0.0625])


def test_counts_by_hand() -> None:
    assert merged_counts(196, 0.9, 4) == [19, 17, 16, 14]  # 196, 177, 160, 144, 130
    assert merged_counts(10, 0.5, 3) == [5, 2, 1]
    assert merged_counts(16, 1.0, 3) == [0, 0, 0]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("r", [1, 3])
def test_merge_equals_the_slow_reference(prefix: int, r: int) -> None:
    x, keys = random(3, 14, 6), random(3, 14, 4, seed=1)
    size = torch.randint(1, 5, (3, 14, 1), generator=torch.Generator().manual_seed(2)).float()
    matching = match(keys, r, 0.4, prefix)
    assert matching is not None
    out, out_size = merge(x, size, matching)
    for i in range(3):
        want, want_size = slow_merge(x[i], size[i, :, 0], keys[i], r, 0.4, prefix)
        torch.testing.assert_close(out[i], want)
        torch.testing.assert_close(out_size[i, :, 0], want_size)


def test_tokens_that_are_alone_are_protected() -> None:
    """Six tokens around one direction, three alone, and the class token among the six' likes."""
    crowd, alone = torch.eye(8)[0] + 0.05 * random(7, 8), torch.eye(8)[2:5]
    keys = torch.cat([crowd[:1], alone[:1], crowd[1:4], alone[1:2], crowd[4:], alone[2:]])[None]
    matching = match(keys, 3, 0.5, 1)
    assert matching is not None
    assert set(matching.merged[0].tolist()) < {2, 3, 4, 6, 7, 8}
    assert matching.rest[0, :4].tolist() == [0, 1, 5, 9]
    sizes = matching.sums(torch.ones(1, 10, 1))[0, :, 0]
    assert sizes[:4].tolist() == [1, 1, 1, 1]
    assert sizes.sum() == 10


def test_sizes_and_weighted_sums_are_conserved() -> None:
    x, size = random(2, 33, 8), torch.ones(2, 33, 1)
    total = x.sum(dim=1)
    for i, r in enumerate(merged_counts(32, 0.7, 3)):
        matching = match(x, r, margin(i, 3), 1)
        assert matching is not None
        x, size = merge(x, size, matching)
        torch.testing.assert_close(size.sum(dim=1), torch.full((2, 1), 33.0))
        torch.testing.assert_close((x * size).sum(dim=1), total)
    assert x.shape[1] == 1 + 12  # 32, 23, 17, 12


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_equals_a_slow_one(variant: str) -> None:
    """The whole model, image by image, with explicit attention and the slow merge."""
    model = merged(variant, keep=0.75)
    dense = vit(variant)
    x = dense.norm_pre(dense._pos_embed(dense.patch_embed(images())))
    rows = []
    for image in x:
        t, size = image, torch.ones(len(image))
        for block, r, m in zip(dense.blocks, [4, 3, 2], [0.75, 0.5, 0.25], strict=True):
            attn, n = block.attn, len(t)
            q, k, v = attn.qkv(block.norm1(t)).reshape(n, 3, 4, 8).permute(1, 2, 0, 3).unbind(0)
            q, k = attn.q_norm(q), attn.k_norm(k)
            w = (q @ k.transpose(-1, -2) * 8**-0.5).exp() * size
            t = t + block.ls1(attn.proj((w / w.sum(-1, keepdim=True) @ v).transpose(0, 1).reshape(n, 32)))
            t, size = slow_merge(t, size, k.mean(dim=0), r, m, dense.num_prefix_tokens)
            t = t + block.ls2(block.mlp(block.norm2(t)))
        t = dense.norm(t)
        if dense.global_pool == "avg":  # the size-weighted mean
            t = (t * size[:, None]).sum(dim=0, keepdim=True) / size.sum()
        rows.append(dense.forward_head(t[None]))
    torch.testing.assert_close(model(images()), torch.cat(rows), atol=2e-5, rtol=1e-4)


def test_macs_follow_the_counts() -> None:
    """16 patch tokens become 12, 9 and 7; cosines of all patch tokens, and of the merged with their takers, are the cost."""
    macs = 16 * 48 * 32 + 32 * 5  # patch embedding, head
    macs += sum(4 * n * 32 * 32 + 2 * n * n * 32 for n in (17, 13, 10)) + sum(2 * m * 32 * 64 for m in (13, 10, 8))
    macs += 8 * (16**2 + 12**2 + 9**2 + 4**2 + 3**2 + 2**2)
    assert count_macs(merged(keep=0.75), (1, 3, 16, 16)) == macs < count_macs(vit(), (1, 3, 16, 16))


def test_training_reaches_every_parameter() -> None:
    model = merged("layerscale").train()
    model(images()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_names_of_weights_stay() -> None:
    model = merged()
    assert isinstance(model.blocks, MergingBlocks)
    assert list(model.state_dict()) == list(vit().state_dict())


def test_check_wants_something_to_merge() -> None:
    assert TECHNIQUE.check(info(), Config()) is None
    assert "keep=1 merges none of 16 patch tokens" in str(TECHNIQUE.check(info(), Config(keep=1.0)))
    assert "merges none of 1 patch tokens" in str(TECHNIQUE.check(info(num_tokens=2), Config(keep=0.5)))
