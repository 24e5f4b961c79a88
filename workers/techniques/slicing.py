"""Removes whole heads, MLP dimensions and residual channels from a timm ViT, and ranks them by magnitude.

Every ``keep_*`` takes the indices that stay, ascending, and changes the model in place; on the meta device it changes the
shapes only, which is how an artefact's structure is built again from its counts.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, LayerScale, Mlp
from torch import Tensor, nn


def require_plain(model: nn.Module, technique: str) -> None:
    """Refuses blocks whose dimensions cannot be removed without changing what the others compute.

    Raises:
        ValueError: naming the block, for other attention or MLP types and for norms over the dimensions to remove.
    """
    vit: Any = model
    for name, block in vit.blocks.named_children():
        if type(block.attn) is not Attention or type(block.mlp) is not Mlp:
            raise ValueError(
                f"{technique}: blocks.{name} must have timm's Attention and Mlp, "
                f"found {type(block.attn).__name__} and {type(block.mlp).__name__}"
            )
        if not isinstance(block.attn.norm, nn.Identity) or not isinstance(block.mlp.norm, nn.Identity):
            raise ValueError(
                f"{technique}: blocks.{name} normalises over its heads or MLP dimensions; none can be removed"
            )


# --- magnitudes -------------------------------------------------------------------------------------------------------


def head_magnitudes(attn: Any) -> Tensor:
    """Returns (H,) float32: the L2 norm of all weights of each head, query, key, value rows and projection columns."""
    rows: Tensor = attn.qkv.weight.detach().float().pow(2).sum(dim=1).reshape(3, attn.num_heads, -1).sum(dim=(0, 2))
    columns: Tensor = attn.proj.weight.detach().float().pow(2).sum(dim=0).reshape(attn.num_heads, -1).sum(dim=1)
    return (rows + columns).sqrt()


def hidden_magnitudes(mlp: Any) -> Tensor:
    """Returns (hidden,) float32: the L2 norm of all weights of each hidden dimension of an MLP."""
    rows: Tensor = mlp.fc1.weight.detach().float().pow(2).sum(dim=1)
    columns: Tensor = mlp.fc2.weight.detach().float().pow(2).sum(dim=0)
    return (rows + columns).sqrt()


def channel_magnitudes(model: nn.Module) -> Tensor:
    """Returns (C,) float32: the L2 norm of the weights that write into each channel of the residual stream."""
    vit: Any = model
    total: Tensor = vit.patch_embed.proj.weight.detach().float().flatten(1).pow(2).sum(dim=1)
    if vit.pos_embed is not None:
        total = total + vit.pos_embed.detach().float().flatten(0, 1).pow(2).sum(dim=0)
    for block in vit.blocks:
        for writer, scale in ((block.attn.proj, block.ls1), (block.mlp.fc2, block.ls2)):
            written = writer.weight.detach().float().pow(2).sum(dim=1)
            total = total + (written * scale.gamma.detach().float() ** 2 if isinstance(scale, LayerScale) else written)
    return total.sqrt()


def largest(magnitudes: Tensor, count: int) -> Tensor:
    """Returns the indices of the ``count`` largest, ascending; of equals the first ones."""
    return magnitudes.argsort(descending=True, stable=True)[:count].sort().values


# --- slicing ----------------------------------------------------------------------------------------------------------


def sliced(linear: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """Returns a Linear with the given output rows and input columns of another one; None keeps all."""
    weight: Tensor = linear.weight.detach()
    bias: Tensor | None = linear.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    new.weight = nn.Parameter(weight.clone(), linear.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), linear.bias.requires_grad)
    return new.train(linear.training)


def keep_heads(attn: Any, heads: Tensor) -> None:
    """Leaves the given heads of a timm ``Attention``; head_dim and the softmax scale stay."""
    head = torch.arange(attn.head_dim, device=heads.device)
    columns = (heads[:, None] * attn.head_dim + head).flatten()
    rows = (torch.arange(3, device=heads.device)[:, None] * attn.num_heads * attn.head_dim + columns).flatten()
    attn.qkv, attn.proj = sliced(attn.qkv, rows=rows), sliced(attn.proj, columns=columns)
    if attn.gate is not None:
        attn.gate = sliced(attn.gate, rows=columns)
    attn.num_heads, attn.attn_dim = len(heads), len(columns)


def keep_hidden(mlp: Any, dims: Tensor) -> None:
    """Leaves the given hidden dimensions of a timm ``Mlp``."""
    mlp.fc1, mlp.fc2 = sliced(mlp.fc1, rows=dims), sliced(mlp.fc2, columns=dims)


def keep_channels(model: nn.Module, channels: Tensor) -> None:
    """Leaves the given channels of the residual stream of a whole timm ViT: embeddings, norms, blocks, heads."""
    vit: Any = model
    for token in ("cls_token", "reg_token", "dist_token", "pos_embed"):
        if getattr(vit, token, None) is not None:
            setattr(vit, token, _cut(getattr(vit, token), channels))
    conv = vit.patch_embed.proj
    conv.weight, conv.out_channels = _cut(conv.weight, channels, dim=0), len(channels)
    if conv.bias is not None:
        conv.bias = _cut(conv.bias, channels)
    for norm in (vit.patch_embed.norm, vit.norm_pre, vit.norm, vit.fc_norm):
        _keep_in_vector(norm, channels)
    for block in vit.blocks:
        for part in (block.norm1, block.norm2, block.ls1, block.ls2):
            _keep_in_vector(part, channels)
        attn, mlp = block.attn, block.mlp
        attn.qkv, attn.proj = sliced(attn.qkv, columns=channels), sliced(attn.proj, rows=channels)
        if attn.gate is not None:
            attn.gate = sliced(attn.gate, columns=channels)
        mlp.fc1, mlp.fc2 = sliced(mlp.fc1, columns=channels), sliced(mlp.fc2, rows=channels)
    for head in ("head", "head_dist"):
        if isinstance(getattr(vit, head, None), nn.Linear):
            setattr(vit, head, sliced(getattr(vit, head), columns=channels))
    vit.embed_dim = vit.num_features = vit.head_hidden_size = len(channels)


def _cut(parameter: Tensor, index: Tensor, dim: int = -1) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, index), parameter.requires_grad)


def _keep_in_vector(module: Any, channels: Tensor) -> None:
    """Cuts a norm or a LayerScale; a norm without parameters over no fixed shape (Identity) stays."""
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, _cut(parameter, channels))
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = (len(channels),)
