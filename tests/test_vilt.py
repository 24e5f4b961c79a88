"""ViLT: against transformers' own, padding, modalities, patch sampling, sizes, weights from files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ViltConfig
from transformers.models.vilt import modeling_vilt

from tests.vision_language import CLASSES, batch, losses, macs, settings
from workers.models import ModelError, build, load_checkpoint_, vilt
from workers.models import vision_language as vl
from workers.models.vilt_release import fetch, from_release_state_dict
from workers.tasks import TaskInfo, TextInfo

TASKS = list(CLASSES)


def tiny(task: str = "vqa", *, seed: int = 0, **more: Any) -> vilt.Vilt:
    torch.manual_seed(seed)
    model = vilt.create({"name": "vilt_tiny", "create": settings(task, **more)})
    with torch.no_grad():  # weights large enough that every token matters to the logits
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def library(task: str) -> Any:
    """Transformers' model of the same shape as the tiny one, its weights all random."""
    config = ViltConfig(
        **{"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128},
        **{"image_size": 32, "patch_size": 8, "vocab_size": 256, "max_position_embeddings": 20},
        **{"modality_type_vocab_size": 3 if task == "nlvr2" else 2, "num_images": 2, "num_labels": CLASSES[task]},
    )
    kinds = {
        "vqa": "ViltForQuestionAnswering",
        "nlvr2": "ViltForImagesAndTextClassification",
        "retrieval": "ViltForImageAndTextRetrieval",
    }
    torch.manual_seed(1)
    theirs = getattr(modeling_vilt, kinds[task])(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return theirs


def masked(task: str = "vqa") -> dict[str, Tensor]:
    """Three examples with texts of 6, 4 and 5 tokens and images of 4 x 4, 2 x 4 and 3 x 2 patches."""
    examples = batch(task)
    pixels = examples["pixel_values"]
    mask = torch.zeros(*pixels.shape[:-3], 32, 32, dtype=torch.int64)
    for i, (height, width) in enumerate(((32, 32), (16, 32), (24, 16))):
        mask[i, ..., :height, :width] = 1
    lengths = torch.tensor([6, 4, 5])
    return {**examples, "pixel_mask": mask, "attention_mask": (torch.arange(6) < lengths[:, None]).long()}


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "retrieval"])
@pytest.mark.parametrize("padded", [False, True])
def test_weights_of_transformers_give_its_logits(task: str, padded: bool) -> None:
    theirs, ours = library(task), tiny(task)
    weights = from_release_state_dict(theirs.state_dict(), ours)
    ours.load_state_dict(weights)
    examples = masked(task) if padded else batch(task)
    expected = theirs(**examples).logits
    logits = ours(examples)
    assert logits.shape == (3, CLASSES[task])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert logits.std(dim=0).min() > 1e-3  # not the same for everything


def test_unknown_weights_are_named_and_pretraining_heads_left_out() -> None:
    ours, weights = tiny(), library("vqa").state_dict()
    heads = {"mlm_score.bias": torch.zeros(1), "itm_score.fc.bias": torch.zeros(2)}
    assert from_release_state_dict({**weights, **heads}, ours).keys() == ours.state_dict().keys()
    with pytest.raises(ModelError, match=r"1 unknown: vilt\.extra"):
        from_release_state_dict({**weights, "vilt.extra": torch.zeros(1)}, ours)


def test_fine_tuning_for_two_images_starts_from_one() -> None:
    ours, weights = tiny("nlvr2"), library("vqa").state_dict()
    found = from_release_state_dict(weights, ours, fresh_head=True)
    ours.load_state_dict(found)
    types = weights["vilt.embeddings.token_type_embeddings.weight"]
    assert torch.equal(found["embeddings.token_type_embeddings.weight"], types[[0, 1, 1]])
    assert torch.equal(found["head.3.weight"], ours.state_dict()["head.3.weight"])


def test_retrieval_starts_from_image_text_matching() -> None:
    ours, weights = tiny("retrieval"), library("vqa").state_dict()
    generator = torch.Generator().manual_seed(0)
    matching = {
        "itm_score.fc.weight": torch.randn(2, 64, generator=generator),
        "itm_score.fc.bias": torch.randn(2, generator=generator),
    }
    found = from_release_state_dict({**weights, **matching}, ours, fresh_head=True)
    ours.load_state_dict(found)
    assert torch.equal(found["head.weight"], matching["itm_score.fc.weight"][1:])
    assert torch.equal(found["head.bias"], matching["itm_score.fc.bias"][1:])
    own = ours.state_dict()["head.weight"].clone()
    for other in ({}, {**matching, "itm_score.fc.weight": torch.zeros(2, 128)}):  # not there, of another width
        found = from_release_state_dict({**weights, **other}, ours, fresh_head=True)
        assert torch.equal(found["head.weight"], own)
    question = tiny("vqa")
    found = from_release_state_dict({**weights, **matching}, question, fresh_head=True)
    assert torch.equal(found["head.3.weight"], question.state_dict()["head.3.weight"])


def test_a_releases_answers_are_not_those_counted_from_the_data(tmp_path: Path) -> None:
    text = TextInfo(vocab_size=256, max_tokens=20, pad_id=0)
    info = TaskInfo(CLASSES["vqa"], 3, 32, tuple("abcde"), "vqa", text)
    theirs = library("vqa").state_dict()
    save_file(theirs, tmp_path / "model.safetensors")
    section = {"family": "vilt", "name": "vilt_tiny", "checkpoint": str(tmp_path), "train": False}
    with pytest.raises(ModelError, match=r"set data\.answers to a file.*id2label"):
        build(section, info, counted_answers=True)
    kept = build(section, info).state_dict()["head.3.bias"]
    assert torch.equal(kept, theirs["classifier.3.bias"])
    fresh = build({**section, "train": True}, info, counted_answers=True).state_dict()["head.3.bias"]
    assert not torch.equal(fresh, theirs["classifier.3.bias"])


def test_weights_of_another_image_size_are_interpolated() -> None:
    ours = tiny(img_size=48)
    found = from_release_state_dict(library("vqa").state_dict(), ours)
    ours.load_state_dict(found)
    assert found["embeddings.position_embeddings"].shape == (1, 37, 64)
    wide = torch.arange(4.0).repeat(4).reshape(16, 1)  # the column's number: linear, so interpolation is exact
    grid = vl.resample_positions(torch.cat([torch.tensor([[9.0]]), wide]), 37, mode="bilinear")
    torch.testing.assert_close(grid[1:].reshape(6, 6), torch.linspace(0, 3, 6).expand(6, 6))
    assert grid[0] == 9


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


def test_weights_come_from_files_that_cannot_run_code(tmp_path: Path) -> None:
    source, theirs, model = tiny(seed=1), library("vqa"), tiny()
    save_file(source.state_dict(), tmp_path / "ours.safetensors")
    load_checkpoint_(model, tmp_path / "ours.safetensors")
    assert torch.equal(model(batch()), source(batch()))
    (tmp_path / "theirs").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    load_checkpoint_(model, tmp_path / "theirs")
    torch.testing.assert_close(model(batch()), theirs(**batch()).logits, atol=2e-5, rtol=1e-4)
    torch.save({"state_dict": theirs}, tmp_path / "pickled.ckpt")  # a module, whose reading runs code
    before = model(batch())
    for name, message in (("pickled.ckpt", "could run code"), ("nothing", "no such file"), (".", "must hold")):
        with pytest.raises(ModelError, match=message):
            load_checkpoint_(model, tmp_path / name)
    save_file({"head.0.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"missing: .* and \d+ more; 1 wrong shape: head\.0\.weight is \(2, 2\)"):
        load_checkpoint_(model, tmp_path / "other.safetensors")
    assert torch.equal(model(batch()), before)


def test_shards_are_read_together_and_none_from_elsewhere(tmp_path: Path) -> None:
    source, model = tiny(seed=1), tiny()
    names = list(source.state_dict())
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, keys in parts.items():
        save_file({key: source.state_dict()[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    load_checkpoint_(model, tmp_path)
    assert torch.equal(model(batch()), source(batch()))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(ModelError, match="same folder"):
        load_checkpoint_(model, tmp_path)


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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of a hub that cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def cached(hub: Path, name: str, weights: dict[str, Tensor]) -> Path:
    """Puts a downloaded model into the hub's cache."""
    revision = "0" * 40
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision).mkdir(parents=True)
    save_file(weights, folder / "snapshots" / revision / "model.safetensors")
    return folder / "snapshots" / revision


@pytest.mark.parametrize(
    ("task", "train", "name"),
    [
        ("vqa", False, "vilt-b32-finetuned-vqa"),
        ("nlvr2", False, "vilt-b32-finetuned-nlvr2"),
        ("retrieval", False, "vilt-b32-finetuned-flickr30k"),
        ("retrieval", True, "vilt-b32-mlm"),
        ("entailment", True, "vilt-b32-mlm"),
    ],
)
def test_published_weights_that_cannot_be_fetched_are_an_error(hub: Path, task: str, train: bool, name: str) -> None:
    with pytest.raises(ModelError, match=rf"dandelin/{name} could not be fetched.*model\.checkpoint"):
        fetch(task, train=train)


@pytest.mark.parametrize("task", ["entailment", "nlvr1"])
def test_a_task_without_fine_tuned_weights_must_be_trained(task: str) -> None:
    with pytest.raises(ModelError, match=rf"for vqa, nlvr2, retrieval, not for {task}; set model\.train: true"):
        fetch(task, train=False)


def test_training_starts_from_pretrained_weights_and_measuring_from_fine_tuned_ones(hub: Path) -> None:
    tuned = library("nlvr2").state_dict()
    before = {name: tensor for name, tensor in library("vqa").state_dict().items() if name.startswith("vilt.")}
    before = {name: tensor + 1 for name, tensor in before.items() if tensor.is_floating_point()}
    before["mlm_score.bias"] = torch.zeros(1)
    cached(hub, "dandelin/vilt-b32-finetuned-nlvr2", tuned)
    cached(hub, "dandelin/vilt-b32-mlm", before)
    info = TaskInfo(2, 3, 32, ("false", "true"), "nlvr2", TextInfo(vocab_size=256, max_tokens=20, pad_id=0))
    section = {"family": "vilt", "name": "vilt_tiny", "pretrained": True}
    kept, fresh = (build({**section, "train": train}, info).state_dict() for train in (False, True))
    assert torch.equal(kept["head.3.weight"], tuned["classifier.3.weight"])
    assert torch.equal(kept["pooler.dense.weight"], tuned["vilt.pooler.dense.weight"])
    assert not torch.equal(fresh["head.3.weight"], tuned["classifier.3.weight"])
    assert torch.equal(fresh["pooler.dense.weight"], before["vilt.pooler.dense.weight"])
