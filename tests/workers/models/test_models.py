"""Models: built by name and by dimensions, described, rebuilt without weights, loaded from checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.places import ROOT
from workers import models
from workers.tasks import TaskInfo

DATA = TaskInfo(num_classes=10, in_chans=1, image_size=8, class_names=tuple("0123456789"))
SMALL = {"patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
NAMED = {"patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}


def section(name: str | None = None, **create: Any) -> dict[str, Any]:
    return {"family": "timm", "name": name, "create": {**(SMALL if name is None else NAMED), **create}}


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        (section(), 1),
        (section(init_values=1e-5, qk_norm=True, reg_tokens=3), 4),
        (section(class_token=False, global_pool="avg"), 0),
        (section("vit_tiny_patch16_224"), 1),
        (section("deit_tiny_distilled_patch16_224"), 2),
    ],
)
def test_build_and_skeleton_have_the_same_structure(model: dict[str, Any], prefix: int) -> None:
    torch.manual_seed(0)
    built = models.build(model, DATA).eval()
    empty = models.skeleton(models.describe(model, DATA))
    assert all(t.is_meta for t in empty.state_dict().values())
    shapes = {k: (v.shape, v.dtype) for k, v in built.state_dict().items()}
    assert shapes == {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()}
    assert all(part.fused_attn for part in built.modules() if hasattr(part, "fused_attn"))
    info = models.model_info(built, "cpu")
    assert (info.depth, info.num_heads, info.num_prefix_tokens) == (2, (2, 2), prefix)
    assert (info.num_tokens, info.patch_size, info.head_dim) == (16 + prefix, 2, 16)
    assert info.has_distil_token == ("distilled" in (model["name"] or ""))
    images = torch.randn(3, 1, 8, 8)
    logits = built(images)
    assert logits.shape == (3, 10)
    empty.load_state_dict(built.state_dict(), assign=True)
    assert torch.equal(empty(images), logits)


FACTS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_224": {"block": "Block", "attention": "Attention", "mlp": "Mlp", "pooling": "token"},
    "vit_base_patch16_siglip_224": {"pooling": "map", "norm_before_pool": True, "norm_after_pool": False},
    "vit_base_patch16_reg4_gap_256": {"pooling": "avg", "norm_before_pool": False, "norm_after_pool": True},
    "vit_base_patch16_rpn_224": {
        "block": "vision_transformer.ResPostBlock",
        "attention": "Attention",
        "post_norm": True,
    },
    "vit_dwee_patch16_reg1_gap_256": {"attention": "diff_attention.DiffAttention", "head_dim": 8},
    "beit_base_patch16_224": {"block": "beit.Block", "attention": "beit.Attention", "has_positions": False},
    "beit3_base_patch16_224": {"has_attn_norm": True, "has_mlp_norm": True},
    "eva02_small_patch14_224": {
        "attention": "eva.EvaAttention",
        "mlp": "GluMlp",
        "mlp_matrices": 3,
        "mlp_hidden": (85, 85),
    },
    "eva02_base_patch14_224": {"mlp": "SwiGLU", "mlp_matrices": 3, "has_mlp_norm": True},
    "eva02_enormous_patch14_clip_224": {"block": "eva.EvaBlockPostNorm", "post_norm": True},
    "vit_small_patch16_dinov3": {"block": "eva.EvaBlock", "num_prefix_tokens": 5, "rope_a_block": False},
    "vit_base_patch16_rope_mixed_224": {"attention": "attention.AttentionRope", "rope_a_block": True},
}


@pytest.mark.parametrize(("name", "facts"), FACTS.items(), ids=FACTS)
def test_what_a_named_model_is_made_of(name: str, facts: dict[str, Any]) -> None:
    info = models.model_info(models.skeleton(models.describe(section(name), DATA)))
    assert {fact: getattr(info, fact) for fact in facts} == facts


def test_what_a_model_does_in_training_and_what_a_technique_put_in_are_told_apart() -> None:
    assert models.model_info(models.build(section(patch_drop_rate=0.5), DATA)).drops_patches
    module: Any = models.build(section(), DATA)
    module.blocks[0].attn.norm = nn.Identity()
    assert not models.model_info(module).has_attn_norm

    class Ours(nn.Module):
        """Stands where timm has an identity."""

    module.blocks[0].attn.norm = Ours()
    assert not models.model_info(module).has_attn_norm
    module.blocks[0].attn.norm = nn.LayerNorm(32)
    assert models.model_info(module).has_attn_norm


@pytest.mark.parametrize("name", ["eva02_small_patch14_224", "beit_base_patch16_224"])
def test_queries_keys_and_values_go_through_their_layer(name: str) -> None:
    """timm would read the weight and pass by whatever a technique put in the layer's place."""
    module: Any = models.build(section(name), DATA).eval()
    images, attn = torch.randn(2, 1, 8, 8), module.blocks[0].attn
    attn.q_bias.data.normal_()
    with torch.no_grad():
        expected = module(images)
        attn.qkv = nn.Sequential(attn.qkv, nn.Identity())
        assert torch.equal(module(images), expected)
        attn.qkv_bias_separate, attn.qkv = False, attn.qkv[0]
        torch.testing.assert_close(module(images), expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_small_patch16_18x2_224", "has blocks of type ParallelThingsBlock; must be plain attention"),
        (
            "vit_relpos_small_patch16_224",
            "is a VisionTransformerRelPos; must be a plain timm VisionTransformer or Eva or Beit",
        ),
        ("vit_small_r26_s32_224", "has a HybridEmbed; must be"),
    ],
)
def test_what_is_no_stack_of_attention_and_mlp_is_refused(name: str, said: str) -> None:
    side = replace(DATA, image_size=224)
    with pytest.raises(models.ModelError, match=said):
        models.skeleton(models.describe({"family": "timm", "name": name, "create": {}}, side))


def test_same_seed_same_weights_and_pos_embed_std() -> None:
    def build(**create: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return models.build(section(**create), DATA).state_dict()

    first, second, wide = build(), build(), build(pos_embed_std=0.5)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert first["pos_embed"].std() < 0.03
    assert 0.4 < wide["pos_embed"].std() < 0.6


def test_model_info_reads_the_module_after_pruning() -> None:
    module: Any = models.build(section(), DATA)
    block = module.blocks[1]
    block.attn.num_heads, block.attn.attn_dim = 1, 16
    block.mlp.fc1, block.mlp.fc2 = torch.nn.Linear(32, 37), torch.nn.Linear(37, 32)
    info = models.model_info(module)
    assert (info.num_heads, info.mlp_hidden) == ((2, 1), (64, 37))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"family": "tim"}, "model.family must be one of timm"),
        (section("vit_tiny_patch16_225"), "nearest: vit_tiny_patch16_224"),
        (section("resnet18"), "resnet18"),
        (section("swin_tiny_patch4_window7_224"), "swin_tiny"),
        (section(num_classes=3), "model.create.num_classes must be the data's num_classes 10, got 3"),
        (section(frobnicate=1), "model.create.frobnicate is no setting of timm"),
        (section(patch_size=3), "image size 8 must be a multiple of the patch size 3"),
        (section(num_heads=5), "refused"),
        ({**section(), "pretrained": True}, "needs model.name"),
    ],
)
def test_a_wrong_description_says_what_is_wrong(model: dict[str, Any], words: str) -> None:
    with pytest.raises(models.ModelError, match=words):
        models.build(model, DATA)


def test_pretrained_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(models.ModelError, match=r"pretrained weights could not be loaded.*model\.checkpoint"):
        models.build({"family": "timm", "name": "vit_tiny_patch16_224", "pretrained": True, "create": {}}, DATA)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", "wrapped.pth"])
def test_checkpoint_gives_the_weights(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    weights = models.build(section(), DATA).state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if "wrapped" in suffix else weights, path)
    loaded = models.build({**section(), "checkpoint": str(path)}, DATA).state_dict()
    assert all(torch.equal(weights[k], loaded[k]) for k in weights)
    assert len(models.checkpoint_digest(path)) == 64


@pytest.mark.parametrize("name", [None, "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("classes", [7, 10])
def test_training_goes_on_from_a_checkpoint_and_other_classes_get_a_new_head(
    tmp_path: Path, name: str | None, classes: int, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    weights = models.build(section(name), replace(DATA, num_classes=classes)).state_dict()
    save_file(weights, tmp_path / "other.safetensors")
    asked = {**section(name), "checkpoint": str(tmp_path / "other.safetensors")}
    torch.manual_seed(1)
    loaded = models.build({**asked, "train": True}, DATA).state_dict()
    torch.manual_seed(1)
    fresh = models.build(section(name), DATA).state_dict()
    heads = {n for n in fresh if n.startswith("head")}
    assert len(heads) == (2 if name is None else 4)
    for n in fresh:
        source = fresh if n in heads and classes == 7 else weights
        assert torch.equal(loaded[n], source[n]), n
    assert ("its head is not one of these classes" in caplog.text) == (classes == 7)
    if classes == 7:
        with pytest.raises(models.ModelError, match=r"head\.weight is \(7, 32\), the model has \(10, 32\)"):
            models.build(asked, DATA)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Evil.trap),)

    trap = Path()


def test_checkpoint_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    Evil.trap = tmp_path / "trap"
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(models.ModelError, match="refused"):
        models.load_checkpoint_(models.build(section(), DATA), tmp_path / "evil.pth")
    assert not Evil.trap.exists()


@pytest.mark.parametrize("name", ["absent.pth", "noise.pth", "noise.safetensors", "short.pth", "list.pth"])
def test_unreadable_checkpoint_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    module = models.build(section(), DATA)
    path = tmp_path / name
    if name.startswith("noise"):
        path.write_bytes(bytes(range(256)) * 9)
    elif name == "short.pth":
        torch.save(module.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-4000])
    elif name == "list.pth":
        torch.save([torch.zeros(2)], path)
    with pytest.raises(models.ModelError, match=name):
        models.load_checkpoint_(module, path)


def test_mismatching_checkpoint_lists_every_kind_of_fault_and_changes_nothing(tmp_path: Path) -> None:
    module = models.build(section(), DATA)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    weights = {k: v + 1 for k, v in before.items()}
    weights["head.weight"] = torch.zeros(7, 32)
    weights["extra"] = weights.pop("norm.bias")
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(models.ModelError) as caught:
        models.load_checkpoint_(module, tmp_path / "other.safetensors")
    text = str(caught.value)
    assert "1 missing: norm.bias" in text
    assert "1 unexpected: extra" in text
    assert "head.weight is (7, 32), the model has (10, 32)" in text
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("family", ["vilt", "meter"])
def test_importing_a_family_says_nothing_and_silences_nothing(family: str) -> None:
    told = "logging.getLogger('torch.utils._pytree').level"
    code = f"import logging, torch; before = {told}; import workers.models.{family}; assert {told} == before"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""


def test_heads_may_be_wider_than_the_width_gives_but_not_where_norms_are_made_for_them() -> None:
    torch.manual_seed(0)
    model: Any = models.build(section(head_dim=24, norm_eps=0.25, act="relu"), DATA).eval()
    info = models.model_info(model)
    assert (info.head_dim, info.num_heads, info.embed_dim) == (24, (2, 2), 32)
    assert model.blocks[0].attn.qkv.weight.shape == (144, 32)
    assert 0.015 < model.blocks[0].attn.qkv.weight.std() < 0.025
    assert {part.eps for part in model.modules() if isinstance(part, torch.nn.LayerNorm)} == {0.25}
    assert type(model.blocks[1].mlp.act) is torch.nn.ReLU
    with pytest.raises(models.ModelError, match="head_dim must be left out"):
        models.build(section(head_dim=24, qk_norm=True), DATA)
