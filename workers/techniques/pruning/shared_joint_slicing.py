"""Removes whole heads, head and MLP dimensions, and layers from the layers of ViLT and METER that see both modalities.

Of ViLT that is every layer, one attention and one MLP each; of METER the fusion layers, in each of which both streams have two attentions
and an MLP. The width of the residual streams, the embeddings and METER's encoders stay. Every ``keep_*`` takes the indices that
stay, ascending, and changes the model in place; on the meta device it changes the shapes only (:func:`shrink_to`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workers.models.vision_language import FusedAttention
from workers.techniques.pruning.shared_slicing import largest, sliced, squares

# --- parts ------------------------------------------------------------------------------------------------------------


def attentions(layer: nn.Module) -> list[tuple[str, Any]]:
    """Returns the attentions of a layer by name, in order: modules with ``attention`` and ``output.dense`` behind it."""
    return [
        (n, part) for n, part in layer.named_modules() if isinstance(getattr(part, "attention", None), FusedAttention)
    ]


def mlps(layer: nn.Module) -> list[tuple[str, Any]]:
    """Returns what has an MLP in a layer by name, in order: modules with ``intermediate.dense`` and ``output.dense``."""
    return [(name, part) for name, part in layer.named_modules() if hasattr(part, "intermediate")]


def dimensions(model: nn.Module) -> dict[str, list[int]]:
    """Returns the heads and head dimensions of every attention and the hidden dimensions of every MLP, in order."""
    parts: Any = model
    found = [part for layer in parts.layers for _, part in attentions(layer)]
    return {
        "heads": [part.attention.num_heads for part in found],
        "head_dims": [part.attention.head_dim for part in found],
        "hidden": [part.intermediate.dense.out_features for layer in parts.layers for _, part in mlps(layer)],
    }


# --- magnitudes -------------------------------------------------------------------------------------------------------


def head_dim_sums(block: Any) -> tuple[Tensor, Tensor]:
    """Adds up the squares of all weights of each head dimension of an attention.

    Returns:
        (H, D) of queries and keys, (H, D) of values: their rows and the columns of the projection behind.
    """
    attention = block.attention
    query, key, value = (
        squares(part.weight).sum(dim=1).view(attention.num_heads, -1)
        for part in (attention.query, attention.key, attention.value)
    )
    return query + key, value + squares(block.output.dense.weight).sum(dim=0).view(attention.num_heads, -1)


def head_magnitudes(block: Any) -> Tensor:
    """Returns (H,) float32: the L2 norm of all weights of each head of an attention."""
    qk, v = head_dim_sums(block)
    return (qk + v).sum(dim=1).sqrt()


def hidden_magnitudes(block: Any) -> Tensor:
    """Returns (hidden,) float32: the L2 norm of all weights of each hidden dimension of an MLP."""
    rows: Tensor = squares(block.intermediate.dense.weight).sum(dim=1)
    return (rows + squares(block.output.dense.weight).sum(dim=0)).sqrt()


def layer_magnitude(layer: nn.Module) -> float:
    """Returns the L2 norm of the weights with which a layer writes into its residual streams."""
    written = [squares(part.output.dense.weight).sum() for _, part in (*attentions(layer), *mlps(layer))]
    return float(torch.stack(written).sum().sqrt())


# --- slicing ----------------------------------------------------------------------------------------------------------


def keep_layers(model: nn.Module, layers: list[int]) -> None:
    """Leaves the given layers."""
    parts: Any = model
    if len(layers) < len(parts.layers):
        parts.layers = nn.ModuleList(parts.layers[i] for i in layers)


def keep_heads(block: Any, heads: Tensor) -> None:
    """Leaves the given heads of an attention."""
    attention = block.attention
    rows = (heads[:, None] * attention.head_dim + torch.arange(attention.head_dim, device=heads.device)).flatten()
    _keep_rows(block, rows, rows)
    attention.num_heads = len(heads)


def keep_head_dims(block: Any, qk: Tensor, v: Tensor) -> None:
    """Leaves the given dimensions of every head of an attention, whose softmax scale stays.

    Args:
        qk: (H, d) which dimensions of queries and keys stay in each head; v: (H, d) of values.
    """
    attention = block.attention
    start = torch.arange(attention.num_heads, device=qk.device)[:, None] * attention.head_dim
    _keep_rows(block, (start + qk).flatten(), (start + v).flatten())
    attention.head_dim = qk.shape[1]


def _keep_rows(block: Any, qk: Tensor, v: Tensor) -> None:
    attention = block.attention
    attention.query, attention.key = sliced(attention.query, rows=qk), sliced(attention.key, rows=qk)
    attention.value, block.output.dense = sliced(attention.value, rows=v), sliced(block.output.dense, columns=v)


def keep_hidden(block: Any, dims: Tensor) -> None:
    """Leaves the given hidden dimensions of an MLP."""
    block.intermediate.dense = sliced(block.intermediate.dense, rows=dims)
    block.output.dense = sliced(block.output.dense, columns=dims)


def cut_attention(block: Any, heads: int, dims: int, *, by_magnitude: bool = True) -> bool:
    """Leaves so many heads, and so many dimensions of each: the strongest or the leading ones; returns whether some went."""
    attention = block.attention
    device = attention.query.weight.device
    fewer_heads: bool = heads < attention.num_heads
    fewer_dims: bool = dims < attention.head_dim
    if fewer_heads:
        strongest = largest(head_magnitudes(block), heads) if by_magnitude else torch.arange(heads, device=device)
        keep_heads(block, strongest)
    if fewer_dims and by_magnitude:
        qk, v = head_dim_sums(block)
        keep_head_dims(block, largest(qk, dims), largest(v, dims))
    elif fewer_dims:
        first = torch.arange(dims, device=device).expand(heads, -1)
        keep_head_dims(block, first, first)
    return fewer_heads or fewer_dims


def cut_mlp(block: Any, hidden: int, *, by_magnitude: bool = True) -> bool:
    """Leaves so many hidden dimensions of an MLP: the strongest or the leading ones; returns whether some went."""
    dense = block.intermediate.dense
    if hidden == dense.out_features:
        return False
    leading = torch.arange(hidden, device=dense.weight.device)
    keep_hidden(block, largest(hidden_magnitudes(block), hidden) if by_magnitude else leading)
    return True


def shrink_to(model: nn.Module, counts: Mapping[str, Any]) -> nn.Module:
    """Leaves the layers, and the leading heads and dimensions, that ``counts`` says; returns the model.

    Args:
        counts: ``layers``, indices that stay, and the :func:`dimensions` of what is left.
    """
    parts: Any = model
    keep_layers(model, counts["layers"])
    blocks = [block for layer in parts.layers for _, block in attentions(layer)]
    for block, heads, dims in zip(blocks, counts["heads"], counts["head_dims"], strict=True):
        cut_attention(block, heads, dims, by_magnitude=False)
    blocks = [block for layer in parts.layers for _, block in mlps(layer)]
    for block, hidden in zip(blocks, counts["hidden"], strict=True):
        cut_mlp(block, hidden, by_magnitude=False)
    return model
