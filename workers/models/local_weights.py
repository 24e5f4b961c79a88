"""Weights of a local file or of a downloaded model's folder, read without running any code that it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from workers.models.timm_vit import ModelError

_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX = "model.safetensors.index.json"
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_NAMES_SHOWN = 5


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Returns tensors by name, on the CPU.

    Args:
        path: ``.safetensors``, or ``.ckpt``/``.pth``/``.pt``/``.bin`` that hold tensors and plain values only, with the
            state dict at the top or under ``state_dict``, ``model`` or ``model_state_dict``; or a folder with ``model.safetensors`` (one file
            or shards with their index) or ``pytorch_model.bin``.

    Raises:
        ModelError: nothing there, damaged, or reading it could run code.
    """
    path = Path(path).expanduser()
    return {name: tensor for file in files(path) for name, tensor in _read_file(file).items()}


def files(path: Path) -> list[Path]:
    """Returns the files in which the weights of :func:`read_tensors` lie: the file itself, or those of a folder.

    Raises:
        ModelError: there are none, or a folder's index is damaged or points outside of it.
    """
    if path.is_dir():
        if (path / _INDEX).is_file():
            return [path / shard for shard in _shards(path)]
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise ModelError(f"weights {path}: the folder must hold {' or '.join(_FILES)}")
        path = found[0]
    if not path.is_file():
        raise ModelError(f"weights {path}: there is no such file or folder")
    return [path]


def _shards(folder: Path) -> list[str]:
    try:
        names = set(json.loads((folder / _INDEX).read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"weights {folder / _INDEX}: the index is damaged: {error!r}") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(f"weights {folder / _INDEX}: shards must lie in the same folder, got {', '.join(outside)}")
    return sorted(names)


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"weights {path}: there is no such file or folder")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file raises anything
        raise ModelError(
            f"weights {path}: refused: damaged, or more than tensors and plain values, and reading that could run code; save "
            f"the state dict alone, best as .safetensors ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        ) from error
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"weights {path}: must hold a state dict, names to tensors; save model.state_dict()")
    return content


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
