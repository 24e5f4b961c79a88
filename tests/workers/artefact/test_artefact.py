"""Artefacts: what is saved comes back bit for bit, for every technique and allowed pair, here and in another process; damage and
foreign versions are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests import threads
from tests.places import ROOT
from tests.workers.techniques.test_contract import SAMPLES
from workers import artefact, models
from workers.node.storage import open_storage
from workers.tasks import TaskInfo
from workers.techniques import registry
from workers.techniques.composition import legal_orders
from workers.techniques.record import Surroundings, make_config

DATA = TaskInfo(num_classes=10, in_chans=1, image_size=8, class_names=tuple("0123456789"))
MODEL = {
    "family": "timm",
    "name": None,
    "create": {"patch_size": 1, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "reg_tokens": 1},
}
Chain = tuple[tuple[str, dict[str, Any]], ...]

VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in SAMPLES if name != "linformer"),  # whose 256 rows are for longer sequences
    *SAMPLES.items(),
    ("precision", {"dtype": "fp16"}),
    ("dynamic_int8", {"granularity": "per_tensor", "skip_head": True}),
    ("weight_only", {"bits": 8, "kernel": "packed"}),
    ("weight_only", {"bits": 4, "kernel": "packed", "group_size": 64}),
)
"""Every technique for image models with its defaults, with what the contract tests use, and with the kernels that neither names."""


def chains() -> Iterator[Chain]:
    yield ()
    yield from ((one,) for one in VARIANTS)
    for pair in combinations(SAMPLES, 2):
        for order in legal_orders(pair):
            yield tuple((name, SAMPLES[name]) for name in order)
    packed = ("weight_only", {"kernel": "packed"})
    yield (("precision", {}), packed)
    yield (("magnitude_prune", {}), ("tome", {"r": 3}), ("dynamic_int8", {}))
    yield (("distill", {"width": 0.5}), ("magnitude_prune", {}), ("nystrom", {"landmarks": 8}), packed)


CHAINS = list(chains())
NAMES = ["+".join(f"{n}{tuple(c.values())}" for n, c in chain) or "baseline" for chain in CHAINS]
BATCHES = (6, 1)


one_thread = threads.one_thread
"""The bits are compared at several numbers of threads in test_parity.py."""


def build() -> nn.Module:
    torch.manual_seed(0)
    return models.build(MODEL, DATA).eval()


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(images(batch)) for batch in BATCHES]


def surroundings() -> Surroundings:
    labels = torch.arange(4)
    return Surroundings(
        device=torch.device("cpu"),
        seed=0,
        generator=torch.Generator().manual_seed(0),
        batches=lambda: iter([(images(), labels)]),
        teacher=build,
    )


def compress(*chain: tuple[str, dict[str, Any]]) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Applies techniques as the stages do, without the recovery training."""
    model, steps = build(), []
    for name, config in chain:
        technique = registry()[name]
        applied = technique.apply(model, make_config(technique.Config, config), surroundings())
        model = applied.model
        steps.append({"technique": name, "version": technique.version, "resolved": applied.resolved})
    return model.eval(), steps


def save(model: nn.Module, path: Path, steps: list[dict[str, Any]]) -> None:
    description = models.describe(MODEL, DATA)
    artefact.save(model, path, model_description=description, steps=steps, extra={"mean": [0.5]})


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for :func:`saved`; the tests leave what is in it as it is."""
    return tmp_path_factory.mktemp("every") / "artefacts"


@cache
def saved(artefacts: Path, number: int) -> tuple[nn.Module, list[dict[str, Any]], Path]:
    """Saves the chain of that number, once; returns its model, its steps and its folder."""
    model, steps = compress(*CHAINS[number])
    folder = artefacts / f"{number:03}"
    save(model, folder, steps)
    return model, steps, folder


@pytest.mark.parametrize("number", range(len(CHAINS)), ids=NAMES)
def test_a_loaded_model_is_bit_exact(number: int, artefacts: Path) -> None:
    model, steps, folder = saved(artefacts, number)
    loaded = artefact.load(folder)
    for expected, found in zip(logits(model), logits(loaded), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(expected, found)
    assert not any(part.training for part in loaded.modules())
    again = artefact.pack(loaded, model_description=models.describe(MODEL, DATA), steps=steps, extra={"mean": [0.5]})
    assert again[artefact.TENSORS] == (folder / artefact.TENSORS).read_bytes()


LOAD_ALL = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from workers import artefact
torch.set_num_threads(int(sys.argv[1]))
images = load_file("images.safetensors")
for folder in sorted(Path(sys.argv[2]).iterdir()):
    model = artefact.load(folder)
    with torch.inference_mode():
        save_file({k: model(x) for k, x in images.items()}, f"{folder.name}.safetensors")
print([m for m in ("ray", "optuna", "orchestrator", "pyarrow", "workers.stages") if m in sys.modules])
"""


@pytest.mark.timeout(600)  # a minute on a quiet machine
def test_another_process_loads_every_artefact_without_the_study_and_gets_the_same_bits(
    artefacts: Path, tmp_path: Path
) -> None:
    expected = {number: logits(saved(artefacts, number)[0]) for number in range(len(CHAINS))}
    save_file({str(batch): images(batch) for batch in BATCHES}, tmp_path / "images.safetensors")
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-c", LOAD_ALL, threads, str(artefacts)]
    root = str(ROOT)
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
    for number, name in enumerate(NAMES):
        found = load_file(tmp_path / f"{number:03}.safetensors")
        for batch, tensor in zip(BATCHES, expected[number], strict=True):
            assert torch.equal(found[str(batch)], tensor), name


def test_loading_never_draws_random_numbers_and_takes_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps = compress(("weight_only", {"bits": 4}))
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
    model, steps = compress(("precision", {"dtype": "fp16"}))
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
    model, steps = compress(("precision", {"dtype": "fp16"}))
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
