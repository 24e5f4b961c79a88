"""A batch of examples that a model takes as several tensors: named, and along the examples like one tensor.

A vision transformer takes its images as a plain tensor. A vision-language model takes pixels, tokens and masks together;
as :class:`Inputs` they go through training, calibration, evaluation and timing where a tensor of images goes:
``len``, ``to``, rows, ``tensor_split``, ``device``.
"""

from __future__ import annotations

from collections.abc import ItemsView, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Inputs:
    """Named tensors, each with one row an example.

    Args:
        tensors: at least one; the first axis of all is the batch.

    Raises:
        ValueError: none, or of different numbers of examples.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        sizes = {name: len(tensor) for name, tensor in self._tensors.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"inputs: every tensor must have one row an example, got {sizes}")

    @overload
    def __getitem__(self, key: str) -> Tensor: ...
    @overload
    def __getitem__(self, key: slice | Tensor) -> Inputs: ...
    def __getitem__(self, key: str | slice | Tensor) -> Tensor | Inputs:
        """Returns the tensor of a name, or the chosen examples: a slice, or indices (M,) int64."""
        if isinstance(key, str):
            return self._tensors[key]
        return Inputs({name: tensor[key] for name, tensor in self._tensors.items()})

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(next(iter(self._tensors.values())))

    def get(self, name: str) -> Tensor | None:
        """Returns the tensor of a name, None where there is none."""
        return self._tensors.get(name)

    def items(self) -> ItemsView[str, Tensor]:
        """Returns (name, tensor) pairs."""
        return self._tensors.items()

    def replace(self, **tensors: Tensor) -> Inputs:
        """Returns these inputs with some tensors put in or exchanged."""
        return Inputs({**self._tensors, **tensors})

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return next(iter(self._tensors.values())).device

    def to(self, target: torch.device | str | torch.dtype, *, non_blocking: bool = False) -> Inputs:
        """Moves them, or converts those of a floating-point type, as transformers' batches do."""
        keep = isinstance(target, torch.dtype)
        return Inputs(
            {
                name: t if keep and not t.is_floating_point() else t.to(target, non_blocking=non_blocking)
                for name, t in self._tensors.items()
            }
        )

    def tensor_split(self, parts: int) -> tuple[Inputs, ...]:
        """Splits the examples into ``parts`` that differ by one in size at most."""
        split = {name: tensor.tensor_split(parts) for name, tensor in self._tensors.items()}
        return tuple(Inputs({name: found[i] for name, found in split.items()}) for i in range(parts))

    def __repr__(self) -> str:
        return f"Inputs({ {name: tuple(tensor.shape) for name, tensor in self._tensors.items()} })"


def _flatten(inputs: Inputs) -> tuple[list[Tensor], tuple[str, ...]]:
    names, tensors = zip(*inputs.items(), strict=True)
    return list(tensors), names


def _unflatten(tensors: Any, names: Any) -> Inputs:
    found = Inputs.__new__(Inputs)  # tracers put things that are no tensors through here
    found._tensors = dict(zip(names, tensors, strict=True))
    return found


pytree.register_pytree_node(Inputs, _flatten, _unflatten, serialized_type_name="workers.inputs.Inputs")
