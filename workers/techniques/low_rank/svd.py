"""svd: a linear layer's weight becomes the product of two thin ones, its best approximation of that rank.

Source: Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1 (1936): of all matrices of rank r
the first r terms of the singular value decomposition are nearest to W; the squared error is the sum of the squared singular values
that were left out. For layers of networks: Denton et al., arXiv 1404.0736, section 3.2.1; for all layers of a transformer, with training
afterwards: Ben Noach and Goldberg, Compressing Pre-trained Language Models by Matrix Decomposition, AACL 2020.
Differs from the papers: ranks differ by layer where ``energy`` asks for it; both factors take the square root of the singular values, so
that neither is much larger than the other when it is trained or quantised; queries, keys and values of a timm block are one matrix,
and share the first factor; no distillation of its own (:mod:`distill` is that).

A layer of O by I weights becomes two of r (O + I) together, and costs as many MACs a token. Layers where that is no less are left as
they are. Saves bytes, params and MACs in proportion; time where layers are wide, since two thin products are less well used than one.
Not covered: ranks chosen by what comes into a layer (activation-aware variants), the patch embedding, heads, word embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.low_rank.shared_block_linears import CHOICES, block_linears
from workers.techniques.record import Applied, ModelInfo, Rule, Surroundings, Technique, choice, number


@dataclass(frozen=True)
class Config:
    """Which layers, how many weights or how much energy stays, and whether the model is trained afterwards."""

    keep: float = number(
        0.5,
        0.05,
        1.0,
        0.05,
        search=(0.3, 0.9, 0.1),
        doc="weights of the two factors at most, as a share of the layer's",
    )
    energy: float = number(
        1.0,
        0.5,
        1.0,
        0.01,
        search=(1.0, 1.0, 0.01),
        doc="share of the squared singular values that is enough for a layer; 1 asks for none, keep decides",
    )
    layers: str = choice("all", CHOICES, search=("all", "mlp"), doc="which layers of the blocks")
    round_to: int = choice(8, (1, 4, 8, 16), search=(8,), doc="ranks are a multiple of this")
    recover: bool = choice(True, (True, False), search=(True,), doc="train the factors in the recovery training")


# --- mathematics ------------------------------------------------------------------------------------------------------


def rank_for_share(rows: int, columns: int, keep: float, round_to: int) -> int | None:
    """Returns the largest rank, a multiple of ``round_to``, whose factors have at most ``keep`` of the weights; None if there is none.

    None too where the factors would not have fewer weights than the layer.
    """
    weights, each = rows * columns, rows + columns
    rank = int(keep * weights / each + 1e-9) // round_to * round_to
    if rank * each == weights:
        rank -= round_to
    return rank if rank > 0 else None


def rank_for_energy(singular: Tensor, energy: float, round_to: int) -> int:
    """Returns the smallest rank whose singular values hold ``energy`` of the sum of their squares, rounded up to ``round_to``.

    Args:
        singular: (min(O, I),) falling.
    """
    held = singular.double().square().cumsum(0)
    # A rounding error of the sum must not ask for all the values that are zero.
    enough = held >= energy * held[-1] * (1 - 1e-12)
    first = int(enough.int().argmax()) + 1
    return math.ceil(first / round_to) * round_to


def decompose(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U (O, R), the singular values (R,) falling, and V^T (R, I) of weight (O, I), float64 on the CPU, R = min(O, I).

    There, so that a recipe has the same factors whatever device it is trained on.
    """
    U, S, V = torch.linalg.svd(weight.detach().double().cpu(), full_matrices=False)
    return U, S, V


# --- the layer --------------------------------------------------------------------------------------------------------


class Factored(nn.Sequential):
    """x -> second(first(x)): (..., I) to (..., r) without a bias, to (..., O) with the layer's own.

    Two ordinary linear layers, so that whatever takes linear layers afterwards takes these.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(
            nn.Linear(in_features, rank, bias=False, device="meta", dtype=dtype),
            nn.Linear(rank, out_features, bias=bias, device="meta", dtype=dtype),
        )
        self.in_features = in_features
        self.out_features = out_features

    @classmethod
    def like(cls, linear: Any, rank: int) -> Factored:
        """Returns factors of a layer's shape, without values."""
        made = cls(
            linear.in_features, linear.out_features, rank, bias=linear.bias is not None, dtype=linear.weight.dtype
        )
        return made.train(linear.training)


@torch.no_grad()
def factored(linear: nn.Linear, rank: int, parts: tuple[Tensor, Tensor, Tensor]) -> Factored:
    """Returns the layer's best approximation of ``rank`` from its :func:`decompose`; its bias stays."""
    U, S, V = parts
    root = S[:rank].sqrt()
    made = Factored.like(linear, rank)
    first: Any = made[0]
    second: Any = made[1]
    # Kernels and files take rows that lie one after the other, which those of a slice of U do not.
    first.weight = nn.Parameter((root[:, None] * V[:rank]).to(linear.weight).contiguous())
    second.weight = nn.Parameter((U[:, :rank] * root).to(linear.weight).contiguous())
    if linear.bias is not None:
        second.bias = nn.Parameter(linear.bias.detach().clone())
    return made


# --- record -----------------------------------------------------------------------------------------------------------


def _check(info: ModelInfo, config: Config) -> str | None:
    if config.keep == 1 and config.energy == 1:
        return "keep=1 and energy=1 leave every layer as it is"
    width, hidden = info.embed_dim, max(info.mlp_hidden)
    inner = max(info.num_heads) * info.head_dim
    attention = [(3 * inner if info.family == "timm" else inner, width), (width, inner)]
    shapes = (attention if config.layers != "mlp" else []) + ([(hidden, width)] if config.layers != "attention" else [])
    if any(rank_for_share(rows, columns, config.keep, config.round_to) for rows, columns in shapes):
        return None
    sizes = ", ".join(f"{rows} x {columns}" for rows, columns in shapes)
    return f"keep={config.keep:g} (round_to={config.round_to}) leaves no rank for layers of {sizes}"


@torch.no_grad()
def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Replaces the linear layers in place, where that saves weights."""
    ranks: dict[str, int] = {}
    for name, (linear, most) in _chosen(model, config).items():
        surroundings.tick()
        parts = decompose(linear.weight)
        rank = most if config.energy == 1 else rank_for_energy(parts[1], config.energy, config.round_to)
        if rank > most and config.keep == 1:
            continue
        ranks[name] = rank = min(rank, most)
        model.set_submodule(name, factored(linear, rank, parts))
    return Applied(model, {"ranks": ranks}, list(ranks))


def _chosen(model: nn.Module, config: Config) -> dict[str, tuple[nn.Linear, int]]:
    """Returns by name the layers that factors can make smaller, with the largest rank that ``keep`` allows."""
    if config.keep == config.energy == 1:
        return {}
    found = block_linears(model, config.layers).items()
    ranks = {n: rank_for_share(x.out_features, x.in_features, config.keep, config.round_to) for n, x in found}
    return {name: (linear, most) for name, linear in found if (most := ranks[name]) is not None}


def _foresee(model: nn.Module, config: Config, surroundings: Surroundings) -> dict[str, Any]:
    """Raises ValueError where singular values decide."""
    if config.energy < 1:
        raise ValueError(f"energy={config.energy:g}: the ranks are decided by the weights' singular values")
    return {"ranks": {name: most for name, (_, most) in _chosen(model, config).items()}}


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Replaces the same layers of a skeleton by factors without values."""
    for name, rank in resolved["ranks"].items():
        model.set_submodule(name, Factored.like(model.get_submodule(name), rank))
    return model


TECHNIQUE = Technique(
    name="svd",
    family="low_rank_weights",
    version=2,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    foresee=_foresee,
    check=_check,
    identity={"keep": 1.0},
    trains=lambda config: config.recover,
    rules=(
        Rule(
            ("importance_prune",),
            "forbidden",
            "its gates are cut out of whole weights after the training, which the other no longer has",
        ),
        Rule(
            ("semi_structured_prune",),
            "experimental",
            "factors of a sparse weight are dense: sound only with the factors made first, and sparse",
        ),
    ),
    models=("timm", "vilt", "meter"),
    source="Eckart and Young 1936; Denton et al. 2014, arXiv 1404.0736, section 3.2.1; Ben Noach and Goldberg 2020",
)
