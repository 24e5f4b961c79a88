"""Taylor pruning: heads, dimensions and channels compete over all blocks by what they are worth for what they cost.

Source: Yang et al., Global Vision Transformer Pruning with Hessian-Aware Saliency (NViT), arXiv 2110.04869, sections 3.2 to
3.4 (importance of a group, latency term, one ranking over all kinds and layers); the importance (sum w dL/dw)^2 after
Molchanov et al., arXiv 1906.10771.
Differs from the paper: cost is counted in MACs, linear in what is removed, and divides the importance, instead of a measured
latency table that is subtracted; the cut comes before the recovery training in one or several steps, importance measured
anew for each, and not spread over the training. Head dimensions are removed equally many in all heads of a block, in each
head its least important ones, queries and keys apart from values, since timm's heads have one width.
Blocks end up with different dimensions, where the importance says so. Saves parameters, bytes, MACs and time; needs the
recovery training. Costs some passes over training images before it.
Not covered: what :mod:`magnitude_prune` refuses; the depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.pruning.shared_prunable import (
    Judge,
    channels_fault,
    fault,
    head_dims_fault,
    heads_fault,
    hidden_fault,
    require,
)
from workers.techniques.pruning.shared_slicing import (
    by_hidden,
    dimensions,
    first_layers,
    head_dim,
    head_dim_sums,
    hidden_sums,
    keep_channels,
    keep_head_dims,
    keep_heads,
    keep_hidden,
    largest,
    shrink_to,
    stream_vectors,
)
from workers.techniques.pruning.taylor_prune_mac_budget import Queue, Sizes, spend
from workers.techniques.record import Applied, ModelInfo, Surroundings, Technique, choice, number

KINDS = {
    "mlp": ("hidden",),
    "heads+mlp": ("heads", "hidden"),
    "heads+head_dims+mlp": ("heads", "head_dims", "hidden"),
    "all": ("heads", "head_dims", "hidden", "channels"),
}


@dataclass(frozen=True)
class Config:
    """How much is removed, of what, and what the ranking looks at."""

    ratio: float = number(0.3, 0.0, 0.8, 0.05, search=(0.1, 0.6, 0.1), doc="share of the blocks' MACs to remove")
    dimensions: str = choice("heads+mlp", tuple(KINDS), search=("mlp", "heads+mlp"), doc="what may be removed")
    cost_weight: float = number(
        1.0, 0.0, 1.0, 0.25, search=(0.0, 1.0, 0.5), doc="power of the MACs saved that divides the importance"
    )
    steps: int = choice(1, (1, 2, 4, 8), search=(1, 4), doc="cuts; importance is measured before each")
    batches: int = number(8, 1, 64, 1, search=(8, 8, 1), doc="batches of 64 training images a measurement")
    round_to: int = choice(8, (1, 4, 8, 16), search=(8,), doc="dimensions and channels left are a multiple of this")


# --- importance -------------------------------------------------------------------------------------------------------


@dataclass
class Importance:
    """Sum over batches of (sum w dL/dw)^2 of every group; blocks in lists.

    Attributes:
        heads: (H,); qk, v: (H, D) of the dimensions of queries and keys, and of values; hidden: (M,); channels: (C,).
    """

    heads: list[Tensor]
    qk: list[Tensor]
    v: list[Tensor]
    hidden: list[Tensor]
    channels: Tensor

    def units(self, kind: str, block: int) -> Tensor:
        """Returns (units,) ascending: the least important first, as they would be removed.

        The k-th unit of head dimensions are the k-th least important ones of every head of the block.
        """
        if kind == "head_dims":
            both = self.qk[block].sort(dim=1).values + self.v[block].sort(dim=1).values
            return both.sum(dim=0)
        found: Tensor = self.channels if kind == "channels" else getattr(self, kind)[block]
        return found.sort().values


def importance(
    model: nn.Module, surroundings: Surroundings, batches: int, kinds: tuple[str, ...] = KINDS["all"]
) -> Importance:
    """Measures the importance of groups on the first training batches, in eval mode; gradients are cleared afterwards.

    Args:
        kinds: what may be removed; of anything else it is 0, since not every attention has it.
    """
    vit: Any = model
    device = vit.patch_embed.proj.weight.device
    blocks, was_training = list(vit.blocks), vit.training
    shapes = [(block.attn.num_heads, head_dim(block.attn)) for block in blocks]
    found = Importance(
        [torch.zeros(H, device=device) for H, _ in shapes],
        [torch.zeros(H, D, device=device) for H, D in shapes],
        [torch.zeros(H, D, device=device) for H, D in shapes],
        [torch.zeros(block.mlp.fc2.in_features, device=device) for block in blocks],
        torch.zeros(vit.embed_dim, device=device),
    )
    model.eval()
    for images, labels in islice(surroundings.batches(), batches):
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images).float(), labels).backward()  # type: ignore[no-untyped-call]
        for i, block in enumerate(blocks):
            if "heads" in kinds:
                qk, v = _head_dims(block.attn)
                found.heads[i] += (qk + v).sum(dim=1).square()
                found.qk[i] += qk.square()
                found.v[i] += v.square()
            found.hidden[i] += _hidden(block.mlp).square()
        if "channels" in kinds:
            found.channels += _channels(vit).square()
        surroundings.tick()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return found


def _first_order(parameter: Any) -> Tensor:
    """Returns w dL/dw, float32; what the loss would change by, to the first order, without the weight."""
    if parameter is None or parameter.grad is None:
        return torch.zeros(()) if parameter is None else torch.zeros_like(parameter)
    product: Tensor = (parameter.detach() * parameter.grad).float()
    return product


def _head_dims(attn: Any) -> tuple[Tensor, Tensor]:
    """Returns first-order changes, (H, D) of queries and keys, (H, D) of values, biases among them."""
    qk, v = head_dim_sums(attn, _first_order)
    if attn.qkv.bias is not None:
        bias = _first_order(attn.qkv.bias).reshape(3, attn.num_heads, -1)
        qk, v = qk + bias[0] + bias[1], v + bias[2]
    if attn.gate is not None and attn.gate.bias is not None:
        v = v + _first_order(attn.gate.bias).reshape(attn.num_heads, -1)
    return qk, v


def _hidden(mlp: Any) -> Tensor:
    """Returns (M,): first-order changes of all weights of each hidden dimension, biases among them."""
    weights = hidden_sums(mlp, _first_order)
    biased = all(layer.bias is not None for layer in first_layers(mlp).values())
    return weights + by_hidden(mlp, lambda layer: _first_order(layer.bias)) if biased else weights


def _channels(vit: Any) -> Tensor:
    """Returns (C,): first-order changes of all weights that write into or read from each channel."""
    conv = vit.patch_embed.proj
    total = _first_order(conv.weight).flatten(1).sum(dim=1) + _first_order(conv.bias)
    for token in ("cls_token", "reg_token", "dist_token", "pos_embed"):
        if getattr(vit, token, None) is not None:
            total = total + _first_order(getattr(vit, token)).flatten(0, -2).sum(dim=0)
    vectors = [vit.patch_embed.norm, vit.norm_pre, vit.norm, vit.fc_norm]
    readers, writers = [vit.head, getattr(vit, "head_dist", None)], []
    for block in vit.blocks:
        vectors += stream_vectors(block)
        readers += [block.attn.qkv, block.attn.gate, *first_layers(block.mlp).values()]
        writers += [block.attn.proj, block.mlp.fc2]
    for vector in vectors:
        for parameter in vector.parameters(recurse=False):
            total = total + _first_order(parameter)
    for reader in readers:
        if isinstance(reader, nn.Linear):
            total = total + _first_order(reader.weight).sum(dim=0)
    for writer in writers:
        total = total + _first_order(writer.weight).sum(dim=1) + _first_order(writer.bias)
    return total


def _sizes(model: nn.Module) -> Sizes:
    vit: Any = model
    counts = dimensions(model)
    tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
    matrices = 1 + sum(layer.out_features for layer in first_layers(vit.blocks[0].mlp).values()) // counts["hidden"][0]
    return Sizes(tokens, counts["channels"], counts["heads"], counts["head_dims"], counts["hidden"], matrices)


# --- the cut ----------------------------------------------------------------------------------------------------------


def _places(sizes: Sizes, config: Config) -> list[tuple[str, int, int]]:
    """Returns (kind, block, units at a time) of everything that competes; channels have one place for all blocks."""
    found = []
    for kind in KINDS[config.dimensions]:
        unit = 1 if kind == "heads" else config.round_to
        found += [(kind, i, unit) for i in range(1 if kind == "channels" else len(sizes.heads))]
    return found


def _least(sizes: Sizes, config: Config) -> int:
    """Returns the MACs of the blocks when all is removed that may be."""
    for kind, block, unit in _places(sizes, config):
        sizes.remove(kind, block, max(0, sizes.count(kind, block) - unit))
    return sizes.macs()


def _cut(model: nn.Module, found: Importance, sizes: Sizes) -> None:
    """Leaves the most important groups, as many as ``sizes`` says."""
    vit: Any = model
    for i, block in enumerate(vit.blocks):
        attn, qk, v = block.attn, found.qk[i], found.v[i]
        if sizes.heads[i] < attn.num_heads:
            heads = largest(found.heads[i], sizes.heads[i])
            keep_heads(attn, heads)
            qk, v = qk[heads], v[heads]
        if sizes.head_dims[i] < head_dim(attn):
            keep_head_dims(attn, largest(qk, sizes.head_dims[i]), largest(v, sizes.head_dims[i]))
        if sizes.hidden[i] < block.mlp.fc2.in_features:
            keep_hidden(block.mlp, largest(found.hidden[i], sizes.hidden[i]))
    if sizes.channels < vit.embed_dim:
        keep_channels(vit, largest(found.channels, sizes.channels))


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    parts = {"heads": "attn", "head_dims": "attn", "hidden": "mlp"}
    names = {
        f"blocks.{i}.{part}"
        for kind, part in parts.items()
        for i, (b, a) in enumerate(zip(before[kind], after[kind], strict=True))
        if a < b
    }
    return sorted(names) + (["patch_embed"] if after["channels"] < before["channels"] else [])


# --- record -----------------------------------------------------------------------------------------------------------


JUDGES: Mapping[str, Judge] = {
    "heads": heads_fault,
    "head_dims": head_dims_fault,
    "hidden": hidden_fault,
    "channels": channels_fault,
}


def _fault(info: ModelInfo, kinds: tuple[str, ...]) -> str | None:
    """Returns why a kind cannot be removed from the model, or None."""
    return fault(info, {kind: JUDGES[kind] for kind in kinds})


def _check(info: ModelInfo, config: Config) -> str | None:
    if reason := _fault(info, KINDS[config.dimensions]):
        able = " or ".join(name for name, kinds in KINDS.items() if _fault(info, kinds) is None)
        return f"dimensions={config.dimensions}: {reason}" + (f"; must be {able}" if able else "")
    sizes = Sizes(
        info.num_tokens, info.embed_dim, list(info.num_heads), [info.head_dim] * info.depth, list(info.mlp_hidden),
        info.mlp_matrices,
    )  # fmt: skip
    whole = sizes.macs()
    if config.ratio == 0:
        return "ratio=0 removes nothing"
    if (most := 1 - _least(sizes, config) / whole) < config.ratio:
        return (
            f"ratio={config.ratio:g} is out of reach: {config.dimensions} with round_to={config.round_to} are at most "
            f"{most:.2f} of the blocks' MACs"
        )
    return None


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    require(model, "taylor_prune", {kind: JUDGES[kind] for kind in KINDS[config.dimensions]})
    before, whole = dimensions(model), _sizes(model).macs()
    for step in range(1, config.steps + 1) if config.ratio else ():
        found = importance(model, surroundings, config.batches, KINDS[config.dimensions])
        sizes = _sizes(model)
        waiting = []
        for kind, block, unit in _places(sizes, config):
            sums = found.units(kind, block).double().cumsum(dim=0).tolist()
            waiting.append(Queue(kind, block, [0.0, *sums], unit))
        spend(sizes, waiting, whole * (1 - config.ratio * step / config.steps), config.cost_weight)
        _cut(model, found, sizes)
    return Applied(model, dimensions(model), _changed(before, dimensions(model)))


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    return shrink_to(model, resolved)


def _trains(config: Config) -> bool:
    return config.ratio > 0


TECHNIQUE = Technique(
    name="taylor_prune",
    family="pruning",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    identity={"ratio": 0.0},
    trains=_trains,
    either_order={"magnitude_prune": "each ranks what the other left"},
    source="NViT, arXiv 2110.04869, sections 3.2 to 3.4; importance after arXiv 1906.10771",
)
