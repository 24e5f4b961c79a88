"""What lies in a file of weights beside or around the names: wrappers, prefixes, shards, other sizes, values that are no numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from tests.workers.models.test_foreign_weights import DATA, SHAPE, section
from workers import models

Tensors = dict[str, torch.Tensor]


def weights(seed: int = 0, **create: Any) -> Tensors:
    torch.manual_seed(seed)
    return models.build({"family": "timm", "create": {**SHAPE, **create}}, DATA).state_dict()


def loaded(path: Path, **more: Any) -> tuple[Tensors, list[str]]:
    """Returns the weights of a model built from a file, and what ``plan`` would say of it."""
    asked = section(path) | more
    notes = models.loading_notes(asked, DATA)
    return models.build(asked, DATA).state_dict(), notes


def same(one: Tensors, two: Tensors) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_torch_say_nothing(tmp_path: Path, prefix: str) -> None:
    torch.save(under(prefix, weights()), tmp_path / "a.pth")
    found, notes = loaded(tmp_path / "a.pth")
    assert same(found, weights())
    assert notes == []


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "encoder.", "student.net."])
def test_another_prefix_is_taken_off_and_told(tmp_path: Path, prefix: str) -> None:
    tensors = weights()
    heads = {name: tensors.pop(name) for name in list(tensors) if name.startswith("head.")}
    torch.save(under(prefix, tensors) | heads, tmp_path / "a.pth")
    found, notes = loaded(tmp_path / "a.pth")
    assert same(found, weights())
    assert notes == [f"names are taken without their prefix {prefix}"]


def test_of_two_models_in_a_file_one_must_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(under("student.", weights(1)) | under("teacher.", weights(2)), path)
    with pytest.raises(
        models.ModelError, match=r"several models, under student\., teacher\.; set model\.checkpoint_key"
    ):
        loaded(path)
    assert same(loaded(path, checkpoint_key="teacher")[0], weights(2))
    torch.save({"student": weights(1), "teacher": under("module.", weights(2)), "epoch": 3}, path)
    with pytest.raises(models.ModelError, match=r"set model\.checkpoint_key to one of student, teacher"):
        loaded(path)
    found, notes = loaded(path, checkpoint_key="teacher.module")
    assert same(found, weights(2))
    assert notes == []
    with pytest.raises(models.ModelError, match=r"nothing lies under ema in .*; there are student, teacher, epoch"):
        loaded(path, checkpoint_key="ema")


def test_the_averaged_weights_beside_others_are_told_and_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"state_dict": weights(1), "state_dict_ema": weights(2), "optimizer": {"state": {0: {}}}}, path)
    found, notes = loaded(path)
    assert same(found, weights(1))
    assert notes == ["the weights under state_dict are taken; model.checkpoint_key chooses others: state_dict_ema"]
    assert same(loaded(path, checkpoint_key="state_dict_ema")[0], weights(2))
    torch.save({"ema": {"model": weights(3)}, "epoch": 1}, path)
    assert same(loaded(path)[0], weights(3))


def shards(folder: Path, parts: list[Tensors]) -> Path:
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    index = {"metadata": {}, "weight_map": {n: name for name, part in zip(names, parts, strict=True) for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    tensors = list(weights().items())
    shards(tmp_path, [dict(tensors[:7]), dict(tensors[7:])])
    assert same(loaded(tmp_path)[0], weights())
    assert same(loaded(tmp_path / "model.safetensors.index.json")[0], weights())
    shards(tmp_path, [dict(tensors[:7]), dict(tensors[6:])])
    with pytest.raises(models.ModelError, match="must name each tensor once"):
        loaded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(models.ModelError, match=r"model-00002-of-00002\.safetensors: there is no such file"):
        loaded(tmp_path)


def test_another_image_size_is_resampled_as_timm_does(tmp_path: Path) -> None:
    tensors = weights()
    tensors["pos_embed"] = torch.randn(1, 1 + 36, 32)
    save_file(tensors, tmp_path / "a.safetensors")
    found, notes = loaded(tmp_path / "a.safetensors")
    assert notes == ["position embeddings resampled from 6x6 to 4x4 patches, bicubic, as timm does"]
    expected = resample_abs_pos_embed(tensors["pos_embed"], [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(found["pos_embed"], expected)


def test_another_patch_size_and_other_channels_are_told(tmp_path: Path) -> None:
    tensors = weights()
    patch = tensors["patch_embed.proj.weight"] = torch.randn(32, 3, 8, 8)
    save_file(tensors, tmp_path / "a.safetensors")
    found, notes = loaded(tmp_path / "a.safetensors")
    assert notes == ["patch embedding resampled from 8x8 to 4x4 pixels, as timm does"]
    torch.testing.assert_close(found["patch_embed.proj.weight"], resample_patch_embed(patch, [4, 4]))
    save_file(weights(), tmp_path / "a.safetensors")
    grey, asked = replace(DATA, in_chans=1), section(tmp_path / "a.safetensors")
    assert models.loading_notes(asked, grey) == ["patch embedding of 3 channels made one of 1, as timm does"]
    summed = weights()["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(models.build(asked, grey).state_dict()["patch_embed.proj.weight"], summed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    tensors = weights()
    tensors["norm.bias"][3] = value
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(models.ModelError, match=r"1 tensors hold NaN or infinity: norm\.bias"):
        loaded(tmp_path / "a.safetensors")


def test_a_backbone_without_a_head_is_for_training_only(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in weights().items() if not name.startswith("head.")}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(models.ModelError, match=r"has no head that could be told: model\.train: true trains a new one"):
        loaded(tmp_path / "a.safetensors")
    _, notes = loaded(tmp_path / "a.safetensors", train=True)
    assert notes == ["its head is not one of these classes; a new one is trained"]


def test_another_structure_is_told_by_its_settings(tmp_path: Path) -> None:
    theirs = weights(depth=3, head_dim=24, mlp_ratio=4.0, qkv_bias=False, reg_tokens=2, global_pool="avg")
    save_file(theirs, tmp_path / "a.safetensors")
    with pytest.raises(models.ModelError) as caught:
        loaded(tmp_path / "a.safetensors")
    said = str(caught.value)
    for line in (
        "the checkpoint has depth 3, the model 2: depth in model.create",
        "the checkpoint has mlp_ratio 4.0, the model 2.0: mlp_ratio in model.create",
        "the checkpoint has qkv_bias False, the model True: qkv_bias in model.options",
        "the checkpoint has queries, keys and values (heads times head_dim) 48, the model 32: heads in model.create, head_dim",
        "the checkpoint has reg_tokens 2, the model 0: registers in model.create",
        "the checkpoint has norm after pooling (global_pool: avg) True",
    ):
        assert line in said, line


def test_a_class_in_a_pickle_is_named_and_not_made(tmp_path: Path) -> None:
    import argparse

    torch.save({"model": weights(), "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    with pytest.raises(models.ModelError) as caught:
        loaded(tmp_path / "a.pth")
    assert "argparse.Namespace" in str(caught.value)
    assert "Re-running" not in str(caught.value)
