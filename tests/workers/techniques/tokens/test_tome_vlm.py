"""ToMe in ViLT and METER: merged duplicates compute what they did apart, the image encoder against transformers' layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vision_language import batch, macs
from tests.workers.techniques.vlm import FAMILIES, apply, padded, vlm
from workers.models import meter, model_info, vilt
from workers.techniques.tokens.shared_merging import merge
from workers.techniques.tokens.tome import TECHNIQUE, Config, match
from workers.techniques.tokens.tome_joint import MergingEncoder

every_family = pytest.mark.parametrize("family", FAMILIES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(model: Any, text: Tensor, image: Tensor, text_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The text and image tokens after all layers."""
    if model.family == "vilt":
        whole = torch.cat([text, image], dim=1)
        mask = text_mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1)
        found = model.encode(vilt.JointTokens(whole, mask, text.shape[1])).split()
        return found[0], found[1]
    tokens = model.encode(meter.CrossTokens(text, image, text_mask))
    return tokens.text, tokens.image


@every_family
@pytest.mark.parametrize("masked", [False, True])
def test_merged_duplicates_compute_what_they_did_apart(family: str, masked: bool) -> None:
    """Tokens 1 and 2, 3 and 4, ... are equal; the first layer merges each pair, and the layers after it count it twice."""
    model = vlm(family)
    first = random(2, 1, 64, seed=1)
    pairs = random(2, 8, 64, seed=2)
    image = torch.cat([first, pairs.repeat_interleave(2, dim=1)], dim=1)
    text = random(2, 6, 64)
    mask = torch.arange(6) < torch.tensor([[4], [6]]) if masked else None
    expected_text, expected_image = run(model, text, image, mask)
    for proportional in (True, False):
        merging = apply(TECHNIQUE, copy.deepcopy(model), r=1, proportional_attention=proportional).model
        for i, layer in enumerate(merging.layers):
            layer.reducer.r = 8 if i == 0 else 0
        found_text, found_image = run(merging, text, image, mask)
        assert found_image.shape == (2, 9, 64)
        valid = slice(0, 4 if masked else 6)
        same = torch.allclose(found_text[:, valid], expected_text[:, valid], atol=1e-4, rtol=1e-4)
        same = same and torch.allclose(found_image, expected_image[:, [0, *range(1, 17, 2)]], atol=1e-4, rtol=1e-4)
        assert same is proportional


@every_family
def test_only_image_tokens_are_merged_and_sizes_are_carried(family: str) -> None:
    model = apply(TECHNIQUE, vlm(family), r=3, schedule="decreasing").model
    seen: list[tuple[int, int, float]] = []
    for layer in model.layers:
        original = layer.reducer.reduce

        def spy(text: Any, image: Any, what: Any, carried: Any, original: Any = original) -> Any:
            found = original(text, image, what, carried)
            size, _ = found.carried
            assert found.text is None
            seen.append((text.x.shape[1], size.shape[1], size.sum(dim=1).unique().item()))
            return found

        layer.reducer.reduce = spy
    model(padded())
    assert seen == [(8, 11, 17.0), (8, 7, 17.0), (8, 5, 17.0), (8, 5, 17.0)]  # r is 6, 4, 2, 0


def test_padded_patches_have_no_part() -> None:
    examples = padded()
    mask = torch.ones(3, 32, 32, dtype=torch.int64)
    mask[1, 24:], mask[2, 8:] = 0, 0
    other = examples["pixel_values"].clone()
    other[~mask.bool()[:, None].expand_as(other)] = 5.0
    for proportional in (True, False):
        model = apply(TECHNIQUE, vlm("vilt"), r=3, proportional_attention=proportional).model
        found = [model({**examples, "pixel_values": p, "pixel_mask": mask}) for p in (examples["pixel_values"], other)]
        torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("proportional", [True, False])
def test_the_image_encoder_is_transformers_with_merging(proportional: bool) -> None:
    model = vlm("meter")
    encoder, pixels = model.image_encoder, batch("entailment")["pixel_values"]
    whole = MergingEncoder(copy.deepcopy(encoder), [0, 0], proportional)
    torch.testing.assert_close(whole(pixels, None), encoder(pixels, None), atol=1e-6, rtol=1e-6)
    merging = MergingEncoder(copy.deepcopy(encoder), [4, 3], proportional)
    hidden = encoder.norm_before(encoder.embeddings(pixels))
    size = torch.ones(3, 17, 1)
    for layer, r in zip(encoder.layers, (4, 3), strict=True):
        normed = layer.layer_norm1(hidden)
        bias = size.log().transpose(1, 2)[:, None].expand(-1, 1, hidden.shape[1], -1) if proportional else None
        hidden = hidden + layer.self_attn(normed, bias)[0]
        matching = match(layer.self_attn.k_proj(normed).unflatten(-1, (4, 16)).mean(dim=2), r, prefix=1)
        assert matching is not None
        hidden, size = merge(hidden, size, matching)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    found = merging(pixels, None)
    torch.testing.assert_close(found, encoder.norm_after(hidden), atol=1e-5, rtol=1e-5)
    assert found.shape[1] == merging.tokens_left == 10
    with pytest.raises(ValueError, match="without pixel_mask"):
        merging(pixels, torch.ones(3, 17, dtype=torch.bool))


def test_the_tower_leaves_fewer_tokens_to_the_fusion() -> None:
    model = vlm("meter")
    examples, before = batch("entailment", 1), model_info(model)
    config = Config(r=3, where="image_tower")
    whole = macs(model, examples)
    merged = apply(TECHNIQUE, model, r=3, where="image_tower").model
    assert model_info(merged).num_tokens == before.num_tokens - 6 == TECHNIQUE.info_after(before, config).num_tokens
    assert macs(merged, examples) < 0.85 * whole
    assert "has none" in str(TECHNIQUE.check(model_info(vlm("vilt")), config))
    with pytest.raises(ValueError, match="vilt has none"):
        TECHNIQUE.apply(vlm("vilt"), config, None)  # type: ignore[arg-type]
    assert "merges none of 17 tokens" in str(TECHNIQUE.check(before, Config(r=0)))
