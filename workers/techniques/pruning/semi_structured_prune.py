"""2:4 sparsity: of every four neighbouring weights of a row the two smallest are zero, and neither stored nor, by a kernel, multiplied.

Source: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378, sections 2 (the pattern and its storage) and 4
(prune a trained model by magnitude, train again with the pattern fixed).
Differs from the paper: the training afterwards is the recipe's recovery training, not the original one repeated; no channels are
permuted beforehand.

The layer stores the two values that are left of each group and where they lie, 2 bits each: 17 bits a weight where a float32 layer
has 32, 9 where ``precision`` made them 16. The pattern is fixed from the start, and the training moves the values that are left.
CUDA of compute capability 8.0 or later multiplies 16-bit factors so (``torch.sparse.to_sparse_semi_structured`` with cuSPARSELt, which
is what torchao's ``sparsify_`` calls as well): sums in float32, float32 activations are rounded to bfloat16 and results are 16-bit.
Elsewhere a layer is unpacked at each call and multiplied as a whole; such rows are ``simulated``, their speed is that of the layers
with zeros in them. MACs and params are those of whole layers everywhere: zeros count.
Not covered: other patterns, other layers than linear ones in blocks, 2:4 sparse weights of 8 bits or fewer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.low_rank.shared_block_linears import CHOICES, block_linears
from workers.techniques.quantisation.shared_affine import (
    KernelLinear,
    pack_bits,
    packed_bytes,
    plain_linear,
    unpack_bits,
)
from workers.techniques.record import Applied, Rule, Surroundings, Technique, choice

GROUP, KEPT = 4, 2
"""Neighbours of a row, and how many of them stay."""

POSITION_BITS = 2

MULTIPLE = (32, 64)
"""Of O and I that PyTorch's kernels take in 16 bits: cuSPARSELt's 16 and 16, CUTLASS's 32 and 64 (torch 2.15). What is short of it is
padded with zeros in the kernel's own copy."""


@dataclass(frozen=True)
class Config:
    """Which layers, and whether the model is trained afterwards."""

    layers: str = choice("all", CHOICES, search=("all", "mlp"), doc="which layers of the blocks")
    recover: bool = choice(True, (True, False), search=(True,), doc="train the weights that are left")


def has_kernel() -> bool:
    """Whether the CUDA device here multiplies 2:4 sparse matrices and PyTorch knows how to. AMD's have a format of their own."""
    library: Any = getattr(torch.backends, "cusparselt", None)
    if not torch.cuda.is_available() or torch.version.hip is not None or library is None or not library.is_available():
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


# --- packing ----------------------------------------------------------------------------------------------------------


def kept_columns(in_features: int) -> int:
    """Returns how many values a row stores: two for each group of four, the last of which may be short."""
    return -(-in_features // GROUP) * KEPT


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps the two largest magnitudes of every four neighbours of a row, of equal ones the first.

    Args:
        weight: (O, I) any floating type.

    Returns:
        values (O, K) of the same type, K = :func:`kept_columns`; positions (O, K) uint8 from 0 to 3 in the group, rising
        within it. What a last group is short of is kept last, as zeros.
    """
    groups = F.pad(weight, (0, -weight.shape[1] % GROUP)).reshape(len(weight), -1, GROUP)
    strongest = groups.abs().argsort(dim=2, descending=True, stable=True)[..., :KEPT]
    positions = strongest.sort(dim=2).values
    values = groups.gather(2, positions)
    return values.flatten(1).contiguous(), positions.flatten(1).to(torch.uint8)


def expand(values: Tensor, positions: Tensor, in_features: int) -> Tensor:
    """Returns the weight (O, I) from what :func:`compress` made; differentiable in ``values``."""
    rows, columns = values.shape
    start = torch.arange(columns, device=values.device) // KEPT * GROUP
    whole = values.new_zeros(rows, columns // KEPT * GROUP).scatter(1, positions.long() + start, values)
    return whole[:, :in_features]


# --- the layer --------------------------------------------------------------------------------------------------------


class SparseLinear(KernelLinear):
    """x W^T + b with 2:4 sparse W: ``values`` (O, K) a parameter, ``positions`` (O, bytes) uint8, ``bias`` (O,) or None.

    Values are a parameter so that a training moves them and ``precision`` converts them.
    """

    positions: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features)
        kept = kept_columns(in_features)
        self.values = nn.Parameter(torch.empty(out_features, kept, dtype=dtype, device="meta"))
        packed = torch.empty(out_features, packed_bytes(kept, POSITION_BITS), dtype=torch.uint8, device="meta")
        self.register_buffer("positions", packed)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device="meta")) if bias else None

    @classmethod
    def like(cls, linear: Any) -> SparseLinear:
        """Returns a layer of the same shape, without values."""
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=linear.weight.dtype)
        return made.train(linear.training)

    @classmethod
    def of(cls, linear: nn.Linear) -> SparseLinear:
        """Returns the layer with its smaller weights taken out."""
        made = cls.like(linear)
        values, positions = compress(linear.weight.detach())
        made.values = nn.Parameter(values)
        made.positions = pack_bits(positions, POSITION_BITS)
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach().clone())
        return made

    @property
    def arithmetic(self) -> str | None:
        """Of the factors of a kernel, see workers.artefact.parity; None where none runs."""
        return "bfloat16" if self.values.is_cuda and has_kernel() else None

    def dense(self) -> Tensor:
        """Returns the weight (O, I) with its zeros, differentiable."""
        positions = unpack_bits(self.positions, POSITION_BITS, self.values.shape[1])
        return expand(self.values, positions, self.in_features)

    def plain(self) -> nn.Linear:
        """Returns what it counts as and, without a kernel, is timed as."""
        return plain_linear(self.dense().detach().contiguous(), self.bias)

    def pack_for_kernel(self) -> Any:
        """Returns the weight as PyTorch's 2:4 sparse tensor of 16 bits, padded."""
        weight = self.dense().detach()
        weight = weight if weight.element_size() == 2 else weight.bfloat16()
        weight = F.pad(weight, (0, -self.in_features % MULTIPLE[1], 0, -self.out_features % MULTIPLE[0]))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor is in prototype")
            return torch.sparse.to_sparse_semi_structured(weight.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) any floating type -> (..., O) same type."""
        if self.values.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_exporting() and has_kernel():
            rows = self.kernel_product(x.reshape(-1, self.in_features))
            product: Tensor = rows.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
            return product if self.bias is None else product + self.bias.to(x.dtype)
        return F.linear(x, self.dense().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def kernel_product(self, rows: Tensor) -> Tensor:
        """rows (M, I) any floating type -> (M, O) of 16 bits, without the bias, by the CUDA kernel."""
        # A step of a training, or a conversion, leaves other values in the same module.
        values = self.values
        state = (values.data_ptr(), values.dtype, None if values.is_inference() else values._version)
        if self._packing is None or self._packing[0] != state:
            self._packing = (state, self.pack_for_kernel())
        weight = self._packing[1]
        padded = F.pad(rows.to(weight.dtype), (0, -self.in_features % MULTIPLE[1]))
        product: Tensor = F.linear(padded, weight)
        return product[:, : self.out_features]


# --- record -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Replaces the linear layers in place."""
    found = block_linears(model, config.layers)
    for name, linear in found.items():
        model.set_submodule(name, SparseLinear.of(linear))
    return Applied(model, {"linears": list(found)}, list(found))


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Replaces the same layers of a skeleton by layers without values."""
    for name in resolved["linears"]:
        model.set_submodule(name, SparseLinear.like(model.get_submodule(name)))
    return model


TECHNIQUE = Technique(
    name="semi_structured_prune",
    family="pruning",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    trains=lambda config: config.recover,
    rules=(
        Rule(
            ("importance_prune",),
            "forbidden",
            "its gates are cut out of whole weights after the training, which the other no longer has",
        ),
        Rule(
            ("quantisation",),
            "experimental",
            "two formats of one weight: sound only with the values that are left of few bits, which no layer here stores",
        ),
    ),
    simulated=lambda config, device: device != "cuda" or not has_kernel(),
    models=("timm", "vilt", "meter"),
    source="Mishra et al. 2021, arXiv 2104.08378, sections 2 and 4",
)
