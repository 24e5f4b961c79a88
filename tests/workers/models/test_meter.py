"""METER: padding, streams, training, sizes, descriptions."""

from __future__ import annotations

import json

import pytest
import torch

from tests.meter_models import TASKS, loud, masked, tiny
from tests.vision_language import batch, losses, macs, settings
from workers.models import ModelError, meter

# --- padding and streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_padding_changes_no_result(task: str) -> None:
    model, examples = loud(task), masked(task)
    logits = model(examples)
    other = {key: value.clone() for key, value in examples.items()}
    other["input_ids"][~other["attention_mask"].bool()] = 7
    torch.testing.assert_close(model(other), logits, atol=1e-5, rtol=1e-5)
    for i, length in enumerate((6, 4, 5)):
        alone = {
            "pixel_values": examples["pixel_values"][i : i + 1],
            "input_ids": examples["input_ids"][i : i + 1, :length],
        }
        torch.testing.assert_close(model(alone)[0], logits[i], atol=1e-5, rtol=1e-5)


def test_patches_without_pixels_have_no_part() -> None:
    model, examples = loud(), batch()
    mask = torch.ones(3, 32, 32, dtype=torch.int64)
    assert torch.allclose(model({**examples, "pixel_mask": mask}), model(examples), atol=1e-5)
    mask[1, 16:] = 0
    logits = model({**examples, "pixel_mask": mask})
    changed = examples["pixel_values"].clone()
    changed[1, :, 16:] = 40.0
    torch.testing.assert_close(model({**examples, "pixel_values": changed, "pixel_mask": mask}), logits)
    assert (logits - model(examples))[1].abs().max() > 1e-3
    features, valid = model.encode_image({**examples, "pixel_mask": mask})
    assert valid is not None
    assert (features.shape, valid.sum(1).tolist()) == ((3, 17, 64), [17, 9, 17])


def test_streams_are_encoded_apart_and_reused() -> None:
    """What makes scoring every text with every image affordable: one encoding of each, then fusion of the pairs."""
    model, examples = loud("retrieval"), masked("retrieval")
    text, text_mask = model.encode_text(examples)
    image, image_mask = model.encode_image(examples)
    assert text_mask is not None
    assert image_mask is None
    scores = torch.stack(
        [
            model.head(model.pool(model.encode(meter.CrossTokens(text, image[i : i + 1].expand_as(image), text_mask))))
            for i in range(3)
        ],
        dim=1,
    )[..., 0]
    torch.testing.assert_close(scores.diagonal(), model(examples)[:, 0], atol=1e-5, rtol=1e-5)
    assert scores.std() > 1e-2


def test_a_fusion_layer_is_both_streams_steps() -> None:
    model, examples = loud(), masked()
    text, text_mask = model.encode_text(examples)
    image, _ = model.encode_image(examples)
    tokens = meter.CrossTokens(text, image, text_mask)
    layer = model.cross_layers[1]
    assert isinstance(layer, meter.FusionLayer)
    found = layer(tokens)
    attended = layer.image.attend(image, None, text, text_mask)
    assert torch.equal(found.image, layer.image.transform(attended))
    assert torch.equal(found.text, layer.text(text, text_mask, image, None))
    assert found.text_mask is text_mask
    assert model.protected == (0, 0)
    fewer = model.encode(
        meter.CrossTokens(text[:, :3], image[:, :5], text_mask[:, :3] if text_mask is not None else None)
    )
    assert (fewer.text.shape, fewer.image.shape) == ((3, 3, 64), (3, 5, 64))


def test_two_images_are_two_fusions_left_first() -> None:
    model, examples = loud("nlvr2"), batch("nlvr2")
    logits = model(examples)
    swapped = {**examples, "pixel_values": examples["pixel_values"].flip(1)}
    assert (model(swapped) - logits).abs().max() > 1e-2
    logits.sum().backward()
    gradient = model.token_type_embeddings.weight.grad
    assert gradient is not None
    assert (gradient.abs().sum(1) > 0).all()


# --- training, sizes, descriptions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_training_lowers_the_loss(task: str) -> None:
    found = losses(tiny(task), task)
    assert found[-1] < 0.9 * found[0]


def test_full_size_counts() -> None:
    model = meter.create({"name": "meter_b16", "create": {"task": "retrieval"}}, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 318_845_185
    ids = torch.zeros(1, 32, dtype=torch.int64, device="meta")
    examples = {"pixel_values": torch.zeros(1, 3, 384, 384, device="meta"), "input_ids": ids}
    c, n, i = 768, 32, 577

    def layer(length: int) -> int:
        return 12 * c * c * length + 2 * length * length * c

    def crossed(length: int, other: int) -> int:
        return layer(length) + 2 * c * c * (length + other) + 2 * length * other * c

    towers = 12 * layer(n) + 11 * layer(i) + 576 * 3 * 16 * 16 * c + c * c * (n + i)
    fusion = 6 * (crossed(n, i) + crossed(i, n)) + 2 * c * c + 2 * c  # poolers, score
    assert macs(model, examples) == towers + fusion
    assert round((towers + fusion) / 1e9, 2) == 91.89


def test_a_description_is_complete_and_plain() -> None:
    described = meter.describe({"name": "meter_tiny", "create": {"task": "nlvr2", "cross_depth": 2}})
    assert json.loads(json.dumps(described)) == described == meter.describe(described)
    assert (described["create"]["cross_depth"], described["create"]["num_classes"]) == (2, 2)
    first, second = tiny(seed=5).state_dict(), tiny(seed=5).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    empty = meter.create({"name": "meter_tiny", "create": settings("vqa")}, device="meta")
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in first.items()}
    with pytest.raises(ModelError, match="image_dim must be a multiple of image_heads 7, got 768"):
        meter.create({"create": {"task": "nlvr2", "image_heads": 7}}, device="meta")


def test_what_makes_no_batch_is_refused() -> None:
    model = tiny()
    cases = {
        "input_ids is missing": {"pixel_values": batch()["pixel_values"]},
        "32 pixels a side, got": batch(side=40),
        "1 to 20 tokens, got 21; truncate": batch(length=21),
    }
    for message, bad in cases.items():
        with pytest.raises(ValueError, match=message):
            model(bad)


def test_several_texts_of_an_image_are_scored_as_pairs() -> None:
    torch.manual_seed(0)
    model = meter.create(meter.describe({"name": "meter_tiny", "create": {"task": "retrieval"}})).eval()
    pairs = batch("retrieval", 6)
    pairs["attention_mask"] = torch.arange(6)[None] < torch.tensor([6, 5, 4, 6, 3, 2])[:, None]
    pixels = pairs["pixel_values"][:2]
    several = {name: value.view(2, 3, -1) for name, value in pairs.items() if name != "pixel_values"}
    with torch.inference_mode():
        scored = model({"pixel_values": pixels, **several})
        expected = model({**pairs, "pixel_values": pixels.repeat_interleave(3, dim=0)})
    assert torch.allclose(scored.flatten(), expected[:, 0], atol=1e-6)
