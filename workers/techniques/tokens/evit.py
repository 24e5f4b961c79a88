"""EViT: keeps the patch tokens that the class token attends to and fuses the others into one, in a few blocks.

Source: Liang et al., Not All Patches are What You Need, arXiv 2202.07800, section 3.
Differs from the paper: the attention of the class token is computed as one row a head beside fused attention; class,
distillation and register tokens are all protected, and the distillation token asks together with the class token; in
a model that pools over its patch tokens the mean of their queries asks, and the fused token enters the pooling as one of
them; the keep rate is the final one from the first step of the training on; a block that would fuse a single token leaves it.
Saves MACs, time and activation memory; the size of the model stays. Adds no parameters. Wants the recovery training.
Not covered: attention masks and intermediate features (an error).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.record import Applied, ModelInfo, Surroundings, Technique, number
from workers.techniques.tokens.shared_blocks import (
    NEEDS_ATTENTION_MAP,
    Seen,
    TokenBlocks,
    Tokens,
    best_first,
    blocks_fault,
    readers,
    require_blocks,
    rows,
    spread_layers,
)


@dataclass(frozen=True)
class Config:
    """How many tokens stay, and in which blocks the others go."""

    keep: float = number(0.7, 0.3, 1.0, 0.05, search=(0.5, 0.9, 0.1), doc="share of the patch tokens kept each time")
    start: float = number(
        0.25, 0.0, 0.75, 0.05, search=(0.25, 0.25, 0.05), doc="share of the depth before the first reduction"
    )
    stages: int = number(3, 1, 4, 1, search=(3, 3, 1), doc="blocks that reduce, evenly from the first one on")


# --- mathematics ------------------------------------------------------------------------------------------------------


def kept_count(patches: int, keep: float) -> int:
    """Returns how many of ``patches`` tokens stay beside the fused one: ceil(keep P); all where none would be saved."""
    kept = math.ceil(keep * patches - 1e-9)
    return kept if patches - kept > 1 else patches


def patch_counts(patches: int, keep: float, layers: Iterable[int]) -> list[int]:
    """Returns the patch tokens after each reducing block, the fused one among them: 196 at 0.7 give 139, 99, 71."""
    counts = []
    for _ in layers:
        kept = kept_count(patches, keep)
        patches = kept + 1 if kept < patches else patches
        counts.append(patches)
    return counts


def fuse(x: Tensor, score: Tensor, kept: int, prefix: int) -> Tensor:
    """Keeps the ``kept`` patch tokens of the highest score and adds up the others, each times its score.

    Args:
        x: (B, N, C).
        score: (B, N - prefix) attention that each patch token gets.

    Returns:
        (B, prefix + kept + 1, C): [prefix ; kept, in their order ; fused].
    """
    order = best_first(score)
    index, rest = order[:, :kept].sort(dim=-1).values, order[:, kept:]
    fused = (rows(x, rest + prefix) * score.gather(1, rest)[..., None]).sum(dim=1, keepdim=True)
    return torch.cat([x[:, :prefix], rows(x, index + prefix), fused.to(x.dtype)], dim=1)


# --- module -----------------------------------------------------------------------------------------------------------


class FusingBlocks(TokenBlocks):
    """timm's ``blocks``, some of which pass on fewer tokens.

    Args:
        layers: the blocks that reduce.
        keep: share of the patch tokens that each of them keeps.
        asking: leading tokens whose attention is the score; 0 for the mean of the patch tokens.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], layers: Sequence[int], keep: float, asking: int, prefix: int
    ) -> None:
        super().__init__(blocks, prefix)
        self.layers, self.keep, self.asking = tuple(layers), keep, asking

    def reduce(self, i: int, block: Any, tokens: Tokens, seen: Seen) -> Tokens:
        """Keeps the best and fuses the rest, in the blocks that reduce."""
        patches = tokens.x.shape[1] - self.prefix
        kept = kept_count(patches, self.keep) if i in self.layers else patches
        if kept == patches:
            return tokens
        score = seen.received(self.asking, tokens, self.prefix)
        return replace(tokens, x=fuse(tokens.x, score, kept, self.prefix))


# --- record -----------------------------------------------------------------------------------------------------------


def _check(info: ModelInfo, config: Config) -> str | None:
    if reason := blocks_fault(info):
        return reason
    patches = info.num_tokens - info.num_prefix_tokens
    layers = spread_layers(info.depth, config.start, config.stages)
    if patch_counts(patches, config.keep, layers)[-1] == patches:
        return f"keep={config.keep:g} fuses none of {patches} patch tokens"
    return None


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    require_blocks(model, "evit")
    vit: Any = model  # timm is not typed
    layers = spread_layers(len(vit.blocks), config.start, config.stages)
    resolved = {"layers": layers, "keep": config.keep, "asking": readers(vit), "prefix": vit.num_prefix_tokens}
    patches = vit.patch_embed.num_patches
    reduces = patch_counts(patches, config.keep, layers)[-1] < patches
    return Applied(_rebuild(model, resolved), resolved, [f"blocks.{i}" for i in layers] if reduces else [])


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    vit: Any = model
    vit.blocks = FusingBlocks(vit.blocks, **resolved)
    return model


def _trains(config: Config) -> bool:
    return config.keep < 1


TECHNIQUE = Technique(
    name="evit",
    family="token_reduction",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    identity={"keep": 1.0},
    trains=_trains,
    rules=(NEEDS_ATTENTION_MAP,),
    source="EViT, arXiv 2202.07800, section 3",
)
