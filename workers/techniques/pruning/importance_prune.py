"""Importance pruning: gates on heads, head and MLP dimensions learn what matters; what they close is removed for good.

Source: Zhu et al., Vision Transformer Pruning, arXiv 2104.08500, section 3 (gates on the dimensions of the attention and the
MLP, L1 penalty, one threshold over all layers, fine-tuning).
Differs from the paper: one training instead of two: in its first half the gates are learned, in its second half those below
the threshold stay closed and the rest is fine-tuned, then rows and columns are removed, which changes nothing that is
computed any more. Kinds are ranked apart, each with its own ratio and threshold over all blocks. Whole heads have gates; a
gate of a head dimension is shared by the heads of its block, and by queries, keys and values, because timm's heads have
one width. Counts are rounded to a multiple a block.
Between the surgery and the end of the training the model has its full size, and in evaluation it computes what it will
compute when it is cut: stopping early picks by the right accuracy.
Saves parameters, bytes, MACs and time once the training is over. Not covered: what :mod:`magnitude_prune` refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.low_rank.shared_random_features import RandomFeatureAttention
from workers.techniques.pruning.importance_prune_gates import Gate, GatedKeys, HeadGates, open_gates
from workers.techniques.pruning.shared_prunable import (
    Judge,
    fault,
    head_dims_fault,
    heads_fault,
    hidden_fault,
    require,
)
from workers.techniques.pruning.shared_slicing import (
    dimensions,
    head_dim_sums,
    head_magnitudes,
    hidden_magnitudes,
    keep_head_dims,
    keep_heads,
    keep_hidden,
    shrink_to,
)
from workers.techniques.record import Applied, LossInputs, LossTerm, ModelInfo, Surroundings, Technique, choice, number

CLOSE_AT = 0.5
"""Share of the training after which the gates below the threshold stay closed and the penalty ends."""

GATE_LR = 1e-2
"""Peak learning rate of the gates: with Adam a gate can close in a hundred steps."""

TIE = 1e-6
"""Advantage of a gate that is open over one that is closed: gates that are equal stay as they are."""


@dataclass(frozen=True)
class Config:
    """The share of each kind that the model loses, over all blocks together, and how hard gates are pressed to close."""

    head_ratio: float = number(0.25, 0.0, 0.6, 0.05, search=(0.0, 0.6, 0.1), doc="share of all heads to remove")
    mlp_ratio: float = number(0.25, 0.0, 0.6, 0.05, search=(0.0, 0.6, 0.1), doc="share of all MLP dimensions to remove")
    head_dim_ratio: float = number(
        0.0, 0.0, 0.6, 0.05, search=(0.0, 0.0, 0.05), doc="share of the dimensions of all heads to remove"
    )
    l1: float = choice(1e-4, (0.0, 1e-5, 1e-4, 1e-3), search=(1e-4,), doc="weight of the sum of all gates in the loss")
    round_to: int = choice(8, (1, 4, 8, 16), search=(8,), doc="dimensions left of a block are a multiple of this")


# --- the gates of a model ---------------------------------------------------------------------------------------------


def _put_gates(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Puts gates into every block for the kinds whose ratio is not 0; returns the model."""
    vit: Any = model
    device = vit.patch_embed.proj.weight.device
    for block in vit.blocks:
        attn, mlp = block.attn, block.mlp
        heads = Gate(attn.num_heads, device) if config["head_ratio"] else None
        dims = Gate(attn.head_dim, device) if config["head_dim_ratio"] else None
        if heads is not None or dims is not None:
            attn.norm = HeadGates(heads, dims, attn.num_heads)
            attn.k_norm = GatedKeys(attn.k_norm, heads, dims)
        if dims is not None:
            attn.q_norm = dims
        if config["mlp_ratio"]:
            mlp.norm = Gate(mlp.fc2.in_features, device)
    # New modules are in training mode, where gates are soft.
    return model.train(model.training)


@dataclass(frozen=True)
class Kind:
    """What gates there are: the ratio that asks for them, where they lie in a block, and what its weights say of each.

    Attributes:
        coarse: whether the number that stays is a multiple of ``round_to``.
    """

    ratio: str
    gate: Callable[[Any], Gate]
    strength: Callable[[Any], Tensor]
    coarse: bool


KINDS = (
    Kind("head_ratio", lambda block: block.attn.norm.heads, lambda block: head_magnitudes(block.attn), False),
    Kind("head_dim_ratio", lambda block: block.attn.norm.dims, lambda block: _head_dim_strength(block.attn), True),
    Kind("mlp_ratio", lambda block: block.mlp.norm, lambda block: hidden_magnitudes(block.mlp), True),
)


def _head_dim_strength(attn: Any) -> Tensor:
    qk, v = head_dim_sums(attn)
    return (qk + v).sum(dim=0).sqrt()


def _kinds(model: nn.Module, config: Config) -> Iterator[tuple[Kind, list[Gate]]]:
    """Yields every kind that is asked for, with its gates, one a block."""
    vit: Any = model
    for kind in KINDS:
        if getattr(config, kind.ratio):
            yield kind, [kind.gate(block) for block in vit.blocks]


def _gates(model: nn.Module, config: Config) -> list[Gate]:
    return [gate for _, gates in _kinds(model, config) for gate in gates]


@torch.no_grad()
def _choose(kind: Kind, gates: Sequence[Gate], scores: Sequence[Tensor], config: Config) -> None:
    """Opens the gates with the highest scores, (n,) a block, and closes the others."""
    masks = open_gates(scores, getattr(config, kind.ratio), config.round_to if kind.coarse else 1)
    for gate, mask in zip(gates, masks, strict=True):
        gate.is_open.copy_(mask)


# --- training ---------------------------------------------------------------------------------------------------------


def _loss(inputs: LossInputs, config: Config) -> LossTerm:
    gates = _gates(inputs.model, config)
    if inputs.progress >= CLOSE_AT or not gates:
        return LossTerm(1.0, inputs.logits.new_zeros(()))
    return LossTerm(1.0, config.l1 * torch.stack([gate.weight.abs().sum() for gate in gates]).sum())


def _groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    return [{"params": [gate.weight for gate in _gates(model, config)], "lr": GATE_LR, "weight_decay": 0.0}]


def _on_progress(model: nn.Module, config: Config, progress: float) -> None:
    for kind, gates in _kinds(model, config):
        if progress < CLOSE_AT:
            _choose(kind, gates, [gate.weight.detach().abs() + TIE * gate.is_open for gate in gates], config)
        for gate in gates:
            gate.closed = progress >= CLOSE_AT


@torch.no_grad()
def _finalise(model: nn.Module, config: Config) -> dict[str, Any]:
    """Multiplies the gates into the weights behind them and removes what they close."""
    vit: Any = model
    for block in vit.blocks:
        _cut_attention(block.attn)
        if isinstance(block.mlp.norm, Gate):
            gate, block.mlp.norm = block.mlp.norm, nn.Identity()
            block.mlp.fc2.weight *= gate.weight
            keep_hidden(block.mlp, gate.is_open.nonzero()[:, 0])
    return {"gates": None, **dimensions(model)}


def _cut_attention(attn: Any) -> None:
    """Cuts the attention of a block, also one that a low-rank attention has taken the place of."""
    gates = getattr(attn, "norm", None)
    if not isinstance(gates, HeadGates):
        return
    attn.norm, attn.k_norm = nn.Identity(), attn.k_norm.norm
    D = attn.head_dim
    if gates.heads is not None:
        attn.proj.weight *= gates.heads.weight.repeat_interleave(D)
        keep_heads(attn, gates.heads.is_open.nonzero()[:, 0])
    if gates.dims is not None:
        attn.q_norm = nn.Identity()
        factors, H = gates.dims.weight.repeat(attn.num_heads), attn.num_heads
        attn.proj.weight *= factors
        attn.qkv.weight[: H * D] *= factors[:, None]
        if attn.qkv.bias is not None:
            attn.qkv.bias[: H * D] *= factors
        left = gates.dims.is_open.nonzero()[:, 0]
        keep_head_dims(attn, left.expand(H, -1), left.expand(H, -1))
        if isinstance(attn, RandomFeatureAttention):
            attn.keep_dims(left)


# --- record -----------------------------------------------------------------------------------------------------------


JUDGES: Mapping[str, Judge] = {
    "head_ratio": heads_fault,
    "mlp_ratio": hidden_fault,
    "head_dim_ratio": head_dims_fault,
}


def _wanted(config: Config) -> dict[str, Judge]:
    """Returns who judges what the config asks for."""
    return {f"{name}={value:g}": judge for name, judge in JUDGES.items() if (value := getattr(config, name))}


def _check(info: ModelInfo, config: Config) -> str | None:
    if reason := fault(info, _wanted(config)):
        return f"{reason}; must be 0"
    if not any(_removes(info, kind, config) for kind in KINDS):
        ratios = ", ".join(f"{kind.ratio}={getattr(config, kind.ratio):g}" for kind in KINDS)
        return (
            f"{ratios} (round_to={config.round_to}) remove nothing from {max(info.num_heads)} heads of {info.head_dim} "
            f"and {max(info.mlp_hidden)} MLP dimensions a block"
        )
    return None


def _removes(info: ModelInfo, kind: Kind, config: Config) -> bool:
    """Whether a ratio closes a gate at all, and some block has more than it must keep."""
    counts = {
        "head_ratio": info.num_heads,
        "head_dim_ratio": (info.head_dim,) * info.depth,
        "mlp_ratio": info.mlp_hidden,
    }[kind.ratio]
    closes = round(sum(counts) * (1 - getattr(config, kind.ratio))) < sum(counts)
    return closes and max(counts) > (config.round_to if kind.coarse else 1)


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    require(model, "importance_prune", _wanted(config))
    vit: Any = model
    ratios = {name: value for name, value in vars(config).items() if name.endswith("_ratio")}
    _put_gates(model, ratios)
    # Gates are equal at first; until they differ, magnitudes say which would be closed.
    for kind, gates in _kinds(model, config):
        strengths = [kind.strength(block) for block in vit.blocks]
        _choose(kind, gates, [s / s.mean() for s in strengths], config)
    changed = [f"blocks.{i}" for i in range(len(vit.blocks))] if _gates(model, config) else []
    return Applied(model, {"gates": ratios}, changed)


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    if resolved["gates"] is not None:
        return _put_gates(model, resolved["gates"])
    return shrink_to(model, resolved)


def _trains(config: Config) -> bool:
    return any(value > 0 for name, value in vars(config).items() if name.endswith("_ratio"))


TECHNIQUE = Technique(
    name="importance_prune",
    family="pruning",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    identity={"head_ratio": 0.0, "mlp_ratio": 0.0},
    trains=_trains,
    loss=_loss,
    parameter_groups=_groups,
    on_progress=_on_progress,
    finalise=_finalise,
    source="Vision Transformer Pruning, arXiv 2104.08500, section 3",
)
