"""Nystrom attention: three small softmax products through landmarks instead of one of N by N.

Source: Xiong et al., Nystromformer, arXiv 2102.03902, section 3 and algorithm 1.
Differs from the paper: no depthwise convolution beside the attention (the weights are a trained exact attention's); the
inverse starts from the largest column sum of each batch element and head, so that an image's result does not depend on
the others in its batch; segments may differ in length by one, so any N goes; the inverse is calculated in float32 at least; the
iterations are free where the paper has 6. Over 10 can be far worse: the exact inverse magnifies what the landmarks leave out.
Size is unchanged. Costs more than exact attention on short sequences: at 224 px (N = 197) m = 64 with 6 iterations costs
about twice the exact product; it pays from about N = 577 (384 px) on.
Not covered: attention masks (hence no proportional attention), dropout of attention weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.low_rank.shared_attention import (
    LowRankAttention,
    as_written,
    attention_fault,
    attention_names,
    replace_attention,
    require_attention,
)
from workers.techniques.record import Applied, ModelInfo, Rule, Surroundings, Technique, choice, number


@dataclass(frozen=True)
class Config:
    """How many landmarks stand for the sequence, and how well their matrix is inverted."""

    landmarks: int = number(64, 4, 128, 1, search=(24, 96, 8), doc="segment means that stand for the N tokens")
    iterations: int = number(
        6, 1, 20, 1, search=(2, 6, 2), doc="steps of the iterative pseudo-inverse; over 10 can be worse"
    )
    recover: bool = choice(False, (True, False), search=(False,), doc="asks for the recovery training")


# --- mathematics ------------------------------------------------------------------------------------------------------


def segment_means(x: Tensor, m: int) -> Tensor:
    """Averages x (..., N, D) over m consecutive segments; returns (..., m, D).

    With s = N // m, the first (s + 1) m - N segments have s tokens, the rest s + 1.
    """
    N = x.shape[-2]
    s = N // m
    short = (s + 1) * m - N
    head, tail = x[..., : short * s, :], x[..., short * s :, :]
    front = head.reshape(*x.shape[:-2], short, s, x.shape[-1]).mean(dim=-2)
    if short == m:
        return front
    back = tail.reshape(*x.shape[:-2], m - short, s + 1, x.shape[-1]).mean(dim=-2)
    return torch.cat([front, back], dim=-2)


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """Approximates the pseudo-inverse of a (B, H, m, m), whose rows sum to 1, by a third-order Newton iteration.

    Z0 = A^T / (largest column sum), Z <- Z/4 (13 I - AZ (15 I - AZ (7 I - AZ))): equation 11 of the paper. The largest
    row sum, which it also divides by, is 1.
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.transpose(-1, -2) / a.sum(dim=-2).amax(dim=-1)[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def nystrom_attention(q: Tensor, k: Tensor, v: Tensor, landmarks: int, iterations: int, scale: float) -> Tensor:
    """Approximates softmax(scale q k^T) v; exact where there are as many landmarks as tokens, or more.

    Args:
        q, k, v: (B, H, N, D) of one float type.

    Returns:
        (B, H, N, D) in the type of q.
    """
    if landmarks >= q.shape[-2]:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    ql, kl = segment_means(q, landmarks), segment_means(k, landmarks)
    summary = F.scaled_dot_product_attention(ql, k, v, scale=scale)
    # 8 bits of mantissa do not converge; autocast would bring them back.
    wide = torch.promote_types(q.dtype, torch.float32)
    with as_written(q.device):
        core = (ql.to(wide) @ kl.to(wide).transpose(-1, -2) * scale).softmax(dim=-1)
        summary = (pseudo_inverse(core, iterations) @ summary.to(wide)).to(q.dtype)
    return F.scaled_dot_product_attention(q, kl, summary, scale=scale)


# --- module -----------------------------------------------------------------------------------------------------------


class NystromAttention(LowRankAttention):
    """Attention through landmarks."""

    technique = "nystrom"

    def __init__(self, attn: Any, landmarks: int, iterations: int) -> None:
        super().__init__(attn)
        self.landmarks, self.iterations = landmarks, iterations

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :func:`nystrom_attention`."""
        return nystrom_attention(q, k, v, self.landmarks, self.iterations, self.scale)


# --- record -----------------------------------------------------------------------------------------------------------


def _check(info: ModelInfo, config: Config) -> str | None:
    if reason := attention_fault(info):
        return reason
    if config.landmarks >= info.num_tokens:
        return (
            f"landmarks={config.landmarks} must be below the {info.num_tokens} tokens: otherwise it is exact attention"
        )
    return None


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    require_attention(model, "nystrom")
    resolved = {"landmarks": config.landmarks, "iterations": config.iterations}
    return Applied(_rebuild(model, resolved), resolved, attention_names(model))


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    return replace_attention(model, lambda attn, _: NystromAttention(attn, **resolved))


def _trains(config: Config) -> bool:
    return config.recover


TECHNIQUE = Technique(
    name="nystrom",
    family="low_rank_attention",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    trains=_trains,
    rules=(Rule(("tome", "pitome"), "experimental", "sound only with landmarks weighted by token size"),),
    source="Nystromformer, arXiv 2102.03902, section 3",
)
