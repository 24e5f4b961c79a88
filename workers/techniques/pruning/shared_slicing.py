"""Removes whole heads, head and MLP dimensions, residual channels and blocks from a timm ViT, and ranks them by magnitude.

Every ``keep_*`` takes the indices that stay, ascending, and changes the model in place; on the meta device it changes the
shapes only, which is how an artefact's structure is built again from its counts (:func:`shrink_to`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from workers.models.timm_vit import POST_NORM
from workers.techniques.record import ModelInfo

# --- counts -----------------------------------------------------------------------------------------------------------


def multiple(count: float, of: int, most: int) -> int:
    """Returns the multiple of ``of`` that is nearest to ``count``, at least one and at most ``most``."""
    return min(most, max(1, round(count / of)) * of)


def dimensions(model: nn.Module) -> dict[str, Any]:
    """Returns the counts that say what a pruned ViT looks like, as plain JSON values; see :func:`shrink_to`."""
    vit: Any = model
    return {
        "channels": vit.embed_dim,
        "heads": [block.attn.num_heads for block in vit.blocks],
        "head_dims": [head_dim(block.attn) for block in vit.blocks],
        "hidden": [block.mlp.fc2.in_features for block in vit.blocks],
    }


def head_dim(attn: Any) -> int:
    """Returns the dimensions of a head of any attention of timm."""
    return int(getattr(attn, "head_dim", attn.proj.in_features // attn.num_heads))


def shrink_to(model: nn.Module, counts: Mapping[str, Any]) -> nn.Module:
    """Leaves the leading heads, dimensions and channels, as many as ``counts`` says; returns the model.

    Its ``blocks``, where there are such, are the blocks that stay: their counts may differ from those of the others. Without
    them the leading ones stay.
    """
    vit: Any = model
    device = vit.patch_embed.proj.weight.device
    keep_blocks(vit, counts.get("blocks", list(range(len(counts["heads"])))))
    for block, heads, dims, hidden in zip(
        vit.blocks, counts["heads"], counts["head_dims"], counts["hidden"], strict=True
    ):
        if heads < block.attn.num_heads:
            keep_heads(block.attn, torch.arange(heads, device=device))
        if dims < head_dim(block.attn):
            first = torch.arange(dims, device=device).expand(heads, -1)
            keep_head_dims(block.attn, first, first)
        if hidden < block.mlp.fc2.in_features:
            keep_hidden(block.mlp, torch.arange(hidden, device=device))
    if counts["channels"] < vit.embed_dim:
        keep_channels(vit, torch.arange(counts["channels"], device=device))
    return model


PARTS = {"timm": (1, 1), "vilt": (1, 1), "meter": (4, 2)}
"""Attentions and MLPs of a layer by model family; each has a norm. METER's fusion layers have two streams."""


def stack_weights(info: ModelInfo) -> int:
    """Returns the weights of all plain layers of these dimensions; what else one has (LayerScale, q/k norms) is left out."""
    C, (attentions, mlps) = info.embed_dim, PARTS[info.family]
    total = 0
    for heads, hidden in zip(info.num_heads, info.mlp_hidden, strict=True):
        # Queries, keys, values and projection; the layers of an MLP; biases; a norm each.
        total += attentions * (heads * info.head_dim * (4 * C + 3) + C + 2 * C)
        total += mlps * (hidden * (info.mlp_matrices * C + info.mlp_matrices - 1) + C + 2 * C)
    return total


# --- magnitudes -------------------------------------------------------------------------------------------------------


def squares(weight: Tensor) -> Tensor:
    """Returns what the L2 norm of a group adds up."""
    return weight.detach().float().pow(2)


def head_dim_sums(attn: Any, measure: Callable[[Tensor], Tensor] = squares) -> tuple[Tensor, Tensor]:
    """Adds up ``measure`` of all weights of each head dimension.

    Returns:
        (H, D) of queries and keys (their rows of qkv), (H, D) of values (rows of qkv and of a gate, columns of proj).
    """
    rows: Tensor = measure(attn.qkv.weight).sum(dim=1).reshape(3, attn.num_heads, -1)
    values: Tensor = rows[2] + measure(attn.proj.weight).sum(dim=0).reshape(attn.num_heads, -1)
    if attn.gate is not None:
        values = values + measure(attn.gate.weight).sum(dim=1).reshape(attn.num_heads, -1)
    return rows[0] + rows[1], values


def hidden_sums(mlp: Any, measure: Callable[[Tensor], Tensor] = squares) -> Tensor:
    """Adds up ``measure`` of all weights of each hidden dimension of an MLP: (hidden,), of a gated one those of its gate too."""
    columns: Tensor = measure(mlp.fc2.weight).sum(dim=0)
    return by_hidden(mlp, lambda layer: measure(layer.weight).sum(dim=1)) + columns


def first_layers(mlp: Any) -> dict[str, nn.Linear]:
    """Returns the layers of an MLP that read the stream, by name: one, or that of the gate and that of what is gated."""
    return {name: getattr(mlp, name) for name in ("fc1", "fc1_g", "fc1_x") if hasattr(mlp, name)}


def by_hidden(mlp: Any, measure: Callable[[nn.Linear], Tensor]) -> Tensor:
    """Adds up ``measure``, a number a row, of the first layers by the hidden dimension that a row belongs to: (hidden,)."""
    rows = torch.cat([measure(layer) for layer in first_layers(mlp).values()])
    return rows.reshape(-1, mlp.fc2.in_features).sum(dim=0)


def head_magnitudes(attn: Any) -> Tensor:
    """Returns (H,) float32: the L2 norm of all weights of each head, query, key, value rows and projection columns."""
    qk, v = head_dim_sums(attn)
    return (qk + v).sum(dim=1).sqrt()


def hidden_magnitudes(mlp: Any) -> Tensor:
    """Returns (hidden,) float32: the L2 norm of all weights of each hidden dimension of an MLP."""
    return hidden_sums(mlp).sqrt()


def block_magnitude(block: Any) -> float:
    """Returns the L2 norm of the weights with which a block writes into the residual stream, its LayerScale included."""
    return float(written(block).sum().sqrt())


def channel_magnitudes(model: nn.Module) -> Tensor:
    """Returns (C,) float32: the L2 norm of the weights that write into each channel of the residual stream."""
    vit: Any = model
    total: Tensor = vit.patch_embed.proj.weight.detach().float().flatten(1).pow(2).sum(dim=1)
    if vit.pos_embed is not None:
        total = total + vit.pos_embed.detach().float().flatten(0, 1).pow(2).sum(dim=0)
    for block in vit.blocks:
        total = total + written(block)
    return total.sqrt()


def written(block: Any) -> Tensor:
    """Returns (C,): the squared norms of the rows with which a block writes, times its LayerScale's, or a last norm's in their place."""
    if isinstance(
        block, POST_NORM
    ):  # what comes out has the variance 1 before the norm's factors, whatever the rows are
        return squares(block.norm1.weight) + squares(block.norm2.weight)
    parts = ((block.attn.proj, "ls1", "gamma_1"), (block.mlp.fc2, "ls2", "gamma_2"))
    return torch.stack([_scaled(writer, block, *scales) for writer, *scales in parts]).sum(dim=0)


def _scaled(writer: Any, block: Any, module: str, parameter: str) -> Tensor:
    rows = squares(writer.weight).sum(dim=1)
    scale = getattr(block, module, None)
    factors = scale.gamma if isinstance(scale, LayerScale) else getattr(block, parameter, None)
    return rows if factors is None else rows * squares(factors)


def largest(magnitudes: Tensor, count: int) -> Tensor:
    """Returns the indices of the ``count`` largest of the last dimension, ascending; of equals the first ones."""
    return magnitudes.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


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


def keep_head_dims(attn: Any, qk: Tensor, v: Tensor) -> None:
    """Leaves the given dimensions of every head of a timm ``Attention``.

    timm's softmax scale follows the head dimension; queries and keys take up the change, so that the logits stay what the
    dimensions that are left make of them.

    Args:
        qk: (H, d) which dimensions of queries and keys stay in each head; v: (H, d) of values.
    """
    H, D, d = attn.num_heads, attn.head_dim, qk.shape[1]
    start = torch.arange(H, device=qk.device)[:, None] * D
    seen, columns = (start + qk).flatten(), (start + v).flatten()
    attn.qkv = sliced(attn.qkv, rows=torch.cat([seen, H * D + seen, 2 * H * D + columns]))
    attn.proj = sliced(attn.proj, columns=columns)
    if attn.gate is not None:
        attn.gate = sliced(attn.gate, rows=columns)
    scale = d**-0.5
    with torch.no_grad():
        for parameter in attn.qkv.parameters():
            parameter[: 2 * H * d] *= (attn.scale / scale) ** 0.5
    attn.head_dim, attn.attn_dim, attn.scale = d, H * d, scale


def keep_hidden(mlp: Any, dims: Tensor) -> None:
    """Leaves the given hidden dimensions of a timm ``Mlp``, or with their gates of a ``GluMlp`` or ``SwiGLU``."""
    hidden = mlp.fc2.in_features
    for name, layer in first_layers(mlp).items():
        starts = torch.arange(0, layer.out_features, hidden, device=dims.device)[:, None]
        setattr(mlp, name, sliced(layer, rows=(starts + dims).flatten()))
    mlp.fc2 = sliced(mlp.fc2, columns=dims)


def keep_blocks(model: nn.Module, blocks: list[int]) -> None:
    """Leaves the given blocks of a timm ViT."""
    vit: Any = model
    if len(blocks) < len(vit.blocks):
        vit.blocks = nn.Sequential(*(vit.blocks[i] for i in blocks))
        vit.feature_info = vit.feature_info[: len(blocks)]


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
        for part in stream_vectors(block):
            _keep_in_vector(part, channels)
        attn, mlp = block.attn, block.mlp
        attn.qkv, attn.proj = sliced(attn.qkv, columns=channels), sliced(attn.proj, rows=channels)
        if attn.gate is not None:
            attn.gate = sliced(attn.gate, columns=channels)
        for name, layer in first_layers(mlp).items():
            setattr(mlp, name, sliced(layer, columns=channels))
        mlp.fc2 = sliced(mlp.fc2, rows=channels)
    for head in ("head", "head_dist"):
        if isinstance(getattr(vit, head, None), nn.Linear):
            setattr(vit, head, sliced(getattr(vit, head), columns=channels))
    vit.embed_dim = vit.num_features = vit.head_hidden_size = len(channels)


def stream_vectors(block: Any) -> list[nn.Module]:
    """Returns the norms and LayerScales of a block, which have a number a channel of the residual stream."""
    return [getattr(block, name) for name in ("norm1", "norm2", "ls1", "ls2") if hasattr(block, name)]


def _cut(parameter: Tensor, index: Tensor, dim: int = -1) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, index), parameter.requires_grad)


def _keep_in_vector(module: Any, channels: Tensor) -> None:
    """Cuts a norm or a LayerScale; a norm without parameters over no fixed shape (Identity) stays."""
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, _cut(parameter, channels))
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = (len(channels),)
