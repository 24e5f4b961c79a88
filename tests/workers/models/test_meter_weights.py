"""METER's weights: the release's names and ours, both ways, and what fine-tuning starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from orchestrator.study.load import load_study
from tests import meter_release as release
from tests.meter_models import TASKS, UNEQUAL, loud, masked, tiny
from tests.vision_language import CLASSES, batch
from workers import tasks
from workers.models import ModelError, build, load_checkpoint_, meter
from workers.models import vision_language as vl
from workers.models.meter_release import from_release_state_dict, to_release_state_dict
from workers.node.deadline import Deadline
from workers.node.lane import Lane
from workers.node.storage import LocalStorage
from workers.stages.cache import ensure
from workers.stages.graph import compile_recipe
from workers.stages.workbench import Workbench
from workers.tasks import corpus
from workers.trial import Recipe

THEIRS = ("contradiction", "neutral", "entailment")
"""Classes of SNLI-VE in the release's order."""
OF_NO_USE = (
    *("text_transformer.pooler.", "text_transformer.embeddings.position_ids", "mlm_score.", "itm_score."),
    *("vit_model.token_embedding.", "vit_model.positional_embedding", "vit_model.ln_final."),
)


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
        ensure(bench, stage)
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
