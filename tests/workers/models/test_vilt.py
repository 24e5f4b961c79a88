"""ViLT: padding, modalities, patch sampling, sizes, refusals. Against transformers' own: test_vilt_weights."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViltConfig

from tests.vision_language import CLASSES, batch, losses, macs, settings
from workers.models import ModelError, vilt

TASKS = list(CLASSES)


def tiny(task: str = "vqa", *, seed: int = 0, **more: Any) -> vilt.Vilt:
    torch.manual_seed(seed)
    model = vilt.create({"name": "vilt_tiny", "create": settings(task, **more)})
    with torch.no_grad():  # weights large enough that every token matters to the logits
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def masked(task: str = "vqa") -> dict[str, Tensor]:
    """Three examples with texts of 6, 4 and 5 tokens and images of 4 x 4, 2 x 4 and 3 x 2 patches."""
    examples = batch(task)
    pixels = examples["pixel_values"]
    mask = torch.zeros(*pixels.shape[:-3], 32, 32, dtype=torch.int64)
    for i, (height, width) in enumerate(((32, 32), (16, 32), (24, 16))):
        mask[i, ..., :height, :width] = 1
    lengths = torch.tensor([6, 4, 5])
    return {**examples, "pixel_mask": mask, "attention_mask": (torch.arange(6) < lengths[:, None]).long()}


# --- padding and modalities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_padding_changes_no_result(task: str) -> None:
    model, examples = tiny(task), masked(task)
    logits = model(examples)
    other = {key: value.clone() for key, value in examples.items()}
    other["input_ids"][~other["attention_mask"].bool()] = 7
    hidden = ~other["pixel_mask"].bool().unsqueeze(-3).expand_as(other["pixel_values"])
    other["pixel_values"][hidden] = 50.0
    torch.testing.assert_close(model(other), logits, atol=1e-5, rtol=1e-5)
    sizes, lengths = ((32, 32), (16, 32), (24, 16)), (6, 4, 5)
    for i, ((height, width), length) in enumerate(zip(sizes, lengths, strict=True)):
        alone = {
            "pixel_values": examples["pixel_values"][i : i + 1, ..., :height, :width],
            "input_ids": examples["input_ids"][i : i + 1, :length],
        }
        torch.testing.assert_close(model(alone)[0], logits[i], atol=1e-5, rtol=1e-5)


def test_tokens_are_text_then_image_with_both_class_tokens_protected() -> None:
    model, examples = tiny(), masked()
    tokens = model.tokens(examples)
    text, image = tokens.split()
    assert (text.shape, image.shape, tokens.protected) == ((3, 6, 64), (3, 17, 64), (0, 6))
    text_mask, image_mask = tokens.split_mask()
    assert text_mask is not None
    assert image_mask is not None
    assert text_mask.sum(1).tolist() == [6, 4, 5]
    assert image_mask.sum(1).tolist() == [17, 9, 7]
    assert image_mask[:, 0].all()
    changed = model.tokens({**examples, "pixel_values": examples["pixel_values"] + 1}).split()
    assert torch.equal(changed[0], text)
    assert not torch.equal(changed[1], image)
    assert model.tokens(batch()).mask is None
    assert model.tokens(batch()).split_mask() == (None, None)


def test_a_layer_is_its_two_steps_and_takes_both_kinds_of_mask() -> None:
    model = tiny()
    layer = model.joint_layers[1]
    assert isinstance(layer, vilt.JointLayer)
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[:, 7:] = False
    assert torch.equal(layer(hidden), layer.transform(layer.attend(hidden)))
    torch.testing.assert_close(layer(hidden, valid)[:, :7], layer(hidden[:, :7]))
    sizes = torch.ones(2, 9)
    sizes[:, 8] = 3.0  # a key of size s acts as s duplicates
    doubled = torch.cat([hidden, hidden[:, 8:], hidden[:, 8:]], dim=1)
    torch.testing.assert_close(layer(hidden, sizes.log()), layer(doubled)[:, :9], atol=1e-5, rtol=1e-5)
    tokens = vilt.JointTokens(hidden, valid, num_text=4)
    assert torch.equal(layer.advance(tokens).hidden, layer(hidden, valid))


def test_two_images_are_two_passes_left_first() -> None:
    model, examples = tiny("nlvr2"), batch("nlvr2")
    logits = model(examples)
    swapped = {**examples, "pixel_values": examples["pixel_values"].flip(1)}
    assert (model(swapped) - logits).abs().max() > 1e-3
    pooled = []
    for image in (0, 1):
        one = {**examples, "pixel_values": examples["pixel_values"][:, image]}
        tokens = model.embeddings(one, 1 + image)
        pooled.append(model.pooler(model.encode(tokens).hidden))
    torch.testing.assert_close(logits, model.head(torch.cat(pooled, dim=1)))
    logits.sum().backward()
    gradient = model.embeddings.token_type_embeddings.weight.grad
    assert gradient is not None
    assert (gradient.abs().sum(1) > 0).all()  # text, first and second image each have their row


# --- patch sampling ---------------------------------------------------------------------------------------------------


def test_chosen_patches() -> None:
    def choose(limit: int | None, seed: int = 0, shuffle: bool = False) -> list[int]:
        found: list[int] = vilt.chosen_patches(3, 4, limit=limit, seed=seed, shuffle=shuffle).tolist()
        return found

    assert choose(None) == choose(12) == choose(99) == list(range(12))
    some = choose(5)
    assert len(set(some)) == 5
    assert some == sorted(some) == choose(5)
    assert len({tuple(choose(5, seed)) for seed in range(20)}) > 10
    shuffled = choose(None, shuffle=True)
    assert sorted(shuffled) == list(range(12)) != shuffled
    counts = torch.zeros(12)
    for seed in range(1200):
        counts[choose(3, seed)] += 1
    assert counts.min() > 220  # 300 each, standard deviation 15
    assert counts.max() < 380


def test_a_seed_repeats_the_sample_and_an_image_has_the_same_one_in_any_batch() -> None:
    model, examples = tiny(max_image_length=5, patch_seed=3), masked()
    logits = model(examples)
    assert model.tokens(examples).split()[1].shape == (3, 6, 64)
    torch.rand(7)  # the global generator has no part in it
    assert torch.equal(model(examples), logits)
    for i in range(3):
        alone = {key: value[i : i + 1] for key, value in examples.items()}
        torch.testing.assert_close(model(alone)[0], logits[i], atol=1e-5, rtol=1e-5)
    model.embeddings.patch_seed = 4
    assert not torch.allclose(model(examples), logits, atol=1e-4)


def test_order_of_patches_changes_tokens_and_no_logits() -> None:
    model, examples = tiny(), batch()
    tokens, logits = model.tokens(examples), model(examples)
    model.embeddings.shuffle_patches = True
    shuffled = model.tokens(examples)
    assert not torch.allclose(shuffled.hidden, tokens.hidden)
    order = vilt.chosen_patches(4, 4, limit=None, seed=0, shuffle=True)
    torch.testing.assert_close(shuffled.split()[1][:, 1:], tokens.split()[1][:, 1:][:, order])
    torch.testing.assert_close(model(examples), logits, atol=1e-5, rtol=1e-5)


# --- training, sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_training_lowers_the_loss(task: str) -> None:
    torch.manual_seed(0)
    found = losses(vilt.create({"name": "vilt_tiny", "create": settings(task)}), task)
    assert found[-1] < 0.9 * found[0]


def test_full_size_counts() -> None:
    model = vilt.create({"name": "vilt_b32", "create": {"task": "retrieval"}}, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 111_595_777
    ids = torch.zeros(1, 32, dtype=torch.int64, device="meta")
    examples = {"pixel_values": torch.zeros(1, 3, 384, 384, device="meta"), "input_ids": ids}
    n, c, patches = 32 + 145, 768, 144
    layers = 12 * (12 * c * c * n + 2 * n * n * c)
    counted = macs(model, examples)
    assert counted == layers + patches * 3 * 32 * 32 * c + c * c + c  # projection, pooler, score
    assert round(counted / 1e9, 2) == 15.95
    pair = vilt.create({"name": "vilt_b32", "create": {"task": "nlvr2"}}, device="meta")
    both = {**examples, "pixel_values": torch.zeros(1, 2, 3, 384, 384, device="meta")}
    assert round(macs(pair, both) / 1e9, 1) == 31.9


# --- descriptions, weights, refusals ----------------------------------------------------------------------------------


def test_a_description_is_complete_and_plain() -> None:
    described = vilt.describe({"name": "vilt_tiny", "create": {"task": "nlvr2", "depth": 3}})
    assert json.loads(json.dumps(described)) == described == vilt.describe(described)
    assert (described["create"]["depth"], described["create"]["num_classes"]) == (3, 2)
    first, second = tiny(seed=5).state_dict(), tiny(seed=5).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    empty = vilt.create({"name": "vilt_tiny", "create": settings("vqa")}, device="meta")
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in first.items()}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "vilt_b23", "create": {"task": "nlvr2"}}, "nearest: vilt_b32"),
        (
            {"create": {"task": "nlvr2", "embed_dims": 3, "dept": 2}},
            "embed_dims is no .*nearest: embed_dim; .*nearest: depth",
        ),
        ({"create": {"task": "vqa"}}, "needs the size of its answer vocabulary"),
        ({"create": {"task": "entailment", "num_classes": 4}}, "must be 3 for entailment"),
        ({"create": {"task": "captioning"}}, "must be one of vqa"),
        ({"create": {"task": "nlvr2", "num_heads": 7}}, "embed_dim must be a multiple of num_heads 7, got 768"),
        ({"create": {"task": "nlvr2", "max_image_length": 0}}, "at least 1"),
    ],
)
def test_what_makes_no_model_is_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        vilt.create(model, device="meta")


def test_what_makes_no_batch_is_refused() -> None:
    model, examples = tiny(), masked()
    empty = examples["pixel_mask"].clone()
    empty[1] = 0
    cases = {
        "pixel_values is missing": {"input_ids": examples["input_ids"]},
        r"must be \(B, 3, H, W\)": batch("nlvr2"),
        "multiples of 8": {**batch(), "pixel_values": torch.zeros(3, 3, 30, 32)},
        "1 to 20 tokens, got 21; truncate": batch(length=21),
        "with B 3": {**batch(), "input_ids": batch(count=2)["input_ids"]},
        "attention_mask must have shape": {**batch(), "attention_mask": torch.ones(3, 5)},
        "example 1: pixel_mask": {**examples, "pixel_mask": empty},
    }
    for message, bad in cases.items():
        with pytest.raises(ValueError, match=message):
            model(bad)


def test_reduced_tokens_go_through_the_rest_of_the_model() -> None:
    """What a reducing layer will do: fewer tokens, a new mask and a new number of text tokens."""

    class Halved(vilt.JointLayer):
        def advance(self, tokens: vilt.JointTokens) -> vilt.JointTokens:
            hidden = self.attend(tokens.hidden, tokens.mask)
            text, image = hidden[:, : tokens.num_text], hidden[:, tokens.num_text :]
            text, image = text[:, :3], image[:, :9]
            return replace(tokens, hidden=self.transform(torch.cat([text, image], dim=1)), mask=None, num_text=3)

    model = tiny()
    config = ViltConfig(hidden_size=64, num_attention_heads=4, intermediate_size=128)
    reducing = Halved(config, model.shape)
    reducing.load_state_dict(model.layers[1].state_dict())
    model.layers[1] = reducing.eval()
    found = model.encode(model.tokens(batch()))
    assert (found.hidden.shape, found.num_text, found.protected) == ((3, 12, 64), 3, (0, 3))
    assert model(batch()).shape == (3, 5)


def test_several_texts_of_an_image_are_scored_as_pairs() -> None:
    torch.manual_seed(0)
    model = vilt.create(vilt.describe({"name": "vilt_tiny", "create": {"task": "retrieval"}})).eval()
    pairs = batch("retrieval", 6)
    pixels = pairs["pixel_values"][:2]
    several = {"pixel_values": pixels, "input_ids": pairs["input_ids"].view(2, 3, -1)}
    with torch.inference_mode():
        scored = model(several)
        expected = model({**pairs, "pixel_values": pixels.repeat_interleave(3, dim=0)})
    assert scored.shape == (2, 3)
    assert torch.equal(scored.flatten(), expected[:, 0])
