"""What the speed of a model depends on, as a digest: which kernels run, on which shapes and number formats. Not what it has learnt.

A model is watched while it runs: every operator with the shapes, strides, dtypes and whole numbers that it gets. Two models with one digest
run the same work, whatever their weights; see docs/decisions/0034-shared-speeds.md for what that rests on and what is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from workers.measuring.timing import Batch
from workers.trial import digest

BATCHES = (1, 2)
"""Images a call at which a model is watched: that of a latency, and one of several images."""

_DECIDES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
"""PyTorch's marks of operators that hand a value to Python, or whose result has a shape that values decide."""

_INDEX = torch.ops.aten.index.Tensor
"""Marked as well, although only an index of truth values makes a shape of values."""


class _ValuesDecide(Exception):
    """What the model has learnt, or what it is shown, may decide how long it runs."""


@torch.inference_mode()
def structure(model: nn.Module, inputs: Callable[[int], Batch]) -> str | None:
    """Returns 16 hexadecimal digits that name what runs, None where values may decide how long it takes.

    Args:
        model: in eval mode, on the device that it is timed on.
        inputs: makes a batch of the given size there.
    """
    model(inputs(1))  # what layers make at their first call, a kernel's packing, is there
    try:
        parts = [[type(module).__qualname__, *map(_weight, _own(module))] for module in model.modules()]
        calls = []
        for size in BATCHES:
            with _Watch() as watch:
                model(inputs(size))
            calls.append(watch.calls)
    except _ValuesDecide:
        return None
    return digest([parts, calls])


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _weight(tensor: Tensor) -> list[object]:
    """Describes a weight; of its values the share of zeros, in tenths, on which a clock that is limited by power depends."""
    _check_normal(tensor)
    plain = tensor.layout == torch.strided and type(tensor) in (Tensor, nn.Parameter) and tensor.numel()
    zeros = round(1.0 - torch.count_nonzero(tensor).item() / tensor.numel(), 1) if plain else None
    return [*_tensor(tensor), zeros]


def _tensor(tensor: Tensor) -> list[object]:
    strides = list(tensor.stride()) if tensor.layout == torch.strided else None
    return [type(tensor).__name__, list(tensor.shape), strides, str(tensor.dtype), str(tensor.layout)]


def _check_normal(tensor: Tensor) -> None:
    """Raises _ValuesDecide for float32 numbers below the normal range, with which a CPU may compute many times slower."""
    if tensor.dtype != torch.float32 or tensor.layout != torch.strided or not tensor.numel():
        return
    size = tensor.abs()
    if ((size > 0) & (size < torch.finfo(torch.float32).tiny)).any().item():
        raise _ValuesDecide


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator that runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[object] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _INDEX:
            decides = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        else:
            decides = any(tag in func.tags for tag in _DECIDES)
        if decides:
            raise _ValuesDecide
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                _check_normal(tensor)
        self.calls.append([str(func), _described(args), _described(dict(kwargs or {}))])
        return result


def _described(value: Any) -> object:
    """Returns plain values for what decides the work of an operator: of a fraction only whether it is 0 or 1."""
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, float):
        return value if value in (0.0, 1.0) else "a number"
    if isinstance(value, Mapping):
        return {str(name): _described(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [_described(one) for one in value]
    plain = value is None or isinstance(value, bool | int | str)
    named = isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format)
    return value if plain else str(value) if named else type(value).__qualname__
