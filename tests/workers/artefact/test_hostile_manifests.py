"""Manifests that anyone may have written: whatever they say, loading one makes the model or says what is wrong, and opens nothing."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.artefact.test_artefact import compress, save
from workers import artefact
from workers.techniques.contract.models import JOINT, VARIANTS, build, describe

CHAINS = (
    (("taylor_prune", {}), ("tome", {"r": 3}), ("dynamic_int8", {})),
    (("distill", {"width": 0.5}), ("magnitude_prune", {}), ("nystrom", {"landmarks": 8}), ("weight_only", {})),
    (("importance_prune", {}), ("evit", {})),
    (("svd", {"keep": 0.5}), ("lsq", {})),
    (("scatterbrain", {}), ("gptq", {})),
    (("resolution", {"ratio": 0.75}), ("precision", {})),
)
"""Recipes whose manifests hold most kinds of resolved values."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 10**9, 10**18, 10**400, 1.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "/etc/passwd", "../../x", "hf-hub:a/b", "local-dir:/etc", "head", "blocks.99.attn", "\x1b[2J"),
    *([], [0], [[0]], [10**9], {}, {"a": 1}),
)


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the ways to every value inside ``value``."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inside:
        yield (*way, key)
        yield from places(below, (*way, key))


def mutated(manifest: dict[str, Any], draw: random.Random) -> tuple[dict[str, Any], str]:
    """Returns a copy with one value gone, doubled, moved or odd, and what was done to it."""
    manifest = copy.deepcopy(manifest)
    *way, key = draw.choice([way for way in places(manifest) if way[0] != "extra"])
    holder: Any = manifest
    for step in way:
        holder = holder[step]
    how, value = draw.choice(("gone", "moved", "doubled", "odd", "odd", "odd")), holder[key]
    if how == "gone":
        del holder[key]
    elif how == "doubled" and isinstance(value, list):
        holder[key] = value * 2
    elif how == "moved" and isinstance(value, int):
        holder[key] = value + draw.choice((-1, 1, 7, 1000))
    else:
        holder[key] = draw.choice(ODD)
    return manifest, f"{how} {[*way, key]}: {holder.get(key) if isinstance(holder, dict) else holder!r}"


def fuzz(folder: Path, seed: int, times: int) -> int:
    """Loads ``folder`` under mutated manifests; returns how many of them were refused."""
    manifest, refused = json.loads((folder / artefact.MANIFEST).read_text()), 0
    draw = random.Random(seed)
    for _ in range(times):
        found, what = mutated(manifest, draw)
        (folder / artefact.MANIFEST).write_text(json.dumps(found))
        said = None
        try:
            assert not any(t.is_meta for t in artefact.load(folder).state_dict().values())
        except artefact.ArtefactError as error:
            said = str(error)
        except Exception as error:
            raise AssertionError(what) from error
        refused += said is not None
        assert said is None or str(folder) in said, what
    (folder / artefact.MANIFEST).write_text(json.dumps(manifest))
    artefact.load(folder)
    return refused


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("number", range(len(CHAINS)))
def test_a_mutated_manifest_makes_a_model_or_is_refused(number: int, tmp_path: Path) -> None:
    model, steps = compress(*CHAINS[number])
    save(model, tmp_path, steps)
    assert fuzz(tmp_path, seed=number, times=30) > 15


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("variant", [*VARIANTS, *JOINT, *map(str, range(len(CHAINS)))])
def test_many_mutated_manifests(variant: str, tmp_path: Path) -> None:
    if variant.isdigit():
        model, steps = compress(*CHAINS[int(variant)])
        save(model, tmp_path, steps)
    else:
        artefact.save(build(variant), tmp_path, model_description=describe(variant), steps=[])
    fuzz(tmp_path, seed=1, times=400)


class Bomb:
    """Its unpickling would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    "key",
    [
        "checkpoint_path",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "cache_dir",
        "pretrained",
        "features_only",
        "device",
    ],
)
@pytest.mark.parametrize("name", [None, "vit_tiny_patch16_224"])
def test_nothing_but_structure_reaches_timm(name: str | None, key: str, tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "bomb.pth")
    save(compress()[0], tmp_path / "a", [])
    path = tmp_path / "a" / artefact.MANIFEST
    found = json.loads(path.read_text())
    create = {**found["model"]["create"], key: str(tmp_path / "bomb.pth")}
    path.write_text(json.dumps({**found, "model": {"family": "timm", "name": name, "create": create}}))
    with pytest.raises(artefact.ArtefactError, match=rf"makes no model.*model\.create\.{key} is no setting of timm"):
        artefact.load(tmp_path / "a")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("model", "create", "embed_dim"), 10**9, "embed_dim must be at most 65,536"),
        (("model", "create", "depth"), 10**9, "depth must be at most 256"),
        (("model", "create", "reg_tokens"), -1, "reg_tokens must not be negative"),
        (("model", "name"), "local-dir:/etc", "timm has no model"),
        (("steps", 0, "resolved", "hidden"), [10**9] * 3, r"resolved has 1000000000, but model.safetensors has"),
        (("tensors", "file"), "../b/model.safetensors", "tensors.file must be model.safetensors"),
        (("tensors",), [], "tensors must be dict"),
        (("aliases",), {"head.bias": "nothing"}, r"aliases\.head\.bias names no tensor"),
        (("aliases",), {"head.bias": 3}, r"aliases\.head\.bias must name a tensor, got 3"),
        (("steps", 0), "tome", r"steps\[0\] must be a mapping"),
        (("schema",), True, "has schema True"),
    ],
)
def test_what_a_manifest_says_is_refused_by_name(where: tuple[Any, ...], value: Any, said: str, tmp_path: Path) -> None:
    model, steps = compress(("magnitude_prune", {}))
    save(model, tmp_path, steps)
    found = json.loads((tmp_path / artefact.MANIFEST).read_text())
    holder: Any = found
    for step in where[:-1]:
        holder = holder[step]
    holder[where[-1]] = value
    (tmp_path / artefact.MANIFEST).write_text(json.dumps(found))
    with pytest.raises(artefact.ArtefactError, match=said):
        artefact.load(tmp_path)
