"""ViLT's weights: as transformers has them, from files, from the hub's cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ViltConfig
from transformers.models.vilt import modeling_vilt

from tests.vision_language import CLASSES, batch
from tests.workers.models.test_vilt import masked, tiny
from workers.models import ModelError, build, load_checkpoint_
from workers.models import vision_language as vl
from workers.models.vilt_release import fetch, from_release_state_dict
from workers.tasks import TaskInfo, TextInfo


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


# --- files ------------------------------------------------------------------------------------------------------------


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


# --- the hub ----------------------------------------------------------------------------------------------------------


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
