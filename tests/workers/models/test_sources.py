"""Names that are folders: timm's own, local and of the hub, whose cache is filled by hand since there is no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from timm.models import save_for_hf

from tests import foreign_vits as foreign
from tests.workers.models.test_foreign_weights import DATA, logits
from workers import models
from workers.models import sources

SIZES: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "num_heads": 2,
    "depth": 2,
    "num_classes": 10,
}
COMMIT = "1f2e3d4c5b6a79881726354453627180ffeeddcc"


def saved(folder: Path, name: str = "vit_tiny_patch16_224", **more: Any) -> torch.nn.Module:
    """Saves a model of timm's as timm does and returns it."""
    model = foreign.drawn(timm.create_model(name, **{**SIZES, **more}))
    save_for_hf(model, str(folder), model_args={**SIZES, **more}, safe_serialization=True)
    return model


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of a repository ``someone/vit`` in a cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--vit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def section(name: str, **more: Any) -> dict[str, Any]:
    return {
        "family": "timm",
        "name": name,
        "pretrained": True,
        "checkpoint": None,
        "create": {},
        "train": False,
        **more,
    }


@pytest.mark.parametrize("more", [{}, {"qkv_bias": False, "reg_tokens": 2, "global_pool": "avg"}])
def test_a_folder_that_timm_wrote_is_a_name(tmp_path: Path, more: dict[str, Any]) -> None:
    theirs = saved(tmp_path, **more)
    asked, origin = sources.resolve(section(f"local-dir:{tmp_path}"))
    assert (asked["name"], asked["checkpoint"], asked["pretrained"]) == ("vit_tiny_patch16_224", str(tmp_path), False)
    assert origin.mean == (0.5, 0.5, 0.5)
    assert models.loading_notes(asked, DATA) == []
    torch.testing.assert_close(logits(models.build(asked, DATA)), logits(theirs), atol=0, rtol=0)
    bare, _ = sources.resolve(section(f"local-dir:{tmp_path}", pretrained=False))
    assert bare["checkpoint"] is None


def test_a_repository_of_the_hub_is_pinned_to_the_commit_that_was_found(hub: Path) -> None:
    theirs = saved(hub)
    asked, _ = sources.resolve(section("hf-hub:someone/vit"))
    assert asked["checkpoint"] == f"hf-hub:someone/vit@{COMMIT}"
    assert models.checkpoint_digest(asked["checkpoint"]) == models.checkpoint_digest(hub)
    torch.testing.assert_close(logits(models.build(asked, DATA)), logits(theirs), atol=0, rtol=0)


def test_a_repository_may_be_a_checkpoint_of_transformers(hub: Path) -> None:
    theirs = foreign.transformers_vit("ViTForImageClassification")
    theirs.save_pretrained(hub)
    asked, _ = sources.resolve({"family": "hf_vit", "checkpoint": "hf-hub:someone/vit", "train": False})
    assert asked["checkpoint"] == f"hf-hub:someone/vit@{COMMIT}"
    torch.testing.assert_close(logits(models.build(asked, DATA)), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("hub")
def test_a_repository_that_cannot_be_had_says_what_to_do() -> None:
    with pytest.raises(models.ModelError, match=r"hf-hub:someone/other: could not be fetched .* model\.checkpoint"):
        sources.resolve(section("hf-hub:someone/other"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "must be JSON"),
        ("[]", "must be a mapping"),
        ("[" * 200_000, "must be JSON"),
        ('{"model_type": "vit"}', r"use model\.family: hf_vit"),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": [1]}', "must have the architecture"),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 0}}', "depth must be at least 1"),
        ('{"architecture": "x", "model_args": {"checkpoint_path": "/etc/passwd"}}', "checkpoint_path is no setting"),
        ('{"architecture": "x", "model_args": {"norm_layer": "os.system"}}', "norm_layer is no setting"),
    ],
)
def test_a_config_is_judged_like_a_study(tmp_path: Path, config: str, said: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(models.ModelError, match=said):
        sources.resolve(section(f"local-dir:{tmp_path}"))


def test_an_architecture_that_is_a_folder_is_not_followed(tmp_path: Path) -> None:
    saved(tmp_path / "inner")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": f"local-dir:{tmp_path / 'inner'}"}))
    asked, _ = sources.resolve(section(f"local-dir:{tmp_path}", pretrained=False))
    with pytest.raises(models.ModelError, match="timm has no model"):
        models.build(asked, DATA)


@pytest.mark.parametrize(
    ("theirs", "ours", "rows"),
    [
        ("abc", "abc", None),
        ("cab", "abc", [1, 2, 0]),
        ("ABC", "cba", [2, 1, 0]),
        ("abd", "abc", None),
        ("aab", "aba", None),
        ("abcd", "abc", None),
    ],
)
def test_rows_of_a_head_by_the_names_of_classes(theirs: str, ours: str, rows: list[int] | None) -> None:
    assert sources.head_rows(theirs, ours) == rows
