"""Word embeddings stored as the weights of linear layers are: int8, or bit-packed with a scale a row or a group.

A text encoder's table of words is a large share of a vision-language model: BERT's has 23 of ViLT's 111 million parameters. A lookup
reads a few rows of it, so unpacking only these costs next to nothing, and rounding a row moves one word's embedding alone.
Where layers are trained as if they were quantised, so are these tables, with 8 bits a row.
Tables of positions and of token types are small, and models read them as a whole: they stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.quantisation.shared_affine import KernelLinear, Quantised, require_finite, symmetric_int8


class Table(KernelLinear, ABC):
    """A linear layer of weight (O, I) whose rows can be unpacked one by one."""

    @abstractmethod
    def quantise_(self, weight: Tensor) -> None:
        """Takes the values of ``weight`` (O, I)."""

    @abstractmethod
    def dequantised(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """Returns the weight (O, I) in ``dtype``, or only some rows of it: (R, I) for indices (R,)."""


class PackedEmbedding(Quantised):
    """Looks rows up in a packed table: ids (...) int64 -> (..., C).

    Args:
        table: (words, C), without a bias.
        dtype: of what comes out. It is that of ``like``, a parameter without entries, which ``precision`` converts with all others.
    """

    def __init__(self, table: Table, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.table = table
        self.like = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table.dequantised(self.like.dtype, ids.flatten())
        return rows.view(*ids.shape, -1)

    def plain(self) -> nn.Embedding:
        made = nn.Embedding(self.table.out_features, self.table.in_features, device="meta")
        made.weight = nn.Parameter(self.table.dequantised(torch.float32))
        return made


class TrainedEmbedding(nn.Embedding):
    """A table whose rows are rounded to 8 bits at every lookup, with the gradient of the rounding 1."""

    quantised = True  # see workers.techniques.quantisation.shared_affine.linears

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(
            embedding.num_embeddings, embedding.embedding_dim, padding_idx=embedding.padding_idx, device="meta"
        )
        self.weight = embedding.weight
        self.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) int64 -> (..., C)."""
        rows = F.embedding(ids.flatten(), self.weight, self.padding_idx)
        q, scale = symmetric_int8(rows, per_channel=True)
        rounded = q.float().mul_(scale[:, None])
        if self.training:
            rounded = rows + (rounded - rows).detach()
        return rounded.view(*ids.shape, -1)


def word_embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    """Returns the tables of words by name; transformers calls them so in every text encoder."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.Embedding) and name.split(".")[-1] == "word_embeddings"
    }


def pack_embeddings(model: nn.Module, empty: Callable[[nn.Linear], Table]) -> list[str]:
    """Packs the tables of words in place; returns their names.

    Args:
        empty: linear layer -> one of its shape in the packed format, without values.

    Raises:
        NotQuantisable: a value is NaN or infinite.
    """
    found = word_embeddings(model)
    rebuild_embeddings(model, list(found), empty)
    for name, embedding in found.items():
        require_finite(embedding.weight, f"the weight of {name}")
        packed: Any = model.get_submodule(name)
        packed.table.quantise_(embedding.weight)
    return list(found)


def rebuild_embeddings(model: nn.Module, names: Sequence[str], empty: Callable[[nn.Linear], Table]) -> None:
    """Puts packed tables without values in the place of the named embeddings, in place."""
    for name in names:
        old: Any = model.get_submodule(name)
        like = nn.Linear(old.embedding_dim, old.num_embeddings, bias=False, device="meta")
        model.set_submodule(name, PackedEmbedding(empty(like), old.weight.dtype, old.weight.device))


def train_embeddings(model: nn.Module) -> list[str]:
    """Lets the tables of words be trained as they will be stored, in place; returns their names."""
    found = word_embeddings(model)
    for name, embedding in found.items():
        model.set_submodule(name, TrainedEmbedding(embedding))
    return list(found)


def store_embeddings(model: nn.Module, empty: Callable[[nn.Linear], Table]) -> None:
    """Packs the tables of words that were trained for it, in place; ``empty`` as :func:`pack_embeddings` takes it, of 8 bits a row."""
    if any(isinstance(part, TrainedEmbedding) for part in model.modules()):
        pack_embeddings(model, empty)
