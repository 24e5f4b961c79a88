"""What the checks of :mod:`workers.techniques.contract` share: what is asked, and how they say that something is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.contract.models import build, inputs, surroundings
from workers.techniques.record import Applied, Technique, make_config


@dataclass(frozen=True)
class Subject:
    """What is asked: a technique, a config that changes what a model computes, and a variant of the models.

    Attributes:
        sizes_from_data: what each block keeps is decided on data, so that nobody can tell its dimensions beforehand.
    """

    technique: Technique
    sample: Mapping[str, Any]
    variant: str
    sizes_from_data: bool = False

    def apply(self, values: Mapping[str, Any] | None = None, seed: int = 0) -> Applied:
        """Applies the technique to the variant; without ``values`` with the sample. The model is in eval mode."""
        model = build(self.variant)
        config = make_config(self.technique.Config, self.sample if values is None else values)
        applied = self.technique.apply(model, config, surroundings(model, seed, self.variant))
        applied.model.eval()
        return applied

    def logits(self, model: nn.Module) -> Tensor:
        """(4, classes): what the model says of the contract's inputs."""
        with torch.inference_mode():
            found: Tensor = model(inputs(self.variant))
        return found


Check = Callable[[Subject], None]


def require(condition: object, message: str) -> None:
    """Raises AssertionError with ``message``, also where Python runs without assertions."""
    if not condition:
        raise AssertionError(message)


def require_same(found: Tensor, expected: Tensor, what: str, tolerance: float = 0.0) -> None:
    """Asserts that shape, type and values are equal, values to within ``tolerance``, absolute and relative."""
    lie = f"{layout(found)}, expected {layout(expected)}"
    require(found.shape == expected.shape and found.dtype == expected.dtype, f"{what}: {lie}")
    if not torch.allclose(found.double(), expected.double(), atol=tolerance, rtol=tolerance, equal_nan=True):
        apart = (found.double() - expected.double()).abs()
        count = int((apart > 0).sum())
        require(False, f"{what}: {count} of {apart.numel()} values differ, by up to {float(apart.max()):g}; {lie}")


def require_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Asserts that two state dicts have the same names and values; the message has every tensor that differs."""
    odd = sorted(set(found) ^ set(expected))
    require(not odd, f"{what}: tensors that only one of both has: {', '.join(odd)}")
    faults = []
    for name, tensor in expected.items():
        try:
            require_same(found[name], tensor, name)
        except AssertionError as error:
            faults.append(str(error))
    require(not faults, f"{what}: {'; '.join(faults)}")


def layout(tensor: Tensor) -> str:
    """Says type, shape and strides of a tensor."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of {tuple(tensor.shape)} with strides {tensor.stride()}"
