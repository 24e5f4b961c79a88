"""DiffRate: learns how many tokens each block prunes and merges, under a target of multiply-accumulates.

Source: Chen et al., DiffRate, arXiv 2305.17997, section 3.
Differs from the paper: tokens are compared by their keys, the published code compares the tokens; the first block reduces too, there it
does not; merged tokens are means weighted by size and count by it, there plain means that count by their cosine as well; every number of tokens is a candidate, and the rates start from the even schedule that meets the
target, so that short trainings end near it; after the training the counts are scaled to the largest ones that meet it;
weights and rates train together in the recovery training; the cost counts the products of the blocks only and enters the loss
as a share; class, distillation and register tokens are all protected, and what the classifier reads asks (the mean of the
patch queries where a model pools over patch tokens). The attention that ranks tokens is one row a head beside fused
attention.
Saves MACs, time and activation memory; the size of the model stays, the learned rates are not part of the artefact. Must
train. Training itself is not faster: it masks instead of removing.
Not covered: attention masks and intermediate features (an error); pooling other than by class token or mean (an error).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.models import model_info
from workers.techniques.record import Applied, LossInputs, LossTerm, ModelInfo, Surroundings, Technique, number
from workers.techniques.tokens.shared_blocks import (
    NEEDS_ATTENTION_MAP,
    Seen,
    TokenBlocks,
    Tokens,
    best_first,
    blocks_fault,
    pooled,
    pooling_fault,
    pools_by_mean,
    readers,
    require_blocks,
    rows,
)
from workers.techniques.tokens.shared_merging import Matching, merge

COST_WEIGHT = 100.0
"""Weight of the squared distance of the share of MACs from its target. Ours: 0.01 beside the target costs 0.01."""

RATE_LR = 0.01
"""Learning rate of the candidates' logits, whatever that of the weights is. Ours."""


@dataclass(frozen=True)
class Config:
    """How much work may be left."""

    macs: float = number(0.6, 0.3, 1.0, 0.05, search=(0.4, 0.9, 0.1), doc="target: share of the blocks' MACs")


# --- cost -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one block for n tokens in its attention and m in its MLP: a n + b n^2 + c m."""

    a: int
    b: int
    c: int


def block_cost(width: int, attention: int, hidden: int, matrices: int = 2) -> Cost:
    """Returns the cost of a block of C channels, an attention of H x D dimensions and an MLP of ``hidden``.

    Args:
        matrices: weights that a hidden dimension has for each channel, 3 of a gated MLP.
    """
    return Cost(4 * width * attention, 2 * attention, matrices * width * hidden)


def share(left: Sequence[Any], costs: Sequence[Cost], patches: int, prefix: int) -> Any:
    """Returns the MACs of the blocks as a share of those without any reduction.

    Args:
        left: patch tokens that each block's MLP gets; numbers, or scalar tensors for a gradient.
    """
    total, whole, before = 0.0, 0.0, patches
    for cost, after in zip(costs, left, strict=True):
        n, m, full = before + prefix, after + prefix, patches + prefix
        total = total + cost.a * n + cost.b * n * n + cost.c * m
        whole += cost.a * full + cost.b * full**2 + cost.c * full
        before = after
    return total / whole


def largest(reaches: Callable[[float], bool], low: float, high: float) -> float:
    """Returns the largest number from ``low`` to ``high`` at which ``reaches`` still holds; it holds at ``low``."""
    if reaches(high):
        return high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if reaches(middle) else (low, middle)
    return low


def even_schedule(costs: Sequence[Cost], patches: int, prefix: int, target: float) -> list[float]:
    """Returns the patch tokens left by each block when all lose the same number and the target is just met; at least 1."""

    def left(stay: float) -> list[float]:
        return [max(1.0, patches - (patches - stay) * (i + 1)) for i in range(len(costs))]

    return left(largest(lambda stay: share(left(stay), costs, patches, prefix) <= target, 1.0, patches))


def scaled_counts(
    learned: Sequence[tuple[float, float]], costs: Sequence[Cost], patches: int, prefix: int, target: float
) -> list[tuple[int, int]]:
    """Returns (left after pruning, left after merging too) of each block: the largest multiple that meets the target."""

    def counts(factor: float) -> list[tuple[int, int]]:
        return chain([(factor * p, factor * m) for p, m in learned], patches)

    def reaches(factor: float) -> bool:
        return bool(share([m for _, m in counts(factor)], costs, patches, prefix) <= target)

    return counts(largest(reaches, 0.0, 2.0))


def chain(learned: Iterable[tuple[float, float]], patches: int) -> list[tuple[int, int]]:
    """Rounds counts of tokens left; none exceeds the one before it, and one token always stays."""
    counts = []
    for p, m in learned:
        after_pruning = min(patches, max(1, round(p)))
        patches = min(after_pruning, max(1, round(m)))
        counts.append((after_pruning, patches))
    return counts


# --- learning ---------------------------------------------------------------------------------------------------------


class Rates(nn.Module):
    """Two distributions over how many patch tokens a block leaves: after pruning, and after merging too.

    Args:
        patches: P; the candidates are 1 to P.
    """

    def __init__(self, patches: int, device: str | torch.device | None = None) -> None:
        super().__init__()
        self.prune = nn.Parameter(torch.empty(patches, device=device))
        self.merge = nn.Parameter(torch.empty(patches, device=device))

    def counts(self) -> tuple[float, float]:
        """Returns the expected counts after pruning, and after merging too."""
        return float(expected(self.prune.detach())), float(expected(self.merge.detach()))


def expected(logits: Tensor) -> Tensor:
    """Returns the expected count: the sum of p_j j over the candidates 1 to P."""
    return (logits.float().softmax(dim=0) * torch.arange(1, len(logits) + 1, device=logits.device)).sum()


def flattest(patches: int, mean: float) -> Tensor:
    """Returns logits (P,) of the distribution over 1 to P of the greatest entropy with this mean: they are linear."""
    line = torch.arange(1, patches + 1, dtype=torch.float64) / patches
    mean = min(max(mean, 1.0 + 1e-3), patches - 1e-3)
    slope = largest(lambda s: float(expected(s * line)) <= mean, -1e5, 1e5)
    return (slope * (line - line.mean())).float()


def stays(logits: Tensor, rank: Tensor) -> Tensor:
    """Returns (B, P, 1): 1 for the best tokens, as many as expected, else 0; with the gradient of the chance to stay.

    The token of rank k stays in every candidate above k: its chance is the sum of their probabilities.

    Args:
        rank: (B, P) int64, 0 for the best token.
    """
    chance = logits.float().softmax(dim=0).flip(0).cumsum(dim=0).flip(0)[rank]
    hard = (rank < expected(logits).detach().round().clamp(min=1)).float()
    return (hard + (chance - chance.detach()))[..., None]  # the bracket is exactly 0


# --- module -----------------------------------------------------------------------------------------------------------


class RatedBlocks(TokenBlocks):
    """timm's ``blocks``, each of which prunes the tokens that get the least attention and merges the next ones.

    Args:
        counts: per block the patch tokens left after pruning and after merging too; None while they are learned, from
            the ``rates`` of each block.
        asking: leading tokens whose attention ranks the others; 0 for the mean of the patch tokens.
        pool: return the mean of the tokens that are left instead of them.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        counts: Sequence[tuple[int, int]] | None,
        asking: int,
        prefix: int,
        pool: bool,
    ) -> None:
        super().__init__(blocks, prefix)
        self.counts, self.asking, self.pool = counts, asking, pool

    def learned(self) -> list[tuple[float, float]]:
        """Returns the expected counts of every block."""
        blocks: Any = self
        return [block.rates.counts() for block in blocks]

    def reduce(self, i: int, block: Any, tokens: Tokens, seen: Seen) -> Tokens:
        """Prunes and merges in block i; only masks in training while the counts are learned."""
        if self.training and self.counts is None:
            return self._masked(block.rates, tokens, seen)
        patches = tokens.x.shape[1] - self.prefix
        if self.counts is None:
            after_pruning, after_merging = chain([block.rates.counts()], patches)[0]
        else:
            after_pruning, after_merging = self.counts[i]
        if after_merging == patches:
            return tokens
        order = best_first(seen.received(self.asking, tokens, self.prefix).detach())
        return _removed(tokens, order, after_pruning, after_merging, self.prefix, seen)

    def _masked(self, rates: Rates, tokens: Tokens, seen: Seen) -> Tokens:
        """Computes what :func:`_removed` computes on all N tokens, with gradients for the rates."""
        prefix, weights = self.prefix, tokens.weights()
        kept = torch.ones_like(weights) if tokens.kept is None else tokens.kept
        alive, size = kept[:, prefix:], (torch.ones_like(weights) if tokens.size is None else tokens.size)
        score = seen.received(self.asking, tokens, prefix).detach()
        rank = best_first(score.masked_fill(alive[..., 0] == 0, -1.0)).argsort(dim=-1)
        unpruned, unmerged = stays(rates.prune, rank), stays(rates.merge, rank)
        left = alive * unpruned * unmerged
        given = size[:, prefix:] * alive * unpruned * (1 - unmerged)
        keys = F.normalize(seen.k.mean(dim=1)[:, prefix:].detach().float(), dim=-1)
        alike = (keys @ keys.transpose(1, 2)).masked_fill(left.transpose(1, 2) == 0, -torch.inf)
        alike.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        taker = alike.argmax(dim=-1)[..., None] + prefix
        x = tokens.x
        sums = (x * size).scatter_add(1, taker.expand(-1, -1, x.shape[-1]), x[:, prefix:] * given)
        size = size.scatter_add(1, taker, given)
        kept = torch.cat([kept[:, :prefix], left], dim=1)
        return replace(tokens, x=(sums / size).to(x.dtype), size=size, kept=kept)

    def finish(self, tokens: Tokens) -> Tensor:
        """Returns (B, N', C), masked tokens among them while learning; [prefix ; mean] where the model pools."""
        return pooled(tokens, self.prefix) if self.pool else tokens.x


def _removed(tokens: Tokens, order: Tensor, after_pruning: int, after_merging: int, prefix: int, seen: Seen) -> Tokens:
    """Drops what is last in ``order`` (B, P) and merges what comes before that into the most similar of the rest."""
    batch = order.shape[0]
    front = torch.arange(prefix, device=order.device).expand(batch, -1)
    rest = order[:, :after_merging].sort(dim=-1).values + prefix
    merged = order[:, after_merging:after_pruning] + prefix
    whole = torch.cat([front, rest], dim=1)
    if after_merging == after_pruning:
        size = None if tokens.size is None else rows(tokens.size, whole)
        return replace(tokens, x=rows(tokens.x, whole), size=size)
    keys = F.normalize(seen.k.mean(dim=1).detach().float(), dim=-1)
    into = (rows(keys, merged) @ rows(keys, rest).transpose(1, 2)).argmax(dim=-1) + prefix
    x, size = merge(tokens.x, tokens.weights(), Matching(whole, merged, into))
    return replace(tokens, x=x, size=size)


# --- loss -------------------------------------------------------------------------------------------------------------


def _costs(model: nn.Module) -> list[Cost]:
    vit: Any = model
    matrices = model_info(model).mlp_matrices
    return [block_cost(b.attn.qkv.in_features, b.attn.attn_dim, b.mlp.fc2.in_features, matrices) for b in vit.blocks]


def _loss(inputs: LossInputs, config: Config) -> LossTerm:
    vit: Any = inputs.model
    if vit.blocks.counts is not None:
        return LossTerm(1.0, inputs.logits.new_zeros(()))
    patches = vit.patch_embed.num_patches
    left: list[Tensor] = []
    for block in vit.blocks:
        counts = [expected(block.rates.prune), expected(block.rates.merge)]
        left.append(torch.stack([*counts, *left[-1:]]).min())
    spent = share(left, _costs(vit), patches, vit.num_prefix_tokens)
    return LossTerm(1.0, COST_WEIGHT * (spent - config.macs) ** 2)


def _groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    vit: Any = model
    if vit.blocks.counts is not None:
        return []
    rates = [p for block in vit.blocks for p in block.rates.parameters()]
    return [{"params": rates, "lr": RATE_LR, "weight_decay": 0.0}]


# --- record -----------------------------------------------------------------------------------------------------------


def _check(info: ModelInfo, config: Config) -> str | None:
    if reason := blocks_fault(info) or pooling_fault(info):
        return reason
    if info.drops_patches:
        return "patch_drop_rate must be 0: counts are learned for all patch tokens, and training would have fewer"
    if config.macs == 1:
        return "macs=1 leaves nothing to remove"
    costs = [
        block_cost(info.embed_dim, heads * info.head_dim, hidden, info.mlp_matrices)
        for heads, hidden in zip(info.num_heads, info.mlp_hidden, strict=True)
    ]
    patches, prefix = info.num_tokens - info.num_prefix_tokens, info.num_prefix_tokens
    least = share([1] * len(costs), costs, patches, prefix)
    if least > config.macs:
        return f"macs={config.macs:g} is out of reach: one token left by the first block of {info.depth} is {least:.2f}"
    return None


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    require_blocks(model, "diffrate")
    vit: Any = model  # timm is not typed
    patches, prefix, depth = vit.patch_embed.num_patches, vit.num_prefix_tokens, len(vit.blocks)
    resolved = {
        "patches": patches,
        "counts": None if config.macs < 1 else [[patches, patches]] * depth,
        "asking": readers(vit),
        "prefix": prefix,
        "pool": pools_by_mean(vit, "diffrate"),
    }
    left = even_schedule(_costs(vit), patches, prefix, config.macs)
    _rebuild(model, resolved)
    if resolved["counts"] is not None:
        return Applied(model, resolved, [])
    device = vit.patch_embed.proj.weight.device
    for block, before, after in zip(vit.blocks, [patches, *left], left, strict=False):
        block.rates.prune = nn.Parameter(flattest(patches, (before + after) / 2).to(device))
        block.rates.merge = nn.Parameter(flattest(patches, after).to(device))
    return Applied(model, resolved, [f"blocks.{i}" for i in range(depth)])


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Rates come on the meta device: whoever calls this fills them."""
    vit: Any = model
    counts = resolved["counts"]
    if counts is None:
        for block in vit.blocks:
            block.rates = Rates(resolved["patches"], device="meta")
    else:
        counts = [(int(p), int(m)) for p, m in counts]
    vit.blocks = RatedBlocks(vit.blocks, counts, resolved["asking"], resolved["prefix"], resolved["pool"])
    return model


def _finalise(model: nn.Module, config: Config) -> dict[str, Any]:
    """Fixes the learned counts and removes the rates."""
    vit: Any = model
    blocks: RatedBlocks = vit.blocks
    if blocks.counts is not None:
        return {}
    counts = scaled_counts(
        blocks.learned(), _costs(vit), vit.patch_embed.num_patches, vit.num_prefix_tokens, config.macs
    )
    for block in blocks:
        del block.rates
    blocks.counts = counts
    return {"counts": [list(pair) for pair in counts]}


def _trains(config: Config) -> bool:
    return config.macs < 1


TECHNIQUE = Technique(
    name="diffrate",
    family="token_reduction",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    identity={"macs": 1.0},
    trains=_trains,
    loss=_loss,
    parameter_groups=_groups,
    finalise=_finalise,
    rules=(NEEDS_ATTENTION_MAP,),
    source="DiffRate, arXiv 2305.17997, section 3",
)
