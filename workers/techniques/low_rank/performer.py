"""Performer: the softmax kernel as a product of positive random features, hence attention linear in the sequence.

Source: Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794, sections 2.2 to 2.4 (FAVOR+).
Differs from the paper: no small constant is added to the features; instead each feature's largest exponent over the keys is
moved to the queries, which cancels exactly and keeps every denominator at 1 or above. The features are drawn once and
kept (no redrawing during the training); only attention over the whole sequence, no causal one.
Size is unchanged but for the projections. With m features of head dimension D the products cost 4 N m D against the 2 N^2 D
of exact attention: less from N = 2 m on, 532 tokens at the default of D = 64.
Not covered: attention masks, dropout of attention weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.low_rank.shared_attention import (
    as_written,
    attention_fault,
    attention_names,
    replace_attention,
    require_attention,
)
from workers.techniques.low_rank.shared_random_features import (
    RandomFeatureAttention,
    draw_projections,
    empty_projections,
    positive_features,
)
from workers.techniques.record import Applied, ModelInfo, Rule, Surroundings, Technique, choice, number


@dataclass(frozen=True)
class Config:
    """How many random features stand for the softmax kernel."""

    features: float = number(
        1.0, 0.25, 2.0, 0.125, search=(0.25, 1.5, 0.25), doc="random features, in units of int(D ln D)"
    )
    recover: bool = choice(True, (True, False), search=(True,), doc="asks for the recovery training")


# --- mathematics ------------------------------------------------------------------------------------------------------


def performer_attention(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, scale: float, size: Tensor | None = None
) -> Tensor:
    """Approximates softmax(scale q k^T + log size) v.

    Args:
        q, k, v: (B, H, N, D); projection: (m, D).
        size: (B, N, 1) how often each key counts, at least 1; None for once.

    Returns:
        (B, H, N, D) in the type of v. Features are calculated in float32 at least, products of them in the type of v,
        but for float16, whose range is too small for sums over tokens and features.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    narrow = wide if v.dtype == torch.float16 else v.dtype
    with as_written(q.device):
        queries, keys, _ = positive_features(q.to(wide), k.to(wide), projection.to(wide), scale)
        if size is not None:
            keys = keys * size[:, None].to(wide)
        queries, keys = queries.to(narrow), keys.to(narrow)
        total = queries @ keys.sum(dim=-2)[..., None]
        mixed = queries @ (keys.transpose(-1, -2) @ v.to(narrow))
    return (mixed / total).to(v.dtype)


# --- module -----------------------------------------------------------------------------------------------------------


class PerformerAttention(RandomFeatureAttention):
    """Attention through positive random features."""

    technique = "performer"

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :func:`performer_attention`."""
        return performer_attention(q, k, v, self.projection, self.scale)

    def attend_sized(self, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attends over merged tokens: a key of size s counts as s equal keys, exactly.

        Args:
            x: (B, N, C); size: (B, N, 1), None where every token counts once.

        Returns:
            output (B, N, C), keys averaged over the heads (B, N, D).
        """
        q, k, v = self.split(x)
        return self.join(x, performer_attention(q, k, v, self.projection, self.scale, size)), k.mean(dim=1)


# --- record -----------------------------------------------------------------------------------------------------------


def _check(info: ModelInfo, config: Config) -> str | None:
    if reason := attention_fault(info):
        return reason
    if info.head_dim < 2:
        return "head_dim must be 2 or more: int(D ln D) is 0 for 1"
    return None


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    require_attention(model, "performer")
    projections = draw_projections(model, config.features, surroundings)
    replace_attention(model, lambda attn, i: PerformerAttention(attn, projections[i]))
    return Applied(model, {"features": [len(p) for p in projections]}, attention_names(model))


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    projections = empty_projections(model, resolved["features"])
    return replace_attention(model, lambda attn, i: PerformerAttention(attn, projections[i]))


def _trains(config: Config) -> bool:
    return config.recover


TECHNIQUE = Technique(
    name="performer",
    family="low_rank_attention",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    trains=_trains,
    rules=(Rule(("tome", "pitome"), "allowed", "exact when key features are multiplied by token size"),),
    source="Rethinking Attention with Performers, arXiv 2009.14794, sections 2.2 to 2.4",
)
