"""Scatterbrain: exact softmax weights near each token, random features for all the rest.

Source: Chen et al., Scatterbrain, arXiv 2110.15343, section 4 (sparse and low-rank as one estimate: on the support
exp(q k) - phi(q) phi(k), everywhere phi(q) phi(k)).
Differs from the paper: the support is local and not hashed: blocks of neighbouring tokens, each with the block before and
after it; class, distillation and register tokens attend and are attended to everywhere, exactly. Both parts of a weight
share one stabilised exponent a query.
Size is unchanged but for the projections. With m features, head dimension D and windows of w tokens the products cost
N (4 m D + 3 w (2 D + m)) against the 2 N^2 D of exact attention; no N by N matrix is formed. Everything on the support
and the features is calculated in float32 at least, since the difference of the two parts loses digits.
Not covered: attention masks, dropout of attention weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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
    """How far a token sees exactly, and how many random features stand for the rest."""

    window: int = number(14, 4, 64, 1, search=(8, 32, 4), doc="tokens in a block; its neighbour blocks are exact too")
    features: float = number(
        0.5, 0.25, 2.0, 0.125, search=(0.25, 1.0, 0.25), doc="random features, in units of int(D ln D)"
    )
    recover: bool = choice(True, (True, False), search=(True,), doc="asks for the recovery training")


# --- mathematics ------------------------------------------------------------------------------------------------------

NOISE = 1e-6
"""Share of the random features' total below which a difference from it is rounding (float32 has 24 bits)."""


def blocks(x: Tensor, window: int) -> Tensor:
    """Cuts x (..., N, D) into blocks of ``window`` tokens, the last filled up with zeros: (..., n, window, D)."""
    n = -(-x.shape[-2] // window)
    return F.pad(x, (0, 0, 0, n * window - x.shape[-2])).reshape(*x.shape[:-2], n, window, x.shape[-1])


def neighbours(x: Tensor, window: int) -> Tensor:
    """Returns the tokens of each block, of the one before and of the one after, zeros beyond the ends.

    (..., N, D) -> (..., n, 3 window, D).
    """
    n = -(-x.shape[-2] // window)
    padded = F.pad(x, (0, 0, window, (n + 1) * window - x.shape[-2]))
    return padded.unfold(-2, 3 * window, window).transpose(-1, -2)


def local_and_rest(
    q: Tensor, k: Tensor, v: Tensor, everywhere: tuple[Tensor, Tensor], projection: Tensor, window: int, scale: float
) -> Tensor:
    """Attends exactly to near tokens and to some that are near to all, and by random features to the rest.

    Args:
        q, k, v: (B, H, N, D), float32 or wider: the tokens whose position counts.
        everywhere: keys and values (B, H, P, D) that every query sees exactly.
        window: tokens in a block; 0 for none near.

    Returns:
        (B, H, N, D).
    """
    N, P = q.shape[-2], everywhere[0].shape[-2]
    queries, features, offset = positive_features(q, k, projection, scale)
    rest = queries @ (features.transpose(-1, -2) @ v)
    rest_total = queries @ features.sum(dim=-2)[..., None]
    length = window or N

    def near(x: Tensor) -> Tensor:
        return neighbours(x, window) if window else x[..., None, :0, :]

    def with_everywhere(always: Tensor, x: Tensor) -> Tensor:
        local = near(x)
        return torch.cat([always[..., None, :, :].expand(*local.shape[:-2], P, -1), local], dim=-2)

    keys, values = with_everywhere(everywhere[0], k), with_everywhere(everywhere[1], v)
    absent = F.pad(near(q.new_ones(N, 1))[..., 0] == 0, (P, 0))[:, None]
    scores = (blocks(q, length) @ keys.transpose(-1, -2) * scale).masked_fill(absent, -torch.inf)
    lift = blocks(offset, length)
    top = torch.cat([scores, lift], dim=-1).detach().amax(dim=-1, keepdim=True)
    exact, share = (scores - top).exp(), (lift - top).exp()
    # The features know only of the tokens with a position, so nothing has to be taken off for the others.
    estimate = F.pad(blocks(queries, length) @ near(features).transpose(-1, -2), (P, 0))
    weights = exact - share * estimate
    rest, rest_total = share * blocks(rest, length), share * blocks(rest_total, length)
    total = weights.sum(dim=-1, keepdim=True) + rest_total
    # Both are below the true total; where the difference of two larger numbers falls under them it is rounding.
    total = torch.maximum(total, torch.maximum(exact.sum(dim=-1, keepdim=True), NOISE * rest_total))
    return ((weights @ values + rest) / total).flatten(-3, -2)[..., :N, :]


def scatterbrain_attention(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, window: int, prefix: int, scale: float
) -> Tensor:
    """Approximates softmax(scale q k^T) v; exact where the window covers all tokens, Performer without a support.

    Args:
        q, k, v: (B, H, N, D); projection: (m, D).
        window: tokens in a block; prefix: tokens in front that have no position.

    Returns:
        (B, H, N, D) in the type of v.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with as_written(q.device):
        wq, wk, wv = q[:, :, prefix:].to(wide), k.to(wide), v.to(wide)
        everywhere = wk[:, :, :prefix], wv[:, :, :prefix]
        patches = local_and_rest(
            wq, wk[:, :, prefix:], wv[:, :, prefix:], everywhere, projection.to(wide), window, scale
        ).to(v.dtype)
    if not prefix:
        return patches
    first = F.scaled_dot_product_attention(q[:, :, :prefix], k, v, scale=scale)
    return torch.cat([first.to(v.dtype), patches], dim=2)


# --- module -----------------------------------------------------------------------------------------------------------


class ScatterbrainAttention(RandomFeatureAttention):
    """Exact attention to near tokens, random features for the rest."""

    technique = "scatterbrain"

    def __init__(self, attn: Any, projection: Tensor, window: int, prefix: int) -> None:
        super().__init__(attn, projection)
        self.window, self.prefix = window, prefix

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :func:`scatterbrain_attention`."""
        return scatterbrain_attention(q, k, v, self.projection, self.window, self.prefix, self.scale)


# --- record -----------------------------------------------------------------------------------------------------------


def _check(info: ModelInfo, config: Config) -> str | None:
    if reason := attention_fault(info):
        return reason
    if info.head_dim < 2:
        return "head_dim must be 2 or more: int(D ln D) is 0 for 1"
    patches = info.num_tokens - info.num_prefix_tokens
    if 3 * config.window >= patches:
        return (
            f"window={config.window}: three windows must be fewer than the {patches} patch tokens, or exact attention "
            "costs less"
        )
    return None


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    require_attention(model, "scatterbrain")
    vit: Any = model
    projections = draw_projections(model, config.features, surroundings)
    resolved = {
        "features": [len(p) for p in projections],
        "window": config.window,
        "prefix": vit.num_prefix_tokens,
    }
    return Applied(_put(model, projections, resolved), resolved, attention_names(model))


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    return _put(model, empty_projections(model, resolved["features"]), resolved)


def _put(model: nn.Module, projections: list[Tensor], resolved: Mapping[str, Any]) -> nn.Module:
    window, prefix = resolved["window"], resolved["prefix"]
    return replace_attention(model, lambda attn, i: ScatterbrainAttention(attn, projections[i], window, prefix))


def _trains(config: Config) -> bool:
    return config.recover


TECHNIQUE = Technique(
    name="scatterbrain",
    family="low_rank_attention",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    trains=_trains,
    rules=(Rule(("tome", "pitome"), "experimental", "its local window expects neighbouring tokens to be neighbours"),),
    source="Scatterbrain, arXiv 2110.15343, section 4",
)
