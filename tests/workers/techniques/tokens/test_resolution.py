"""Smaller input: whole patches, position embeddings as timm resamples them, and a model that is timm's own smaller one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from tests.workers.techniques.models import VARIANTS, images, info, surroundings, vit
from workers.measuring.counting import count_macs
from workers.models import model_info
from workers.techniques.tokens.resolution import TECHNIQUE, Config, resize, smaller


def applied(variant: str = "class", ratio: float = 0.75, **changes: Any) -> Any:
    model = vit(variant, **changes)
    return TECHNIQUE.apply(model, Config(ratio=ratio), surroundings(model)).model


def test_sides_are_whole_patches() -> None:
    sides = [smaller(224, 16, ratio) for ratio in (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)]
    assert [side // 16 for side in sides] == [4, 5, 7, 9, 10, 12, 14]
    assert smaller(384, 16, 0.5) == 192
    assert smaller(32, 4, 0.625) == 20


def test_resizing_by_hand() -> None:
    """Antialiased halving of a line: a triangle over four pixels, weights 1 3 3 1, cut and normalised at the ends."""
    line = torch.tensor([0.0, 8, 16, 0, 8, 0, 0, 24])
    small = resize(line.expand(1, 1, 8, 8), (4, 4))
    want = torch.tensor(
        [(3 * 0 + 3 * 8 + 16) / 7, (8 + 3 * 16 + 0 + 8) / 8, (0 + 3 * 8 + 0 + 0) / 8, (0 + 0 + 3 * 24) / 7]
    )
    torch.testing.assert_close(small[0, 0], want.expand(4, 4))
    assert resize(line.expand(1, 1, 8, 8).bfloat16(), (4, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("variant", [*VARIANTS, "no_embed_class", "bare"])
def test_it_is_the_model_of_the_smaller_size_on_smaller_images(variant: str) -> None:
    changes: dict[str, Any] = {"no_embed_class": {"no_embed_class": True}, "bare": {"pos_embed": ""}}.get(variant, {})
    kind = variant if variant in VARIANTS else "class"
    model, full, twin = applied(kind, **changes), vit(kind, **changes), vit(kind, img_size=12, **changes)
    weights = dict(full.state_dict())
    if full.pos_embed is not None:
        prefix = 0 if changes else full.num_prefix_tokens
        weights["pos_embed"] = resample_abs_pos_embed(full.pos_embed, (3, 3), num_prefix_tokens=prefix)
        assert torch.equal(model.pos_embed[:, :prefix], full.pos_embed[:, :prefix])
        assert model.pos_embed.shape[1] == 9 + prefix
    twin.load_state_dict(weights)
    small = F.interpolate(images(), size=(12, 12), mode="bilinear", antialias=True)
    torch.testing.assert_close(model(images()), twin(small), rtol=0, atol=0)


def test_an_image_that_is_not_square_keeps_its_shape() -> None:
    model = applied(ratio=0.5, img_size=(16, 24))
    assert model.patch_embed.img_size == (8, 12)
    assert model(torch.randn(2, 3, 16, 24)).shape == (2, 5)


def test_macs_fall_with_the_patches() -> None:
    full, small = (count_macs(m, (1, 3, 16, 16)) for m in (vit(), applied(ratio=0.5)))
    blocks = {n: 3 * (n * (4 * 32 * 32 + 2 * 32 * 64) + 2 * n * n * 32) for n in (17, 5)}
    assert full == 16 * 48 * 32 + blocks[17] + 32 * 5
    assert small == 4 * 48 * 32 + blocks[5] + 32 * 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_facts_afterwards(variant: str) -> None:
    told = TECHNIQUE.info_after(model_info(vit(variant)), Config(ratio=0.5))
    assert told == model_info(applied(variant, ratio=0.5))
    assert (told.image_size, told.num_tokens - told.num_prefix_tokens) == (8, 4)


def test_position_embeddings_train() -> None:
    model = applied().train()
    assert model.pos_embed.is_leaf
    model(images()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


def test_check_wants_whole_patches_and_fewer_of_them() -> None:
    assert TECHNIQUE.check(info(), Config(ratio=0.5)) is None
    one = info(image_size=16, patch_size=16, num_tokens=2)
    assert "leaves no whole patch of 16" in str(TECHNIQUE.check(one, Config(ratio=0.25)))
    assert "as many patches of 4 as before" in str(TECHNIQUE.check(info(), Config(ratio=1.0)))
    assert "as many patches of 16 as before" in str(TECHNIQUE.check(one, Config(ratio=0.75)))
