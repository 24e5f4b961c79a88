"""Counts that need no clock: multiply-accumulates of one call, and weights.

MACs are half the FLOPs of PyTorch's counter: every matrix product, convolution and attention that really runs, by the
shapes that it runs with, so merged tokens, removed dimensions and landmarks count as what they left. Element-wise work,
norms, softmax, sorting and gathering do not count, as in published figures. ToMe's similarity product and Nystrom's
pseudo-inverse do count. Padding inside a fused kernel does not: attention is counted by the call, not by the kernel that
a device chooses, so one model has one figure on every device and in every number format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from workers.inputs import Inputs
from workers.techniques.quantisation.shared_affine import QuantisedLinear

Shape = tuple[int, ...]

_aten = torch.ops.aten


class OpaqueKernel(ValueError):
    """The model computes with weights or operators whose work cannot be seen; the message names one and the remedy."""


# --- operators --------------------------------------------------------------------------------------------------------


def _attention(q: Shape, k: Shape, v: Shape, *args: object, **kwargs: object) -> int:
    """Counts q (..., L, D), k (..., S, D), v (..., S, E), whatever the mask: a mask does not skip work."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _dot(a: Shape, b: Shape, *args: object, **kwargs: object) -> int:
    return 2 * math.prod(a)  # also mv: (M, K) (K,)


def _added_dot(bias: Shape, a: Shape, b: Shape, *args: object, **kwargs: object) -> int:
    return _dot(a, b)


def _added_batches(bias: Shape, a: Shape, b: Shape, *args: object, **kwargs: object) -> int:
    return 2 * math.prod(a) * b[-1]  # (B, M, K) (B, K, N)


FORMULAS: Mapping[Any, Callable[..., int]] = {
    _aten.scaled_dot_product_attention: _attention,
    _aten.mv: _dot,
    _aten.dot: _dot,
    _aten.addmv: _added_dot,
    _aten.addbmm: _added_batches,
}
"""FLOPs of operators that PyTorch's counter (2.15) leaves out, and of attention before a backend is chosen: CUDA's flash
kernel pads head dimensions to multiples of 8, which the counter would take for work of the model."""

_NAMESPACES = frozenset({"aten", "prim", "prims", "profiler"})
"""Whose operators are element-wise unless their name says otherwise; all others are kernels of their own."""

_PRODUCTS = frozenset(
    {"mm", "bmm", "matmul", "mv", "dot", "vdot", "linear", "addmm", "addbmm", "baddbmm", "attention", "transformer"}
    | {"conv", "conv1d", "conv2d", "conv3d", "convolution", "rnn", "lstm", "gru", "fft", "cdist", "pdist", "trilinear"}
    | {"solve", "linalg"}
)
"""Words in the names of operators that multiply matrices."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands below the counter, so that it sees what the counter executes, and refuses work that it has no formula for."""

    def __init__(self, known: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._overloadpacket not in self.known and _is_product(func.namespace, func._opname):
            raise OpaqueKernel(
                f"count_macs: the operator {func} has no known cost; count the model before its conversion, or give the "
                "operator a formula in workers/measuring/counting.py"
            )
        return func(*args, **(kwargs or {}))


def _is_product(namespace: str, name: str) -> bool:
    words = set(name.split("_"))
    return namespace not in _NAMESPACES or bool(words & _PRODUCTS and not words & {"norm", "diagonal"})


# --- counts -----------------------------------------------------------------------------------------------------------


def count_macs(model: nn.Module, example: Shape | Tensor | Inputs) -> int:
    """Returns the multiply-accumulates of one example, at inference.

    Args:
        model: on any device, meta included; a twin from before the conversion where weights are packed. Its mode is put
            back afterwards.
        example: a batch of one, or the shape (1, C, H, W) of an image; another resolution is another count.

    Raises:
        OpaqueKernel: the model has packed weights, or an operator whose cost is not known.
        ValueError: more than one example.
    """
    inputs = torch.zeros(example) if isinstance(example, tuple) else example
    if len(inputs) != 1:
        raise ValueError(f"count_macs: must be a batch of 1, the count is of one example; got {len(inputs)}")
    _refuse_packed(model, "count_macs")
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    training = {part: part.training for part in model.modules()}
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    counter = FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))
    try:
        for (
            parameter
        ) in learned:  # a view of one (attention pooling's query) has no graph, where the counter wants to hook
            parameter.requires_grad_(False)
        # Only inference mode shows the counter an attention before its backend: autograd takes it apart first.
        with torch.inference_mode(), _Watch(counter.flop_registry), counter:
            model(inputs.to(device))
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        for part, was in training.items():
            part.training = was
    return int(counter.get_total_flops()) // 2


def count_params(model: nn.Module) -> int:
    """Returns the number of weights, shared ones once; buffers (statistics, projections) are not weights.

    Raises:
        OpaqueKernel: the model has packed weights, which are buffers: its twin from before the conversion has the count.
    """
    _refuse_packed(model, "count_params")
    return sum(math.prod(p.shape) for p in model.parameters())


def _refuse_packed(model: nn.Module, what: str) -> None:
    for name, part in model.named_modules():
        if isinstance(part, QuantisedLinear) or type(part).__module__.startswith(
            ("torch.ao.nn.", "torch.nn.quantized")
        ):
            raise OpaqueKernel(
                f"{what}: {name or 'the model'} is a {type(part).__name__}, whose packed weights hide what it computes; "
                "count the model before its conversion, which has the same weights and products"
            )
