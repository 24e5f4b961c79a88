"""Artefacts: what is saved comes back bit for bit, for every technique; damage and foreign versions are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from workers import artefact, models
from workers.storage import open_storage
from workers.tasks import TaskInfo
from workers.techniques import registry
from workers.techniques.record import Surroundings, make_config

DATA = TaskInfo(num_classes=10, in_chans=1, image_size=8, class_names=tuple("0123456789"))
MODEL = {
    "family": "timm",
    "name": None,
    "create": {"patch_size": 1, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "reg_tokens": 1},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "weight_only": {"bits": 4, "group_size": 64},
    "precision": {"dtype": "fp16"},
}
CHAINS = [
    *[(name,) for name in registry()],
    ("precision", "weight_only"),
    ("weight_only", "precision"),
    ("precision", "dynamic_int8"),
    ("tome", "weight_only"),
    ("tome", "precision"),
    ("nystrom", "dynamic_int8"),
    ("magnitude_prune", "weight_only"),
    ("magnitude_prune", "tome", "dynamic_int8"),
    ("distill", "magnitude_prune", "weight_only"),
]


def build() -> nn.Module:
    torch.manual_seed(0)
    return models.build(MODEL, DATA).eval()


def images() -> torch.Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def surroundings() -> Surroundings:
    labels = torch.arange(4)
    return Surroundings(
        device=torch.device("cpu"),
        seed=0,
        generator=torch.Generator().manual_seed(0),
        batches=lambda: iter([(images(), labels)]),
        teacher=build,
    )


def compress(names: tuple[str, ...]) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Applies techniques with their defaults (or CONFIGS), as the stages do, without the recovery training."""
    model, steps = build(), []
    for name in names:
        technique = registry()[name]
        config = make_config(technique.Config, CONFIGS.get(name, {}))
        applied = technique.apply(model, config, surroundings())
        model = applied.model
        steps.append({"technique": name, "version": technique.version, "resolved": applied.resolved})
    return model.eval(), steps


def save(model: nn.Module, path: Path, steps: list[dict[str, Any]]) -> None:
    description = models.describe(MODEL, DATA)
    artefact.save(model, path, model_description=description, steps=steps, extra={"mean": [0.5]})


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_kernels_are_bit_exact_after_loading(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "weight_only", {"bits": bits, "kernel": "packed"})
    model, steps = compress(("precision", "weight_only"))
    save(model, tmp_path, steps)
    with torch.inference_mode():
        assert torch.equal(artefact.load(tmp_path)(images()), model(images()))


@pytest.mark.parametrize("names", CHAINS, ids="+".join)
def test_loaded_model_is_bit_exact(names: tuple[str, ...], tmp_path: Path) -> None:
    model, steps = compress(names)
    save(model, tmp_path / "a", steps)
    loaded = artefact.load(tmp_path / "a")
    with torch.inference_mode():
        expected, found = model(images()), loaded(images())
    assert found.dtype == torch.float32
    assert torch.equal(expected, found)
    assert not any(part.training for part in loaded.modules())
    again = artefact.pack(loaded, model_description=models.describe(MODEL, DATA), steps=steps, extra={"mean": [0.5]})
    assert again[artefact.TENSORS] == (tmp_path / "a" / artefact.TENSORS).read_bytes()


def test_loading_never_draws_random_numbers_and_takes_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps = compress(("weight_only",))
    save(model, tmp_path, steps)
    state = torch.get_rng_state()
    seen: list[nn.Module] = []
    skeleton = models.skeleton

    def watched(description: Any) -> nn.Module:
        seen.append(skeleton(description))
        return seen[-1]

    monkeypatch.setattr(models, "skeleton", watched)
    loaded = artefact.load(tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert seen == [loaded]
    assert not [n for n, p in loaded.named_parameters() if n.endswith("qkv.weight")]


def test_the_empty_recipe_can_still_be_trained_after_loading(tmp_path: Path) -> None:
    save(build(), tmp_path, [])
    loaded = artefact.load(tmp_path)
    loaded(images()).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_size_manifest_and_order_of_writing(tmp_path: Path) -> None:
    save(build(), tmp_path, [])
    files = [tmp_path / artefact.TENSORS, tmp_path / artefact.MANIFEST]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert artefact.size_bytes(tmp_path) == sum(f.stat().st_size for f in files)
    assert artefact.manifest(tmp_path)["extra"] == {"mean": [0.5]}
    written: list[str] = []

    class Recorder:
        def put_atomic(self, name: str, data: bytes) -> None:
            written.append(name)

    packed = artefact.pack(build(), model_description=models.describe(MODEL, DATA), steps=[])
    recorder: Any = Recorder()
    artefact.save_to(recorder, "stages/k", packed)
    assert written == ["stages/k/model.safetensors", "stages/k/manifest.json"]


def test_a_storage_url_works_like_a_folder() -> None:
    model, steps = compress(("precision",))
    files = artefact.pack(model, model_description=models.describe(MODEL, DATA), steps=steps)
    artefact.save_to(open_storage("memory://artefacts"), "stages/k", files)
    loaded = artefact.load("memory://artefacts/stages/k")
    assert torch.equal(loaded(images()), model(images()))


class Odd(nn.Module):
    """Tied tensors, a view, an empty tensor, a 0-d one and a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        whole = torch.arange(12.0).view(4, 3)
        self.register_buffer("view", whole[1:3])
        self.register_buffer("strided", whole.t())
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("scalar", torch.tensor(7))
        self.register_buffer("constant", torch.tensor([1.0, 2.0]), persistent=False)


def test_tied_tensors_views_and_non_persistent_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd()
    artefact.save(model, tmp_path, model_description={}, steps=[])
    assert artefact.manifest(tmp_path)["aliases"] == {"b.weight": "a.weight"}

    def skeleton(description: Any) -> nn.Module:
        return Odd().to("meta")

    monkeypatch.setattr(models, "skeleton", skeleton)
    loaded: Any = artefact.load(tmp_path)
    for name, tensor in [*model.state_dict().items(), ("constant", model.constant)]:
        owner, _, leaf = name.rpartition(".")
        assert torch.equal(getattr(loaded.get_submodule(owner), leaf), tensor)
    assert loaded.a.weight.data_ptr() == loaded.b.weight.data_ptr()
    assert "constant" not in loaded.state_dict()


def edit(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, **changes}))


def test_damage_is_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    model, steps = compress(("precision",))
    tensors, manifest = tmp_path / artefact.TENSORS, tmp_path / artefact.MANIFEST

    def fails(words: str) -> None:
        with pytest.raises(artefact.ArtefactError, match=words):
            artefact.load(tmp_path)
        save(model, tmp_path, steps)

    fails(r"no manifest\.json")
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-1])
    fails(r"model\.safetensors has .* truncated")
    tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    fails(r"model\.safetensors is not what was saved")
    tensors.unlink()
    fails(r"model\.safetensors is absent")
    manifest.write_bytes(manifest.read_bytes()[:-9])
    fails(r"manifest\.json is damaged")
    manifest.write_text("{}")
    fails(r"manifest\.json is damaged")
    edit(manifest, schema=artefact.SCHEMA + 1)
    fails("schema 2, this version reads 1")
    edit(manifest, model={"family": "timm"})
    fails(r"manifest\.json makes no model")
    edit(manifest, steps=[{**steps[0], "version": 99}])
    fails("version 99 of precision, this is version 1")
    edit(manifest, steps=[{**steps[0], "technique": "none"}])
    fails("'none' is not known")
    edit(manifest, steps=[{"technique": "weight_only", "version": 1, "resolved": {}}])
    fails(r"manifest\.json makes no model")
    description = models.describe({**MODEL, "create": {**MODEL["create"], "depth": 2}}, DATA)
    edit(manifest, model=description)
    fails(r"model\.safetensors does not fit")
    artefact.load(tmp_path)


def test_a_model_without_values_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(artefact.ArtefactError, match="meta"):
        save(models.skeleton(models.describe(MODEL, DATA)), tmp_path, [])
