"""Weights of a local file or of a downloaded model's folder, read without running any code that it holds."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from workers.models.timm_vit import ModelError

HUB = "hf-hub:"
"""Begins the name of a repository on the Hugging Face hub, as timm writes it: ``hf-hub:owner/name``, ``@revision`` behind it."""

_FILES = ("model.safetensors", "pytorch_model.bin")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_NAMES_SHOWN = 5


def located(checkpoint: str | Path) -> Path:
    """Returns the file or folder of a checkpoint; a repository of the hub is downloaded once and lies in its cache.

    Raises:
        ModelError: the hub cannot be reached and its cache does not have it.
    """
    if not str(checkpoint).startswith(HUB):
        return Path(checkpoint).expanduser()
    from huggingface_hub import snapshot_download  # which no local file needs

    repository, _, revision = str(checkpoint).removeprefix(HUB).partition("@")
    try:
        fetch = partial(snapshot_download, repository, revision=revision or None)
        folder = Path(fetch(allow_patterns=["*config.json", "model*.safetensors", _INDICES[0]]))
        if not ((folder / _INDICES[0]).is_file() or (folder / _FILES[0]).is_file()):
            folder = Path(fetch(allow_patterns=["*config.json", "pytorch_model*.bin", _INDICES[1]]))
    except (OSError, ValueError) as error:  # the hub's own errors are both
        raise ModelError(
            f"{checkpoint}: could not be fetched ({str(error).splitlines()[0]}); connect to the network, fill the Hugging "
            "Face cache (HF_HOME), or give model.checkpoint a local file or folder"
        ) from error
    return folder


def read_tensors(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """Returns the tensors of :func:`read` without what is to be said of them."""
    return read(path, key)[0]


def read(path: str | Path, key: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """Returns tensors by name, on the CPU, mapped from the file where its format allows; and which of several were taken.

    Args:
        path: ``.safetensors``, or ``.ckpt``/``.pth``/``.pt``/``.bin`` that hold tensors and plain values only, with the
            state dict at the top, under ``state_dict``, ``model`` or ``model_state_dict``, or under the only key that has
            one; or a folder with ``model.safetensors`` or ``pytorch_model.bin`` (one file or shards with their index); or
            a repository of the hub, see :func:`located`.
        key: where in the file: keys with dots between them, or what names begin with.

    Raises:
        ModelError: nothing there, damaged, values that are no numbers, or reading it could run code.
    """
    path = located(path)
    found: dict[str, Tensor] = {}
    notes: list[str] = []
    for file in files(path):
        content, said = _chosen(_content(file), key, file)
        if twice := [name for name in content if name in found]:
            raise ModelError(f"weights {path}: must name each tensor once, {some(twice)} lies in two files")
        found |= content
        notes += said
    spoilt = [n for n, t in found.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if spoilt:
        raise ModelError(
            f"weights {path}: must be finite numbers: {len(spoilt)} tensors hold NaN or infinity: {some(spoilt)}; take an "
            "earlier state of that training"
        )
    return found, list(dict.fromkeys(notes))


def files(path: Path) -> list[Path]:
    """Returns the files in which the weights of :func:`read` lie: the file itself, those of a folder, or those of an index.

    Raises:
        ModelError: there are none, or an index is damaged or points outside of its folder.
    """
    if path.is_dir():
        found = [path / name for name in (_INDICES[0], _FILES[0], _INDICES[1], _FILES[1]) if (path / name).is_file()]
        if not found:
            raise ModelError(f"weights {path}: the folder must hold {' or '.join(_FILES)}")
        path = found[0]
    if not path.is_file():
        raise ModelError(f"weights {path}: there is no such file or folder")
    return [path.parent / shard for shard in _shards(path)] if path.name.endswith(".index.json") else [path]


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"weights {index}: the index is damaged: {error!r}") from error
    if outside:
        raise ModelError(f"weights {index}: shards must lie in the same folder, got {', '.join(outside)}")
    return sorted(names)


def _content(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"weights {path}: there is no such file or folder")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile file raises anything
        raise ModelError(
            f"weights {path}: refused: damaged, or more than tensors and plain values, and reading that could run code; save "
            f"the state dict alone, best as .safetensors ({type(error).__name__}: {_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """Returns the line of an error that says why; torch's first one advises to run the code."""
    lines = str(error).strip().splitlines() or [""]
    why = next((line for line in lines if "Unsupported" in line), lines[0])
    return why.strip().partition(" Please ")[0]


def _chosen(content: Any, key: str | None, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the state dict of a file's content, and which it is where there are others."""
    content, taken = _under(content, key.split(".") if key else [], path)
    notes = []
    while isinstance(content, dict) and not _is_state_dict(content):
        inside = [str(name) for name, part in content.items() if isinstance(part, dict) and _holds_one(part)]
        wrapper = next((name for name in _WRAPPERS if name in inside), inside[0] if len(inside) == 1 else None)
        if wrapper is None:
            break
        taken.append(wrapper)
        if len(inside) > 1:
            others = ", ".join(name for name in inside if name != wrapper)
            notes.append(
                f"the weights under {'.'.join(taken)} are taken; model.checkpoint_key chooses others: {others}"
            )
        content = content[wrapper]
    if not _is_state_dict(content):
        inside = (
            [n for n, v in content.items() if isinstance(v, dict) and _holds_one(v)]
            if isinstance(content, dict)
            else []
        )
        remedy = (
            f"set model.checkpoint_key to one of {', '.join(map(str, inside))}" if inside else "save model.state_dict()"
        )
        raise ModelError(f"weights {path}: must hold a state dict, names to tensors; {remedy}")
    return content, notes


def _under(content: Any, keys: list[str], path: Path) -> tuple[Any, list[str]]:
    """Goes into ``content`` by ``keys``; those left at the tensors begin their names."""
    taken = list[str]()
    while keys and isinstance(content, dict) and isinstance(content.get(keys[0]), dict):
        content, taken, keys = content[keys[0]], [*taken, keys[0]], keys[1:]
    if not keys:
        return content, taken
    prefix = ".".join(keys) + "."
    known = list(map(str, content)) if isinstance(content, dict) else []
    found = {str(n).removeprefix(prefix): v for n, v in content.items() if str(n).startswith(prefix)} if known else {}
    if not found:
        names = list(dict.fromkeys(name.partition(".")[0] for name in known))
        raise ModelError(
            f"model.checkpoint_key: nothing lies under {'.'.join([*taken, *keys])} in {path}; there are {some(names)}"
        )
    return found, [*taken, *keys]


def _is_state_dict(content: Any) -> bool:
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(n, str) and isinstance(v, Tensor) for n, v in content.items())


def _holds_one(content: dict[Any, Any]) -> bool:
    """Returns whether a dict is a state dict or wraps one."""
    return _is_state_dict(content) or any(_is_state_dict(part) for part in content.values() if isinstance(part, dict))


def fit_(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Loads ``weights`` into ``module`` in place, every name and shape matching; the module is unchanged otherwise.

    Buffers that a state dict leaves out, as an artefact does not, are what the module has.

    Raises:
        ModelError: names what is missing, unexpected and of another shape.
    """
    expected = module.state_dict()
    derived = {name for name, _ in module.named_buffers()} - expected.keys()
    weights = {name: tensor for name, tensor in weights.items() if name not in derived}
    kinds = {
        "missing": [k for k in expected if k not in weights],
        "unexpected": [k for k in weights if k not in expected],
        "wrong shape": [
            f"{k} is {tuple(weights[k].shape)}, the model has {tuple(expected[k].shape)}"
            for k in expected
            if k in weights and weights[k].shape != expected[k].shape
        ],
    }
    faults = [f"{len(names)} {kind}: {some(names)}" for kind, names in kinds.items() if names]
    if faults:
        raise ModelError(f"{where} does not fit the model: " + "; ".join(faults))
    module.load_state_dict(weights)


def some(names: list[str], shown: int = _NAMES_SHOWN) -> str:
    """Returns the first names of a list and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
