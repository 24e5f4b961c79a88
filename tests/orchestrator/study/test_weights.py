"""Strangers' checkpoints by a study file alone: what plan says of them, and the logits of their own code."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from orchestrator.report.sentences import model_text
from orchestrator.study.load import StudyError, load_study
from orchestrator.study.weights import weights_notes
from tests import foreign_vits as foreign
from tests.cli_calls import call, refused
from tests.foreign_vits import CLASSES, CREATE, SIDE
from tests.places import ROOT
from tests.study_files import minimal, yaml_of
from workers import models, tasks
from workers.run import run_trial
from workers.techniques import registry
from workers.trial import Recipe, Step, TrialSpec
from workers.weight_names import rule_fault

IMAGES = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
NAMES = tuple(f"class{i}" for i in range(CLASSES))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, two a class and part."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part in ("train", "test"):
        for name in NAMES:
            for i in range(3):
                path = folder / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    return folder


def study(tmp_path: Path, pictures: Path, model: dict[str, Any], **data: Any) -> Path:
    values = minimal(model=model, data={"kind": "imagefolder", "path": str(pictures), "image_size": SIDE, **data})
    path = tmp_path / "study.yaml"
    path.write_text(yaml_of(values))
    return path


def plan(path: Path) -> list[str]:
    done = call("plan", str(path), storage=path.parent / "results")
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def logits_by(path: Path) -> torch.Tensor:
    context = load_study(path).context()
    model = models.build(context.model, tasks.info(context.data)).eval()
    with torch.inference_mode():
        return model(IMAGES)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found = model.eval()(IMAGES)
    return getattr(found, "logits", found)


FOREIGN: dict[str, Any] = {
    "separate": (foreign.Separate, foreign.SEPARATE_MAP, foreign.SEPARATE_OPTIONS),
    "flat": (foreign.FlatPatches, foreign.FLAT_MAP, foreign.FLAT_OPTIONS),
    "torchvision": (foreign.torchvision_vit, foreign.TORCHVISION_MAP, {}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_study_file_alone_loads_another_naming(tmp_path: Path, pictures: Path, name: str) -> None:
    make, key_map, options = FOREIGN[name]
    theirs = foreign.drawn(make())
    torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, tmp_path / "theirs.pth")
    bare = {"create": CREATE, "options": options, "checkpoint": "theirs.pth"}
    said = refused("plan", str(study(tmp_path, pictures, bare)))
    assert "key_map:" in said
    path = study(tmp_path, pictures, {**bare, "key_map": key_map})
    lines = plan(path)
    assert any("2 heads" in line and f"eps {options.get('norm_eps', 1e-6):g}" in line for line in lines)
    assert any("normalised by the mean and std of the training images" in line for line in lines)
    torch.testing.assert_close(logits_by(path), logits_of(theirs), atol=1e-5, rtol=1e-5)


def test_a_study_file_alone_loads_a_folder_of_transformers(tmp_path: Path, pictures: Path) -> None:
    labels = dict(enumerate(reversed(NAMES)))
    theirs = foreign.transformers_vit("ViTForImageClassification", id2label=labels)
    theirs.save_pretrained(tmp_path / "theirs")
    normalisation = {"image_mean": [0.5, 0.25, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(normalisation))
    path = study(tmp_path, pictures, {"family": "hf_vit", "checkpoint": "theirs"})
    lines = plan(path)
    assert any("eps 1e-12" in line for line in lines)
    assert any("trained with mean [0.5, 0.25, 0.5]" in line for line in lines)
    assert any("rows of its head are put in the order of the data's classes" in line for line in lines)
    torch.testing.assert_close(logits_by(path), logits_of(theirs).flip(1), atol=1e-5, rtol=1e-5)
    same = {"mean": [0.5, 0.25, 0.5], "std": [0.5, 0.5, 0.5]}
    assert not any(
        "normalised" in line
        for line in plan(study(tmp_path, pictures, {"family": "hf_vit", "checkpoint": "theirs"}, **same))
    )


def test_a_trial_of_a_strangers_model_says_in_its_row_what_was_done_to_the_weights(
    tmp_path: Path, pictures: Path
) -> None:
    theirs = foreign.transformers_vit("DeiTForImageClassificationWithTeacher", image_size=24)
    theirs.save_pretrained(tmp_path / "theirs")
    path = study(tmp_path, pictures, {"family": "hf_vit", "checkpoint": "theirs"})
    config = load_study(path)
    context = config.context()
    notes = weights_notes(config, context)
    assert "position embeddings resampled from 6x6 to 4x4 patches, bicubic, as timm does" in notes
    told = replace(context, model={**context.model, "weights_notes": notes})
    assert told.digest == context.digest
    steps = [Step(name, asdict(registry()[name].Config())) for name in ("tome", "dynamic_int8")]
    spec = TrialSpec("x", "t1", Recipe(tuple(steps)), 0, told, str(tmp_path / "results"))
    result = run_trial(spec)
    assert result.status == "ok", result.failure
    assert result.conditions["weights"] == notes


@pytest.mark.parametrize(
    ("model", "where", "rule"),
    [
        ({"family": "hf_vit"}, "model", "must have a checkpoint, and neither name nor create"),
        ({"family": "hf_vit", "checkpoint": "x", "name": "vit"}, "model", "must have a checkpoint, and neither"),
        ({"family": "hf_vit", "checkpoint": "nowhere"}, "model.checkpoint", "must be a folder that exists"),
        (
            {"family": "hf_vit", "checkpoint": "~nobody-of-this-name/x"},
            "model.checkpoint",
            "must be a folder that exists",
        ),
        ({"name": "local-dir:~nobody-of-this-name"}, "model.name", "must be a folder that exists"),
        ({"name": "local-dir:a\0b"}, "model.name", "must be a folder that exists"),
        ({"create": {}, "key_map": {"a": "b"}}, "model", "key_map and checkpoint_key need a checkpoint"),
        ({"create": {}, "options": {"embed_dim": 3}}, "model", "embed_dim must be said in create alone"),
        ({"create": {}, "options": {"norm_eps": -1}}, "model.options.norm_eps", "must not be negative"),
        ({"create": {}, "options": {"act": "elu"}}, "model.options.act", "must be one of gelu"),
        ({"create": {}, "options": {"depth": 0}}, "model.options.depth", "must be at least 1"),
    ],
)
def test_what_the_model_section_alone_tells(model: dict[str, Any], where: str, rule: str) -> None:
    with pytest.raises(StudyError) as caught:
        load_study(minimal(model=model))
    assert any(fault.where == where and fault.rule.startswith(rule) for fault in caught.value.faults), caught.value


def test_pretrained_weights_of_other_classes_need_training(tmp_path: Path, pictures: Path) -> None:
    named = {"name": "vit_tiny_patch16_224", "pretrained": True}
    said = refused("plan", str(study(tmp_path, pictures, {**named, "train": False})))
    assert "must be of the data's 10 classes, is of 1000; set model.train: true" in said
    lines = plan(study(tmp_path, pictures, {**named, "train": True}))
    assert "  weights: its head is of 1000 classes; a new one is trained" in lines
    assert any("pretrained on images of 224x224 pixels" in line for line in lines)
    assert any("trained with mean [0.5, 0.5, 0.5]" in line for line in lines)


def test_a_folder_that_timm_wrote_lies_beside_the_study(tmp_path: Path, pictures: Path) -> None:
    sizes = {"img_size": SIDE, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": CLASSES}
    theirs = foreign.drawn(timm.create_model("vit_tiny_patch16_224", **sizes))
    save_for_hf(theirs, str(tmp_path / "theirs"), model_args=sizes, safe_serialization=True)
    named = {"name": "local-dir:theirs", "pretrained": True}
    path = study(tmp_path, pictures, named)
    assert any("trained with mean [0.5, 0.5, 0.5]" in line for line in plan(path))
    torch.testing.assert_close(logits_by(path), logits_of(theirs), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"family": "hf_vit", "checkpoint": "/a/b/vit-base"}, "ViT of transformers, weights of vit-base"),
        ({"name": "vit_tiny_patch16_224", "pretrained": True}, "vit_tiny_patch16_224, pretrained"),
        ({"name": "vit_tiny_patch16_224", "options": {"depth": 3}}, "vit_tiny_patch16_224, depth 3"),
        (
            {
                "create": {"width": 8, "depth": 1, "heads": 2, "patch": 4},
                "options": {"act": "relu"},
                "checkpoint": "a.pth",
            },
            "ViT, width 8, depth 1, 2 heads, patch 4, act relu, weights of a.pth",
        ),
    ],
)
def test_the_report_names_the_model_and_whose_weights_it_has(model: dict[str, Any], text: str) -> None:
    assert model_text(model) == text


def test_the_study_of_the_documents_is_one_and_so_are_its_rules(tmp_path: Path) -> None:
    text = (ROOT / "docs/your-model.md").read_text()
    (tmp_path / "mine.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert load_study(tmp_path / "mine.yaml", check_files=False).model.options == {"norm_eps": 1e-5, "qkv_bias": False}
    rules = re.findall(r"`'([^']+)': '([^']+)'`", text)
    assert len(rules) == 3
    for expression, target in rules:
        assert rule_fault(expression.replace(r"\|", "|"), target) is None
