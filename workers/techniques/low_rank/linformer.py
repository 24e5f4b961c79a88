"""Linformer: keys and values of the N tokens are projected to k of them by learned matrices.

Source: Wang et al., Linformer, arXiv 2006.04768, section 4 (projections, three ways of sharing them).
Differs from the paper: the projections start as the mean of consecutive patch tokens, prefix tokens each on their own, so that
the recovery training begins near the trained attention instead of at random; the length k is the same in every block.
Adds parameters: k N for each projection. The products cost 4 N k D instead of 2 N^2 D: less for k < N/2. Needs
training. The tokens must keep their number and order: no token reduction, no other resolution.
Not covered: attention masks, dropout of attention weights, sharing nothing (a projection for each head).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.low_rank.shared_attention import (
    LowRankAttention,
    attention_fault,
    attention_names,
    replace_attention,
    require_attention,
)
from workers.techniques.record import Applied, ModelInfo, Rule, Surroundings, Technique, choice, number


@dataclass(frozen=True)
class Config:
    """To how many tokens keys and values are projected, and what shares a projection."""

    k: int = number(256, 4, 512, 1, search=(32, 256, 32), doc="projected keys and values, fewer than tokens")
    sharing: str = choice(
        "key_value",
        ("heads", "key_value", "layers"),
        doc="the heads of a block; its keys and values too; all blocks too",
    )


# --- mathematics ------------------------------------------------------------------------------------------------------


def segment_projection(k: int, num_tokens: int, prefix: int) -> Tensor:
    """Returns (k, N) float32: the prefix tokens as they are, then means of k - prefix segments of the patch tokens.

    Segments are consecutive and as equal in length as can be.
    """
    weight = torch.zeros(k, num_tokens)
    weight[:prefix, :prefix] = torch.eye(prefix)
    for row, segment in enumerate(torch.arange(prefix, num_tokens).tensor_split(k - prefix)):
        weight[prefix + row, segment] = 1 / len(segment)
    return weight


def linformer_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Returns softmax(scale q (E k)^T) F v.

    Args:
        q, k, v: (B, H, N, D); keys, values: (K, N), E and F of the paper.

    Returns:
        (B, H, N, D).
    """
    return F.scaled_dot_product_attention(q, keys.to(k.dtype) @ k, values.to(v.dtype) @ v, scale=scale)


# --- module -----------------------------------------------------------------------------------------------------------


class Projection(nn.Module):
    """A learned (K, N) matrix over the tokens; one module in several places is one parameter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class LinformerAttention(LowRankAttention):
    """Attention to projected keys and values."""

    technique = "linformer"

    def __init__(self, attn: Any, keys: Projection, values: Projection) -> None:
        super().__init__(attn)
        self.keys, self.values = keys, values

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :func:`linformer_attention`.

        Raises:
            ValueError: for another number of tokens than the projections are made for.
        """
        if k.shape[-2] != (N := self.keys.weight.shape[1]):
            raise ValueError(
                f"linformer: the projections are made for {N} tokens, got {k.shape[-2]}; "
                "neither resolution nor number of tokens may change"
            )
        return linformer_attention(q, k, v, self.keys.weight, self.values.weight, self.scale)


# --- record -----------------------------------------------------------------------------------------------------------


def _check(info: ModelInfo, config: Config) -> str | None:
    if reason := attention_fault(info):
        return reason
    if info.drops_patches:
        return "patch_drop_rate must be 0: the projections are made for all tokens, and training would have fewer"
    if config.k >= info.num_tokens:
        return f"k={config.k} must be below the {info.num_tokens} tokens: otherwise nothing is projected away"
    if config.k <= info.num_prefix_tokens:
        return f"k={config.k} must exceed the {info.num_prefix_tokens} prefix tokens, each of which keeps a row"
    return None


def _after(info: ModelInfo, config: Config) -> ModelInfo:
    projections = {"heads": 2 * info.depth, "key_value": info.depth, "layers": 1}[config.sharing]
    return replace(info, params=info.params + projections * config.k * info.num_tokens)


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    require_attention(model, "linformer")
    vit: Any = model
    prefix = vit.num_prefix_tokens
    resolved = {"k": config.k, "num_tokens": vit.patch_embed.num_patches + prefix, "sharing": config.sharing}
    start = segment_projection(config.k, resolved["num_tokens"], prefix).to(surroundings.device)
    return Applied(_put(model, resolved["sharing"], start), resolved, attention_names(model))


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    vit: Any = model
    size = (resolved["k"], resolved["num_tokens"])
    return _put(model, resolved["sharing"], torch.empty(size, device=vit.patch_embed.proj.weight.device))


def _put(model: nn.Module, sharing: str, start: Tensor) -> nn.Module:
    """Replaces the attentions by ones whose projections begin as ``start`` (K, N)."""
    one = Projection(start)

    def make(attn: Any, index: int) -> LowRankAttention:
        if sharing == "layers":
            return LinformerAttention(attn, one, one)
        keys = Projection(start.clone())
        return LinformerAttention(attn, keys, Projection(start.clone()) if sharing == "heads" else keys)

    return replace_attention(model, make)


def _always(config: Config) -> bool:
    return True


TECHNIQUE = Technique(
    name="linformer",
    family="low_rank_attention",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    trains=_always,
    info_after=_after,
    rules=(Rule(("token_reduction",), "forbidden", "Linformer's projections are tied to token positions"),),
    source="Linformer, arXiv 2006.04768, section 4",
)
