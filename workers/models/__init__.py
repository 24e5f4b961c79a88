"""Models by family: build one, load its weights, describe its structure, and build that structure without weights.

A model is given by the ``model`` section of a study: ``family``, ``name`` (None: built from ``create``),
``pretrained``, ``checkpoint``, ``create``. Class count, channels and image size come from the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from workers.models import timm_vit
from workers.models.timm_vit import ModelError
from workers.techniques.record import ModelInfo

if TYPE_CHECKING:
    from workers.tasks import TaskInfo

__all__ = ["ModelError", "build", "checkpoint_digest", "describe", "load_checkpoint_", "model_info", "skeleton"]

_FAMILIES = {"timm": timm_vit}
_NAMES_SHOWN = 5
_WRAPPERS = ("state_dict", "model", "model_state_dict")


def _family(name: object) -> Any:
    if name not in _FAMILIES:
        raise ModelError(f"model.family must be one of {', '.join(_FAMILIES)}, got {name!r}")
    return _FAMILIES[str(name)]


def describe(model: Mapping[str, Any], data: TaskInfo) -> dict[str, Any]:
    """Returns the plain values that say what the model's structure is: ``family``, ``name`` and complete ``create``.

    No weights, no locations, nothing of the data besides class count, channels and image size.

    Raises:
        ModelError: for a family that is not known, or ``create`` values that contradict the data.
    """
    return _family(model.get("family", "timm")).describe(model, data)  # type: ignore[no-any-return]


def skeleton(description: Mapping[str, Any]) -> nn.Module:
    """Builds the structure that :func:`describe` described on the meta device: shapes without weights, eval mode."""
    module: nn.Module = _family(description.get("family")).create(description, device="meta")
    return module.eval()


def build(model: Mapping[str, Any], data: TaskInfo, *, device: str = "cpu") -> nn.Module:
    """Builds the model: weights of its checkpoint, pretrained ones, or random ones.

    Random ones come from torch's global generator: seed it first.

    Args:
        model: model section of the study.
        data: class count, channels and image size.
        device: where the module lies; ``meta`` gives the structure alone.

    Raises:
        ModelError: for a description that makes no model, or weights that cannot be had or do not fit.
    """
    description = describe(model, data)
    if device == "meta":
        return skeleton(description)
    pretrained = bool(model.get("pretrained")) and not model.get("checkpoint")
    module: nn.Module = _family(description["family"]).create(description, pretrained=pretrained)
    if model.get("checkpoint"):
        load_checkpoint_(module, model["checkpoint"])
    return module.to(device)


def model_info(module: nn.Module, device: str = "cpu") -> ModelInfo:
    """Returns the facts that techniques judge by, read from the module itself, so that they hold after pruning."""
    return timm_vit.model_info(module, device)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_digest(path: str | Path) -> str:
    """Returns the SHA-256 of the checkpoint's bytes in hexadecimal.

    Raises:
        ModelError: if the file cannot be read.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"checkpoint {path}: cannot be read: {error.strerror or error}") from error


def load_checkpoint_(module: nn.Module, path: str | Path) -> None:
    """Loads weights into ``module`` in place: ``.safetensors``, or ``.pth``/``.pt``/``.bin`` that holds tensors only.

    A dict that wraps them as ``state_dict``, ``model`` or ``model_state_dict`` is unwrapped. Every key must match.

    Raises:
        ModelError: the file is unreadable, holds pickled code, or its names or shapes are not those of the model. The
            module is then unchanged.
    """
    weights = _read_weights(Path(path).expanduser())
    faults = _mismatches(module.state_dict(), weights)
    if faults:
        raise ModelError(f"checkpoint {path} does not fit the model: " + "; ".join(faults))
    module.load_state_dict(weights)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by name; no code in the file is ever run."""
    if not path.is_file():
        raise ModelError(f"checkpoint {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file raises anything
        raise ModelError(
            f"checkpoint {path}: refused: it is damaged, or holds more than tensors, and reading that could run code; save "
            f"the state dict alone, best as .safetensors ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        ) from error
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"checkpoint {path}: must hold a state dict, names to tensors; save model.state_dict()")
    return content


def _mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Returns every way in which the names and shapes of ``found`` differ from ``expected``."""
    shapes = [
        f"{k} is {tuple(found[k].shape)}, the model has {tuple(expected[k].shape)}"
        for k in expected
        if k in found and found[k].shape != expected[k].shape
    ]
    kinds = {
        "missing": [k for k in expected if k not in found],
        "unexpected": [k for k in found if k not in expected],
        "wrong shape": shapes,
    }
    return [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names]


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
