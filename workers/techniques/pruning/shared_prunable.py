"""What can be removed from a model without changing what the rest computes: judged by its facts, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from workers.model_info import GATED
from workers.models import model_info
from workers.techniques.record import ModelInfo

HEADS_NORMALISED = "queries and keys are normalised over the dimensions of a head, none of which can be removed"

MLPS = ("Mlp", *sorted(GATED))
"""MLPs of timm whose dimensions can be removed, as :class:`ModelInfo` calls them."""


def heads_fault(info: ModelInfo) -> str | None:
    """Returns why no head, nor a dimension of all of them, can be removed without changing what the others compute, or None."""
    if info.attention != "Attention":
        return f"heads can be removed from timm's Attention only; here the blocks have {info.attention}"
    return (
        "the blocks normalise over all heads together (scale_attn_norm), none can be removed"
        if info.has_attn_norm
        else None
    )


def hidden_fault(info: ModelInfo) -> str | None:
    """Returns why no MLP dimension can be removed, or None."""
    if info.mlp not in MLPS:
        return f"MLP dimensions can be removed from timm's {', '.join(MLPS)}; here the blocks have {info.mlp}"
    return (
        "the blocks normalise over the MLP dimensions (scale_mlp_norm), none can be removed"
        if info.has_mlp_norm
        else None
    )


def head_dims_fault(info: ModelInfo) -> str | None:
    """Returns why no dimension of the heads can be removed, or None."""
    return heads_fault(info) or (HEADS_NORMALISED if info.has_qk_norm else None)


def channels_fault(info: ModelInfo) -> str | None:
    """Returns why no channel of the residual stream can be removed, or None."""
    if info.attention != "Attention" or info.mlp not in MLPS:
        return f"channels can be removed from timm's Attention and {', '.join(MLPS)}; here the blocks have {info.attention} and {info.mlp}"
    if info.pooling in ("map", "prr"):
        return (
            f"the model pools by attention over its channels (global_pool {info.pooling}), none of which can be removed"
        )
    return None


def depth_fault(info: ModelInfo) -> str | None:
    """Returns why no block can be removed, or None."""
    return "every block has rotary angles of its own, which would be the next block's" if info.rope_a_block else None


Judge = Callable[[ModelInfo], str | None]


def fault(info: ModelInfo, wanted: Mapping[str, Judge]) -> str | None:
    """Returns the first reason against what is wanted, after the setting that asks for it; None where there is none.

    Args:
        wanted: setting, ``name=value``, to the function that judges it.
    """
    if info.family != "timm":  # their halves cut layers of their own
        return None
    reasons = ((setting, judge(info)) for setting, judge in wanted.items())
    return next((f"{setting}: {reason}" for setting, reason in reasons if reason), None)


def require(model: nn.Module, technique: str, wanted: Mapping[str, Judge]) -> None:
    """Refuses a model for the reason of :func:`fault`, where nobody has asked before.

    Raises:
        ValueError: with the reason.
    """
    if reason := fault(model_info(model), wanted):
        raise ValueError(f"{technique}: {reason}")
