"""Changing what a block's norms give out without changing what the block computes: the linear layers behind them take it back.

With factors r and shifts d a channel, the norm gives x' = (x + d) / r instead of x, and W x + b = (W diag(r)) x' + (b - W d).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.affine import NotQuantisable


@dataclass(frozen=True)
class Pair:
    """A norm and the linear layers that read it, by name; nothing else reads it."""

    norm: str
    readers: tuple[str, ...]


def pairs(model: nn.Module) -> list[Pair]:
    """Returns the two norms of every block with what reads them: query, key, value and gate; the first layer of the MLP."""
    vit: Any = model
    found = []
    for name, block in vit.blocks.named_children():
        attention = tuple(part for part in ("qkv", "gate") if isinstance(getattr(block.attn, part), nn.Linear))
        mlp = tuple(part for part in ("fc1", "fc1_g", "fc1_x") if isinstance(getattr(block.mlp, part, None), nn.Linear))
        for norm, owner, readers in (("norm1", "attn", attention), ("norm2", "mlp", mlp)):
            if readers and getattr(getattr(block, norm), "weight", None) is not None:
                found.append(Pair(f"blocks.{name}.{norm}", tuple(f"blocks.{name}.{owner}.{r}" for r in readers)))
    return found


@torch.no_grad()
def fold_(model: nn.Module, pair: Pair, factor: Tensor, shift: Tensor | None = None) -> None:
    """Makes the norm give (x + shift) / factor, and the readers take it back; in float32, stored in their own types.

    Args:
        factor: (C,) positive; shift: (C,), None for zeros.

    Raises:
        NotQuantisable: a shift for a norm without a bias, or a reader without one (see :func:`add_biases`).
    """
    norm: Any = model.get_submodule(pair.norm)
    bias: Tensor | None = getattr(norm, "bias", None)
    if shift is not None and bias is None:
        raise NotQuantisable(f"{pair.norm} must have a bias that can take up a shift; it is a {type(norm).__name__}")
    norm.weight.copy_(norm.weight.float() / factor)
    if bias is not None:
        bias.copy_((bias.float() + (0 if shift is None else shift)) / factor)
    for name in pair.readers:
        reader: Any = model.get_submodule(name)
        weight = reader.weight.float()
        if shift is not None:
            if reader.bias is None:
                raise NotQuantisable(f"{name} must have a bias that takes a shift back")
            reader.bias.copy_(reader.bias.float() - weight @ shift)
        reader.weight.copy_(weight * factor)


def add_biases(model: nn.Module, names: tuple[str, ...] | list[str]) -> list[str]:
    """Gives the named linear layers a bias of zeros where they have none; returns the names of those."""
    changed = []
    for name in names:
        layer: Any = model.get_submodule(name)
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features))
            changed.append(name)
    return changed


def reader_peaks(model: nn.Module, pair: Pair) -> Tensor:
    """Returns (C,) float32: the largest absolute weight that reads each channel of the norm."""
    weights: Mapping[str, Any] = {name: model.get_submodule(name) for name in pair.readers}
    return torch.stack([layer.weight.detach().float().abs().amax(0) for layer in weights.values()]).amax(0)
