"""Weights of strangers: a section of a study gives the logits of their own code."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import foreign_vits as foreign
from tests.foreign_vits import CLASSES, SIDE
from workers import models
from workers.models import sources
from workers.tasks import TaskInfo

DATA = TaskInfo(num_classes=CLASSES, in_chans=3, image_size=SIDE, class_names=tuple("0123456789"))
SHAPE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2.0}
IMAGES = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def section(path: Path, key_map: dict[str, Any] | None = None, **create: Any) -> dict[str, Any]:
    found = {"family": "timm", "name": None, "checkpoint": str(path), "create": {**SHAPE, **create}, "train": False}
    return found | ({"key_map": key_map} if key_map else {})


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found = model.eval()(IMAGES)
    return getattr(found, "logits", found)


FOREIGN = {
    "separate": (foreign.Separate, foreign.SEPARATE_MAP, foreign.SEPARATE_OPTIONS),
    "flat": (foreign.FlatPatches, foreign.FLAT_MAP, foreign.FLAT_OPTIONS),
    "flat, wide heads": (partial(foreign.FlatPatches, 24), foreign.FLAT_MAP, {**foreign.FLAT_OPTIONS, "head_dim": 24}),
    "torchvision": (foreign.torchvision_vit, foreign.TORCHVISION_MAP, {}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_key_map_gives_the_logits_of_their_own_code(tmp_path: Path, name: str) -> None:
    make, key_map, options = FOREIGN[name]
    theirs = foreign.drawn(make())
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    asked = section(tmp_path / "theirs.pth", key_map, **options)
    assert models.loading_notes(asked, DATA) == []
    torch.testing.assert_close(logits(models.build(asked, DATA)), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FOREIGN)
def test_the_refusal_shows_both_groups_and_a_key_map_that_fits(tmp_path: Path, name: str) -> None:
    import yaml

    make, _key_map, options = FOREIGN[name]
    theirs = foreign.drawn(make())
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    asked = section(tmp_path / "theirs.pth", **options)
    with pytest.raises(models.ModelError) as caught:
        models.loading_notes(asked, DATA)
    said, _, offered = str(caught.value).partition("  key_map:\n")
    assert "does not fit the model" in said
    assert "that the model has not: " in said
    assert "this would fit; compare it" in said
    guessed = yaml.safe_load("key_map:\n" + offered)["key_map"]
    found = models.build(section(tmp_path / "theirs.pth", guessed, **options), DATA)
    torch.testing.assert_close(logits(found), logits(theirs), atol=1e-5, rtol=1e-5)


KINDS = ["ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [{}, {"hidden_act": "gelu_new", "qkv_bias": False, "layer_norm_eps": 0.1}])
@pytest.mark.parametrize("new_names", [False, True])
def test_a_folder_of_transformers_gives_its_logits(
    tmp_path: Path, kind: str, config: dict[str, Any], new_names: bool
) -> None:
    theirs = foreign.transformers_vit(kind, **config)
    theirs.save_pretrained(tmp_path)
    if new_names:
        from safetensors.torch import save_file

        save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    asked, _ = sources.resolve({"family": "hf_vit", "checkpoint": str(tmp_path), "train": False})
    assert models.loading_notes(asked, DATA) == []
    torch.testing.assert_close(logits(models.build(asked, DATA)), logits(theirs), atol=1e-5, rtol=1e-5)
    described = models.describe(asked, DATA)
    assert described["family"] == "timm"
    assert set(described) == {"family", "name", "create"}


def theirs_at(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = foreign.drawn(foreign.Separate()).state_dict()
    torch.save(found, path)
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nothing": "x"}, "every expression must match a whole name of the checkpoint, 'nothing' matches none"),
        ({r"class_.*": "cls_token"}, "class_embedding must match one expression, matches 'class_embedding' and"),
        ({r"position_embedding": "cls_token"}, "two tensors become cls_token, position_embedding is the second"),
        ({r"position_embedding": "{p1 p2 c}"}, "does not fit"),
        (
            {r"blocks\.(\d+)\.attention\.out\.(weight|bias)": r"blocks.\1.attn.qkv.\2"},
            "three thirds or from one tensor",
        ),
        (
            {r"blocks\.(\d+)\.attention\.out\.(weight|bias)": r"blocks.\1.attn.qkv{v}.\2"},
            "two tensors become the third {v}",
        ),
        ({r"blocks\.(\d+)\.attention\.(query|key|value)\.(weight|bias)": r"blocks.\1.attn.qkv{q}.\3"}, "third {q}"),
        ({r"patches\.(weight|bias)": r"patch_embed.proj{p1 p2 c}.\1"}, r"must be (32, 48), is (32, 3, 4, 4)"),
        ({r"classifier\.(weight|bias)": None}, "the checkpoint has no head that could be told"),
    ],
)
def test_a_rule_that_is_not_kept_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    theirs_at(tmp_path / "theirs.pth")
    asked = section(tmp_path / "theirs.pth", foreign.SEPARATE_MAP | change, **foreign.SEPARATE_OPTIONS)
    with pytest.raises(models.ModelError) as caught:
        models.loading_notes(asked, DATA)
    assert said in str(caught.value)


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    torch.save({**theirs_at(tmp_path / "theirs.pth"), "decoder.bias": torch.zeros(3)}, tmp_path / "theirs.pth")
    key_map = foreign.SEPARATE_MAP | {r"decoder\..+": None}
    asked = section(tmp_path / "theirs.pth", key_map, **foreign.SEPARATE_OPTIONS)
    assert models.loading_notes(asked, DATA) == ["left out: decoder.bias"]


@pytest.mark.parametrize(
    ("layout", "split"), [("h d qkv", (2, 16, 3)), ("h qkv d", (2, 3, 16)), ("qkv h d", (3, 2, 16))]
)
def test_a_joint_projection_may_have_its_rows_in_another_order(
    tmp_path: Path, layout: str, split: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    own = models.build({"family": "timm", "create": SHAPE}, DATA)
    axes, theirs = layout.split(), dict(own.state_dict())
    for name in [name for name in theirs if ".qkv." in name]:
        tensor = theirs[name].reshape(3, 2, 16, -1)  # queries, keys, values; heads; dimensions
        moved = tensor.permute(*(("qkv", "h", "d").index(axis) for axis in axes), 3)
        assert moved.shape[:3] == split
        theirs[name] = moved.reshape(theirs[name].shape).clone()
    torch.save(theirs, tmp_path / "theirs.pth")
    rule = {r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)": rf"blocks.\1.attn.qkv{{{layout}}}.\2"}
    found = models.build(section(tmp_path / "theirs.pth", rule), DATA)
    torch.testing.assert_close(logits(found), logits(own), atol=0, rtol=0)


def test_a_layer_norm_around_flat_patches_is_another_architecture(tmp_path: Path) -> None:
    """As vit-pytorch has it since 1.0: nothing of the model's would take these norms, and no key map is said to fit."""
    theirs = foreign.drawn(foreign.FlatPatches()).state_dict()
    theirs |= {f"to_patch_embedding.{i}.{end}": torch.rand(32) for i in (0, 3) for end in ("weight", "bias")}
    torch.save(theirs, tmp_path / "theirs.pth")
    with pytest.raises(models.ModelError) as caught:
        models.loading_notes(section(tmp_path / "theirs.pth", **foreign.FLAT_OPTIONS), DATA)
    assert "would fit, but leaves 4 names open: to_patch_embedding.0.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["ViTForMaskedImageModeling"]}, "must be one of ViTForImageClassification"),
        ({"model_type": "dinov2"}, "of model_type 'dinov2'"),
        ({"hidden_act": "laplace"}, "hidden_act must be one of gelu"),
        ({"num_hidden_layers": 0}, "depth must be at least 1"),
        ({"hidden_size": 0}, "must be whole numbers above 0"),
        ({"num_attention_heads": "many"}, "num_heads must be a valid integer"),
        ({"patch_size": [4, 4]}, "must be whole numbers above 0"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    config = {"architectures": ["ViTForImageClassification"], "model_type": "vit", **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(models.ModelError) as caught:
        sources.resolve({"family": "hf_vit", "checkpoint": str(tmp_path)})
    assert said in str(caught.value)
    assert "config.json" in str(caught.value)
