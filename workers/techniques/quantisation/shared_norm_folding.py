"""Changing what a block's norms give out without changing what the block computes: the linear layers behind them take it back.

Pre-norm blocks only: most of timm, those of ViLT, and of METER's image encoder. timm's post-norm blocks normalise what attention and MLP
give; METER's text encoder and fusion layers normalise after each residual, so that the residual stream reads their norms: nothing
can take a factor back there.

With factors r and shifts d a channel, the norm gives x' = (x + d) / r instead of x, and W x + b = (W diag(r)) x' + (b - W d).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.models.timm_vit import POST_NORM
from workers.techniques.quantisation.shared_affine import NotQuantisable
from workers.techniques.record import ModelInfo


@dataclass(frozen=True)
class Pair:
    """A norm and the linear layers that read it, by name; nothing else reads it."""

    norm: str
    readers: tuple[str, ...]


READERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("norm1", ("attn.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.gate")),
    ("norm2", ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x")),
    ("layernorm_before", ("attention.attention.query", "attention.attention.key", "attention.attention.value")),
    ("layernorm_after", ("intermediate.dense",)),
    ("layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("layer_norm2", ("mlp.fc1",)),
)
"""Norms of a pre-norm block and what reads them, as timm, ViLT and CLIP name them."""


def folding_fault(info: ModelInfo) -> str | None:
    """Returns why no norm of a model's blocks can be changed, or None."""
    if not info.post_norm:
        return None
    return (
        f"norms are changed where linear layers read them, before attention and MLP; here {info.block} has them after"
    )


def pairs(model: nn.Module) -> list[Pair]:
    """Returns the norms of every pre-norm block with the linear layers that read them: of the attention, and the MLP's first."""
    found = []
    for owner, block in model.named_modules():
        if isinstance(block, POST_NORM):
            continue
        for norm, readers in READERS:
            if getattr(getattr(block, norm, None), "weight", None) is None:
                continue
            # Of two factors in a reader's place (svd) the first reads the norm.
            paths = (path for reader in readers for path in (reader, f"{reader}.0"))
            linear = tuple(f"{owner}.{path}" for path in paths if isinstance(_part(block, path), nn.Linear))
            if linear:
                found.append(Pair(f"{owner}.{norm}", linear))
    return found


def _part(module: nn.Module, path: str) -> Any:
    """Returns the module at ``path`` below ``module``, None where there is none."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
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
