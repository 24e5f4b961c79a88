"""Studies of vision-language models: what their files may say, every fault at once, and what a plan says of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.report.sentences import model_text
from orchestrator.study.data import VISION_LANGUAGE_KEYS
from orchestrator.study.load import StudyConfig, StudyError, check_same_study, load_study
from orchestrator.study.space import SearchSpace
from orchestrator.study.tasks import accuracies_of
from orchestrator.study.yaml_lines import Fault
from orchestrator.sweep.plan import technique_rows
from tests.studies import tiny_study
from workers import models
from workers.metrics import ACCURACIES
from workers.tasks import KINDS, TaskInfo, TextInfo, load
from workers.techniques.record import ModelInfo
from workers.trial import Recipe, Step


def study(**more: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "model": {"family": "vilt", "name": "vilt_tiny"},
        "data": {"kind": "digit_vqa"},
        "objectives": ["vqa_pct", "size_bytes"],
        "techniques": {"weight_only": {"bits": [4, 8]}, "tome": {"r": [1, 2]}},
        **more,
    }


def faults_of(source: Any) -> dict[str, Fault]:
    with pytest.raises(StudyError) as caught:
        load_study(source)
    return {fault.where: fault for fault in caught.value.faults}


# --- good studies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "objectives"),
    [
        ("digit_vqa", ["vqa_pct"]),
        ("digit_entailment", ["top1_pct"]),
        ("digit_nlvr", ["top1_pct"]),
        ("digit_retrieval", ["text_recall1_pct", "image_recall1_pct"]),
    ],
)
@pytest.mark.parametrize("family", ["vilt", "meter"])
def test_every_embedded_task_may_be_asked_of_both_families(kind: str, objectives: list[str], family: str) -> None:
    limits = [f"{name}_drop <= 3" for name in objectives]
    model = {"family": family, "name": f"{family}_tiny", "create": {"dropout": 0.1, "num_heads": 2}}
    found = load_study(study(model=model, data={"kind": kind}, objectives=[*objectives, "macs"], constraints=limits))
    assert found.model.settings() == {"dropout": 0.1, "num_heads": 2}
    assert found.model.train
    assert list(found.objectives.values()) == ["maximize"] * len(objectives) + ["minimize"]
    assert StudyConfig.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert load_study(found.to_dict()) == found


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS.values() if kind.name == kind.task])
def test_kinds_from_files_need_a_path(tmp_path: Path, kind: str) -> None:
    objectives = list(accuracies_of(kind))
    assert faults_of(study(data={"kind": kind}, objectives=objectives)).keys() == {"data.path"}
    data = {"kind": kind, "path": str(tmp_path), "tokenizer": "bert-base-uncased", "max_text_tokens": 32}
    assert load_study(study(data=data, objectives=objectives)).data.max_text_tokens == 32


def test_every_kind_has_a_task_and_every_task_an_accuracy() -> None:
    from workers.models.vision_language import TASKS

    tasks = {kind.task for kind in KINDS.values()}
    assert tasks == {"image_classification", *TASKS}
    assert {name for task in tasks for name in accuracies_of(task)} == set(ACCURACIES)


def test_published_weights_and_a_model_by_its_settings_alone() -> None:
    published = load_study(study(model={"family": "vilt", "name": "vilt_b32", "pretrained": True}))
    assert (published.model.pretrained, published.model.train) == (True, False)
    assert load_study(study(model={"family": "meter", "create": {"cross_depth": 2}})).model.name is None


def test_a_checkpoint_may_be_a_downloaded_models_folder(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    model = {"family": "vilt", "name": "vilt_tiny", "checkpoint": str(tmp_path)}
    fault = faults_of(study(model=model))["model.checkpoint"]
    assert "must hold weights" in fault.rule
    save_file({}, tmp_path / "model.safetensors")
    assert load_study(study(model=model)).model.checkpoint == str(tmp_path)


def test_a_folder_of_a_tokeniser_is_named_in_the_study_and_known_by_its_content(tmp_path: Path) -> None:
    import yaml

    from workers.tasks.tokenisers import WordTokeniser

    ids = []
    for name, texts in (("a", ["what digit"]), ("b", ["what digit"]), ("c", ["what colour"])):
        place = tmp_path / name
        (place / "words").mkdir(parents=True)
        manifest = {"extra": {"preprocessing": {"text": {"tokenizer": WordTokeniser.of(texts).description()}}}}
        (place / "words" / "manifest.json").write_text(json.dumps(manifest))
        file = place / "study.yaml"
        file.write_text(yaml.safe_dump(study(data={"kind": "digit_vqa", "tokenizer": "words"})))
        found = load_study(file)
        assert found.data.tokenizer == str(place / "words")
        context = found.context()
        assert context.data["tokenizer"]["path"] == str(place / "words")
        assert load(context.data).info.text.vocab_size == 6
        ids.append(context.digest)
    assert ids[0] == ids[1] != ids[2]
    file.write_text(yaml.safe_dump(study(data={"kind": "digit_vqa", "tokenizer": "bert-base-uncased"})))
    assert load_study(file).data.tokenizer == "bert-base-uncased"


def test_a_file_of_answers_is_named_in_the_study_and_known_by_its_content(tmp_path: Path) -> None:
    import yaml

    ids = []
    for folder, names in (("a", "yes\nno\nred\n"), ("b", "yes\nno\nred\n"), ("c", "no\nyes\nred\n")):
        place = tmp_path / folder
        place.mkdir()
        (place / "answers.txt").write_text(names)
        file = place / "study.yaml"
        file.write_text(yaml.safe_dump(study(data={"kind": "digit_vqa", "answers": "answers.txt"})))
        found = load_study(file)
        assert found.data.answers == str(place / "answers.txt")
        assert StudyConfig.from_dict(json.loads(json.dumps(found.to_dict()))) == found
        context = found.context()
        assert context.data["answers"]["path"] == str(place / "answers.txt")
        ids.append(context.digest)
    assert ids[0] == ids[1] != ids[2]
    counted = load_study(study()).context()
    assert counted.data["answers"] == 3129
    (place / "answers.txt").unlink()
    fault = faults_of(file)["data.answers"]
    assert fault.rule.startswith("must be a readable file of answers: No such file")
    assert fault.remedy == "name one, or the number of the most frequent answers"
    assert str(load_study(file, check_files=False).data.answers).endswith("answers.txt")  # it runs elsewhere


# --- faults -----------------------------------------------------------------------------------------------------------

BAD = """
name: bad
model:
  family: vilt
  name: vilt_tini
  options: {img_size: 3}
  create:
    dept: 3
    img_size: 64
    dropout: much
    embed_dim: 0
data: {kind: digit_vqa, path: somewhere, candidates: 3, max_text_tokens: 2}
training:
  baseline: {augment: flip_crop}
  recovery: {mixup: 0.2, cutmix: 0.1}
objectives: [top1_pct, size_bytes]
constraints: [text_recall1_pct_drop <= 1, vqa_pct_drop <= 1, "top1_pct >= 3"]
techniques:
  nystrom:
  weight_only: {bits: 99}
recipes:
  - [nystrom]
"""

EXPECTED = {
    "model": (3, "options are arguments of timm's", "use create"),
    "model.name": (5, "must be a known model of family vilt", "did you mean vilt_tiny?"),
    "model.create.dept": (8, "must be a setting of vilt", "did you mean depth?"),
    "model.create.img_size": (9, "must be left out: the data says it", "see data.image_size"),
    "model.create.dropout": (10, "must be a valid number", "the default is 0.1"),
    "model.create.embed_dim": (11, "must be at least 1", "the default is 768"),
    "data.path": (12, "must be left out for kind digit_vqa", "the digits come with scikit-learn"),
    "data.candidates": (12, "must be left out: it is for retrieval", "the kind is digit_vqa"),
    "data.max_text_tokens": (12, "must be greater than or equal to 3", ""),
    "training.baseline.augment": (14, "must be none for vqa: texts speak of the pictures", "leave it out"),
    "training.recovery.mixup": (15, "must be 0.0 for vqa", "leave it out"),
    "training.recovery.cutmix": (15, "must be 0.0 for vqa", "leave it out"),
    "objectives[0]": (16, "must be an accuracy of the task vqa", "use vqa_pct"),
    "constraints[0]": (17, "must be an accuracy of the task vqa", "use vqa_pct_drop"),
    "constraints[2]": (17, "must be an accuracy of the task vqa", "use vqa_pct"),
    "techniques.nystrom": (19, "must be a technique that works on models of family vilt", "these do: distill"),
    "techniques.weight_only.bits": (20, "must be one of", "for example"),
}


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    found = faults_of(path)
    assert found.keys() == EXPECTED.keys()
    for where, (line, rule, remedy) in EXPECTED.items():
        assert (where, found[where].line) == (where, line)
        assert rule in found[where].rule, where
        assert found[where].remedy.startswith(remedy), where


@pytest.mark.parametrize(
    ("change", "where", "rule"),
    [
        ({"model": {"create": {"width": 16}}}, "model.family", "must be vilt or meter for data kind digit_vqa"),
        (
            {"data": {"kind": "digits"}, "objectives": ["top1_pct"]},
            "model.family",
            "must be timm for data kind digits",
        ),
        (
            {"model": {"family": "bert", "name": "vilt_tiny"}},
            "model.family",
            "must be 'timm', 'vilt', 'meter' or 'hf_vit'",
        ),
        ({"model": {"family": "vilt"}}, "model", "must have a name, create, or both"),
        ({"model": {"family": "vilt", "create": 3}}, "model.create", "must be a mapping of settings"),
        (
            {"model": {"family": "meter", "create": {"embed_dim": 50}}},
            "model.create",
            "embed_dim must be a multiple of num_heads 12, got 50",
        ),
        (
            {"data": {"kind": "digit_vqa", "image_size": 30}},
            "model.create",
            "data.image_size must be a multiple of patch_size 8, got 30",
        ),
        (
            {"model": {"family": "meter", "name": "meter_b16", "pretrained": True}},
            "model.pretrained",
            "must be false for meter_b16",
        ),
        ({"data": {"kind": "digit_nlvr", "answers": 10}, "objectives": ["top1_pct"]}, "data.answers", "it is for vqa"),
        (
            {"data": {"kind": "digit_nlvr", "answers": "a.txt"}, "objectives": ["top1_pct"]},
            "data.answers",
            "it is for vqa",
        ),
        ({"data": {"kind": "digit_vqa", "answers": 1}}, "data.answers", "must be a whole number from 2, or the path"),
        (
            {"data": {"kind": "digit_vqa", "answers": True}},
            "data.answers",
            "must be a whole number from 2, or the path",
        ),
        (
            {"data": {"kind": "digit_vqa", "answers": str(Path(__file__).parent)}},
            "data.answers",
            "must be a readable file",
        ),
        (
            {"data": {"kind": "digit_retrieval", "candidates": 8}},
            "objectives[0]",
            "must be an accuracy of the task retrieval",
        ),
    ],
)
def test_faults_one_by_one(change: dict[str, Any], where: str, rule: str) -> None:
    fault = faults_of(study(**change))[where]
    assert rule in fault.rule


def test_images_alone_have_no_keys_of_texts() -> None:
    data = {
        "kind": "digits",
        "max_text_tokens": 20,
        "truncation": True,
        "tokenizer": "words",
        "answers": 3,
        "candidates": 3,
    }
    found = faults_of(tiny_study(data=data))
    assert found.keys() == {f"data.{key}" for key in VISION_LANGUAGE_KEYS}
    assert "images with texts" in found["data.tokenizer"].rule


def test_what_goes_together_depends_on_the_family() -> None:
    from orchestrator.study.techniques import resolve_recipes

    named = {"tome": {}, "pumer": {}}
    for family, expected in (("meter", 0), ("vilt", 1)):
        _, faults = resolve_recipes([["tome", "pumer"]], {}, named, 3, family)
        assert len(faults) == expected


# --- context, plan ----------------------------------------------------------------------------------------------------


def test_old_studies_keep_their_context() -> None:
    """Keys that only texts have enter no context of images: their trials keep their ids."""
    found = load_study(tiny_study())
    assert not set(VISION_LANGUAGE_KEYS) & found.context().data.keys()
    stored = found.to_dict()
    for section, keys in (("data", VISION_LANGUAGE_KEYS), ("model", ("family",))):
        stored[section] = {k: v for k, v in stored[section].items() if k not in keys}
    check_same_study(found, stored, "there")


TEXTS = TextInfo(60, 12, 0)
INFO = {
    "vqa": TaskInfo(17, 3, 32, tuple(map(str, range(17))), "vqa", TEXTS),
    "nlvr2": TaskInfo(2, 3, 32, ("false", "true"), "nlvr2", TEXTS),
    "retrieval": TaskInfo(1, 3, 32, ("match",), "retrieval", TEXTS),
}


def info_of(found: StudyConfig) -> ModelInfo:
    model = {"family": found.model.family, "name": found.model.name, "create": found.model.settings()}
    return models.model_info(models.build(model, INFO[KINDS[found.data.kind].task], device="meta"))


@pytest.mark.parametrize(
    ("kind", "family", "said"),
    [
        (
            "digit_vqa",
            "vilt",
            "model vilt: 4 layers over both modalities of width 64, up to 20 text and 17 image tokens, 167,953 ",
        ),
        ("digit_vqa", "vilt", "parameters; data digit_vqa, vqa, 17 answers"),
        ("digit_nlvr", "meter", "up to 20 text and 17 image tokens"),
        ("digit_nlvr", "vilt", "data digit_nlvr, nlvr2, 2 classes"),
        ("digit_retrieval", "meter", "data digit_retrieval, retrieval, a score a pair"),
    ],
)
def test_a_plan_says_what_the_model_sees(kind: str, family: str, said: str) -> None:
    from orchestrator.sweep.plan import _model_line

    objectives = [*accuracies_of(KINDS[kind].task)]
    found = load_study(
        study(model={"family": family, "name": f"{family}_tiny"}, data={"kind": kind}, objectives=objectives)
    )
    assert said in _model_line(found, info_of(found))


def test_a_space_refuses_techniques_of_another_family() -> None:
    found = load_study(study())
    space = SearchSpace(found.techniques, info_of(found))
    assert space.size() > 0
    reason = space.fault(Recipe((Step("nystrom"),)))
    assert reason == "nystrom: works on models of family timm, not on vilt"


def test_techniques_say_which_models_they_work_on() -> None:
    rows = {row["name"]: row["models"] for row in technique_rows()}
    assert rows["nystrom"] == ["timm"]
    assert rows["weight_only"] == ["timm", "vilt", "meter"]


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"family": "vilt", "name": "vilt_tiny", "create": {"depth": 3}}, "ViLT, vilt_tiny, depth 3"),
        ({"family": "meter", "name": "meter_b16", "create": None}, "METER, meter_b16"),
        ({"name": "vit_tiny_patch16_224", "create": None}, "vit_tiny_patch16_224"),
    ],
)
def test_reports_name_the_model(model: dict[str, Any], text: str) -> None:
    assert model_text(model) == text


def test_a_study_of_images_imports_no_transformers() -> None:
    code = (
        "import sys; from orchestrator.study.load import load_study; load_study('quick').context(); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
