"""METER: against a slow reference under the release's names, the converter, padding, streams, sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.config import load_study
from tests import meter_release as release
from tests.vision_language import CLASSES, batch, losses, macs, settings
from workers import tasks
from workers.deadline import Deadline
from workers.lane import Lane
from workers.models import ModelError, build, load_checkpoint_, meter
from workers.models import vision_language as vl
from workers.models.meter_release import from_release_state_dict, to_release_state_dict
from workers.protocol import Recipe
from workers.stages import Workbench, compile_recipe
from workers.storage import LocalStorage
from workers.tasks import corpus

TASKS = list(CLASSES)
UNEQUAL = {
    **{"embed_dim": 24, "cross_depth": 3, "num_heads": 2, "text_dim": 40, "text_depth": 1, "text_heads": 5},
    **{"image_dim": 32, "image_depth": 2, "image_heads": 4},
}
"""Three widths, depths and numbers of heads, so that nothing can stand in for something else."""


THEIRS = ("contradiction", "neutral", "entailment")
"""Classes of SNLI-VE in the release's order."""
OF_NO_USE = (
    *("text_transformer.pooler.", "text_transformer.embeddings.position_ids", "mlm_score.", "itm_score."),
    *("vit_model.token_embedding.", "vit_model.positional_embedding", "vit_model.ln_final."),
)


def tiny(task: str = "vqa", *, seed: int = 0, **more: Any) -> meter.Meter:
    torch.manual_seed(seed)
    return meter.create({"name": "meter_tiny", "create": settings(task, **more)}).eval()


def loud(task: str = "vqa", **more: Any) -> meter.Meter:
    """A tiny model whose weights are large enough that every token matters to the logits."""
    model = tiny(task, **more)
    types = 3 if task == "nlvr2" else 2
    model.load_state_dict(from_release_state_dict(release.weights(model.shape, head=task, types=types), model))
    return model


def masked(task: str = "vqa") -> dict[str, Tensor]:
    examples = batch(task)
    examples["attention_mask"] = (torch.arange(6) < torch.tensor([6, 4, 5])[:, None]).long()
    return examples


# --- the release ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_releases_weights_give_its_logits(task: str, padded: bool) -> None:
    model = tiny(task, **UNEQUAL)
    theirs = release.weights(model.shape, head=task, types=3 if task == "nlvr2" else 2)
    model.load_state_dict(from_release_state_dict(theirs, model))
    examples = masked(task) if padded else batch(task)
    expected = release.logits(theirs, model.shape, examples)
    if task == "entailment":  # theirs: contradiction, neutral, entailment
        expected = expected[:, [THEIRS.index(name) for name in corpus.ENTAILMENT]]
    logits = model(examples)
    assert logits.shape == (3, CLASSES[task])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert expected.std(dim=0).min() > 1e-2


def test_every_weight_of_the_release_arrives_once_or_is_of_no_use() -> None:
    model = tiny(**UNEQUAL)
    theirs = release.weights(model.shape, head="vqa")
    found = from_release_state_dict(theirs, model)
    assert found.keys() == model.state_dict().keys()
    sums = sorted(float(tensor.double().sum()) for tensor in found.values())
    parts = []
    for name, tensor in theirs.items():
        if not name.startswith(OF_NO_USE):
            parts += list(tensor.chunk(3)) if "in_proj" in name else [tensor]
    assert sorted(float(tensor.double().sum()) for tensor in parts) == sums


@pytest.mark.parametrize("task", TASKS)
def test_the_releases_names_and_ours_round_trip(task: str) -> None:
    model = tiny(task, **UNEQUAL)
    theirs = release.weights(model.shape, head=task, types=3 if task == "nlvr2" else 2)
    ours = from_release_state_dict(theirs, model)
    model.load_state_dict(ours)
    back = to_release_state_dict(model)
    used = {name: tensor for name, tensor in theirs.items() if not name.startswith(OF_NO_USE)}
    assert back.keys() == used.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in used.items())
    again = from_release_state_dict(back, tiny(task, seed=1, **UNEQUAL))
    assert again.keys() == ours.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_rows_of_a_head_are_put_in_our_order_of_classes() -> None:
    model = tiny("entailment")
    theirs = release.weights(model.shape, head="entailment")
    found = from_release_state_dict(theirs, model)
    for row, name in enumerate(THEIRS):
        ours = corpus.ENTAILMENT.index(name)
        assert torch.equal(found["head.3.weight"][ours], theirs["snli_classifier.3.weight"][row])
        assert found["head.3.bias"][ours] == theirs["snli_classifier.3.bias"][row]
    assert torch.equal(found["head.0.weight"], theirs["snli_classifier.0.weight"])
    pair = tiny("nlvr2")
    theirs = release.weights(pair.shape, head="nlvr2", types=3)
    assert torch.equal(from_release_state_dict(theirs, pair)["head.3.bias"], theirs["nlvr2_classifier.3.bias"])
    assert corpus.TRUTH == ("false", "true")  # theirs too


def test_a_task_that_the_release_has_no_head_for_starts_from_pretraining(tmp_path: Path) -> None:
    model = tiny("nlvr1")
    save_file(release.weights(model.shape, head=None), tmp_path / "meter.safetensors")
    with pytest.raises(ModelError, match=r"no head for nlvr1.*model\.train: true"):
        load_checkpoint_(model, tmp_path / "meter.safetensors")
    load_checkpoint_(model, tmp_path / "meter.safetensors", fresh_head=True)
    with pytest.raises(ModelError, match="not for nlvr1"):
        to_release_state_dict(model)


def test_a_releases_answers_are_not_those_counted_from_the_data(tmp_path: Path) -> None:
    model = tiny(seed=1)
    theirs = release.weights(model.shape, head="vqa")
    save_file(theirs, tmp_path / "meter.safetensors")
    before = model.state_dict()["head.3.bias"].clone()
    with pytest.raises(ModelError, match=r"meter\.safetensors: .*set data\.answers to a file"):
        load_checkpoint_(model, tmp_path / "meter.safetensors", counted_answers=True)
    load_checkpoint_(model, tmp_path / "meter.safetensors", counted_answers=True, fresh_head=True)
    assert torch.equal(model.state_dict()["head.3.bias"], before)
    load_checkpoint_(model, tmp_path / "meter.safetensors")
    assert torch.equal(model.state_dict()["head.3.bias"], theirs["vqa_classifier.3.bias"])
    save_file(model.state_dict(), tmp_path / "ours.safetensors")  # trained here: the answers of the same data
    load_checkpoint_(tiny(), tmp_path / "ours.safetensors", counted_answers=True)


def test_a_study_that_measures_the_releases_head_gives_its_answers(tmp_path: Path) -> None:
    section = {"family": "meter", "name": "meter_tiny"}
    data: dict[str, Any] = {"kind": "digit_vqa", "train_limit": 32, "search_limit": 16, "report_limit": 16}
    more = {"model": section, "techniques": {"weight_only": {"bits": [4, 8]}}, "objectives": ["vqa_pct", "macs"]}
    info = tasks.info(data)
    source = build(section, info)
    assert isinstance(source, meter.Meter)
    save_file(to_release_state_dict(source), tmp_path / "meter.safetensors")
    more["model"] = {**section, "checkpoint": str(tmp_path / "meter.safetensors"), "train": False}
    (tmp_path / "answers.json").write_text(json.dumps(info.class_names[::-1]))

    def baseline(data: dict[str, Any]) -> Any:
        context = load_study({"name": "heads", "data": data, **more}).context()
        deadline, device = Deadline(None), torch.device("cpu")
        lane = Lane("cpu", deadline=deadline)
        bench = Workbench(context, 0, LocalStorage(tmp_path / "stages"), device, lane, deadline, {})
        stage = compile_recipe(Recipe(), 0, context)[0]
        bench.ensure(stage)
        return bench.load(stage.key)

    with pytest.raises(ModelError, match=r"set data\.answers to a file"):
        baseline(data)
    kept = baseline({**data, "answers": str(tmp_path / "answers.json")})
    assert torch.equal(kept.head[3].weight, source.head[3].weight)  # type: ignore[index]


def test_other_names_are_refused_by_name(tmp_path: Path) -> None:
    model, file = tiny(), tmp_path / "meter.safetensors"
    theirs = release.weights(model.shape, head="vqa")
    key = "cross_modal_image_layers.2.crossattention.self.key.bias"
    cases = {
        r"2 unknown: cross_modal_text_layers\.0\.extra, swin\.weight": {
            **theirs,
            "cross_modal_text_layers.0.extra": torch.zeros(1),
            "swin.weight": torch.zeros(1),
        },
        r"1 missing: layers\.2\.image\.cross_attention\.attention\.key\.bias": {
            name: tensor for name, tensor in theirs.items() if name != key
        },
        r"1 unexpected: text_encoder\.layers\.7\.output\.dense\.bias": {
            **theirs,
            "text_transformer.encoder.layer.7.output.dense.bias": torch.zeros(64),
        },
        r"wrong shape: text_transform\.bias is \(3,\)": {**theirs, "cross_modal_text_transform.bias": torch.zeros(3)},
        r"no head for vqa.*before fine-tuning": release.weights(model.shape, head="entailment"),
    }
    for message, weights in cases.items():
        save_file(weights, file)
        with pytest.raises(ModelError, match=message):
            load_checkpoint_(model, file)


@pytest.mark.parametrize("task", TASKS)
def test_fine_tuning_starts_from_pretraining(task: str) -> None:
    model = tiny(task)
    theirs = release.weights(model.shape, head=None)
    found = from_release_state_dict(theirs, model, fresh_head=True)
    model.load_state_dict(found)
    types = theirs["token_type_embeddings.weight"]
    assert torch.equal(found["token_type_embeddings.weight"], types[[0, 1, 1]] if task == "nlvr2" else types)
    if task == "retrieval":
        assert torch.equal(found["head.weight"], theirs["itm_score.fc.weight"][1:])
        assert torch.equal(found["head.bias"], theirs["itm_score.fc.bias"][1:])
    else:
        assert torch.equal(found["head.0.weight"], tiny(task).state_dict()["head.0.weight"])


def test_statements_are_learnt_from_a_model_of_questions(tmp_path: Path) -> None:
    source, model = loud("vqa"), tiny("nlvr2", seed=3)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stored = source.state_dict() | {n: t.clone() for n, t in source.named_buffers()}  # as an artefact has them
    assert len(stored) > len(source.state_dict())
    save_file(stored, tmp_path / "ours.safetensors")
    with pytest.raises(ModelError, match=r"wrong shape: .*token_type_embeddings"):
        load_checkpoint_(model, tmp_path / "ours.safetensors")
    load_checkpoint_(model, tmp_path / "ours.safetensors", fresh_head=True)
    theirs = source.state_dict()
    for name, tensor in model.state_dict().items():
        expected = own[name] if name.startswith("head.") else theirs[name]
        if name == "token_type_embeddings.weight":
            expected = expected[[0, 1, 1]]
        assert torch.equal(tensor, expected), name
    save_file(tiny("vqa", vocab_size=37).state_dict(), tmp_path / "words.safetensors")
    with pytest.raises(ModelError, match="word_embeddings"):  # others' words have other rows
        load_checkpoint_(model, tmp_path / "words.safetensors", fresh_head=True)


def test_weights_of_another_image_size_are_interpolated() -> None:
    small, large = tiny(), tiny(img_size=48)
    theirs = release.weights(small.shape, head="vqa")
    key, ours = "vit_model.visual.positional_embedding", "image_encoder.embeddings.position_embedding.weight"
    theirs[key][1:] = 0.5  # a constant stays one
    found = from_release_state_dict(theirs, large)
    large.load_state_dict(found)
    assert found[ours].shape == (37, 64)
    assert torch.equal(found[ours][0], theirs[key][0])
    torch.testing.assert_close(found[ours][1:], torch.full((36, 64), 0.5))
    with pytest.raises(ModelError, match="no class token and a square"):
        vl.resample_positions(torch.zeros(16, 2), 37, mode="bicubic")


def test_weights_come_from_files_that_cannot_run_code(tmp_path: Path) -> None:
    source, model = loud(), tiny(seed=2)
    save_file(source.state_dict(), tmp_path / "ours.safetensors")
    load_checkpoint_(model, tmp_path / "ours.safetensors")
    assert torch.equal(model(batch()), source(batch()))
    theirs = release.weights(model.shape, head="vqa", seed=3)
    torch.save({"state_dict": theirs, "hyper_parameters": {"lr": 1e-5}, "epoch": 9}, tmp_path / "meter.ckpt")
    load_checkpoint_(model, tmp_path / "meter.ckpt")
    torch.testing.assert_close(model(batch()), release.logits(theirs, model.shape, batch()), atol=1e-4, rtol=1e-4)
    torch.save({"state_dict": theirs, "model": source}, tmp_path / "pickled.ckpt")
    with pytest.raises(ModelError, match="could run code"):
        load_checkpoint_(model, tmp_path / "pickled.ckpt")


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
