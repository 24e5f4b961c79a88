"""DynamicViT: small predictors decide for each image which patch tokens go on, before a few of the blocks.

Source: Rao et al., DynamicViT, arXiv 2106.02034, sections 3.2 to 3.4.
Differs from the paper: tokens are masked by a bias on the keys, so that attention stays fused, and a masked token does not
attend to itself either (nothing reads it any more); the token that is most likely to stay always does; the squared error
of a token is averaged over its channels, so that its weight does not depend on the width; a model may average its patch
tokens instead of reading its class token; class, distillation and register tokens are all protected. Where the teacher's
tokens are not those of the model (another width or resolution), the loss between tokens is left out.
Saves MACs, time and activation memory; the predictors add parameters. Must train. Training itself is not faster: it masks
instead of removing, and the loss between tokens runs the teacher.
Not covered: attention masks and intermediate features (an error); pooling other than by class token or mean (an error).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.distill import soft_loss
from workers.techniques.record import Applied, LossInputs, LossTerm, ModelInfo, Surroundings, Technique, number
from workers.techniques.token_blocks import (
    TokenBlocks,
    Tokens,
    best_first,
    pooled,
    pools_by_mean,
    require_blocks,
    rows,
    spread_layers,
)

RATIO_WEIGHT = 2.0
"""Lambda of the loss that holds the shares kept: section 4.1 of the paper."""


@dataclass(frozen=True)
class Config:
    """How many tokens stay, before which blocks the others go, and how much the teacher says."""

    keep: float = number(0.7, 0.3, 1.0, 0.05, search=(0.5, 0.9, 0.1), doc="share of the patch tokens kept each time")
    start: float = number(
        0.25, 0.0, 0.75, 0.05, search=(0.25, 0.25, 0.05), doc="share of the depth before the first predictor"
    )
    stages: int = number(3, 1, 4, 1, search=(3, 3, 1), doc="predictors, evenly from the first one on")
    logit_weight: float = number(
        0.5, 0.0, 1.0, 0.1, search=(0.5, 0.5, 0.1), doc="weight of the divergence from the teacher's logits"
    )
    token_weight: float = number(
        0.5, 0.0, 1.0, 0.1, search=(0.5, 0.5, 0.1), doc="weight of the distance from the teacher's tokens"
    )


# --- mathematics ------------------------------------------------------------------------------------------------------


def kept_counts(patches: int, keep: float, stages: int) -> list[int]:
    """Returns the patch tokens after each predictor: int(rho^i P), at least one; 196 at 0.7 give 137, 96, 67."""
    return [max(1, int(keep ** (i + 1) * patches + 1e-9)) for i in range(stages)]


def decide(chances: Tensor, kept: Tensor) -> Tensor:
    """Draws which tokens stay, with the gradient of the softened draw; the most likely one stays in any case.

    Args:
        chances: (B, P, 2) logarithms of the probabilities to stay and to go; kept: (B, P, 1) of 0 and 1, those left.

    Returns:
        (B, P, 1) of 0 and 1.
    """
    drawn = F.gumbel_softmax(chances, hard=True)[..., :1]
    best = chances[..., :1].detach().masked_fill(kept == 0, -torch.inf).argmax(dim=1, keepdim=True)
    sure = torch.zeros_like(drawn).scatter(1, best, 1.0)
    return kept * (drawn + sure * (1 - drawn.detach()))


def ratio_loss(decided: Sequence[Tensor], keep: float) -> Tensor:
    """Returns the mean over images and predictors of (share kept - rho^i)^2, without its weight.

    Args:
        decided: one (B, P, 1) of 0 and 1 a predictor.
    """
    errors = [(kept.mean(dim=(1, 2)) - keep ** (i + 1)).square().mean() for i, kept in enumerate(decided)]
    return torch.stack(errors).mean()


def token_loss(student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    """Returns the squared distance of the kept tokens from the teacher's, mean over tokens and channels.

    Args:
        student, teacher: (B, P, C); kept: (B, P, 1) of 0 and 1.
    """
    distance = (student.float() - teacher.float()).square().mean(dim=-1, keepdim=True)
    return (distance * kept).sum() / kept.sum()


# --- modules ----------------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """Says of each patch token whether it stays, from itself and the mean of all that are left.

    Args:
        width: C; half of the channels speak of the token, half of the image.
    """

    def __init__(self, width: int, device: str | torch.device | None = None) -> None:
        super().__init__()
        self.local = width // 2
        with torch.device(device or "cpu"):
            self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
            self.decide = nn.Sequential(
                nn.Linear(width, width // 2),
                nn.GELU(),
                nn.Linear(width // 2, width // 4),
                nn.GELU(),
                nn.Linear(width // 4, 2),
            )

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        """Returns (B, P, 2) float32 logarithms of the probabilities to stay and to go.

        Args:
            x: (B, P, C) patch tokens; kept: (B, P, 1) of 0 and 1, those that are left.
        """
        features = self.project(x)
        own, others = features[..., : self.local], features[..., self.local :]
        mean = (others * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True)
        features = torch.cat([own, mean.to(own.dtype).expand(-1, x.shape[1], -1)], dim=-1)
        return F.log_softmax(self.decide(features).float(), dim=-1)

    def start_(self, generator: torch.Generator) -> None:
        """Fills an empty predictor: weights of spread 0.02 drawn on the CPU, norms of one, no biases."""
        for name, parameter in self.named_parameters():
            drawn = torch.zeros(parameter.shape) if name.endswith("bias") else torch.ones(parameter.shape)
            if parameter.ndim == 2:
                nn.init.trunc_normal_(drawn, std=0.02, generator=generator)
            parameter.data.copy_(drawn)


class ThinningBlocks(TokenBlocks):
    """timm's ``blocks``; those with a ``predictor`` first drop tokens.

    In training a predictor's decision is drawn (Gumbel) and masks; otherwise its best tokens stay and the rest is removed.

    Args:
        kept: patch tokens that stay, by the number of the block.
        pool: return the mean of the tokens that are left instead of them.

    Attributes:
        trace: the last tokens and all decisions of a forward pass in training, until the loss takes it; the graph of
            that step hangs on it, so it is never copied.
    """

    def __init__(self, blocks: Iterable[nn.Module], kept: Mapping[int, int], prefix: int, pool: bool) -> None:
        super().__init__(blocks, prefix)
        self.kept, self.pool = dict(kept), pool
        self.trace: Tokens | None = None

    def enter(self, i: int, block: Any, tokens: Tokens) -> Tokens:
        """Drops tokens before a block that has a predictor."""
        if i not in self.kept:
            return tokens
        x, ones = tokens.x, torch.ones(*tokens.x.shape[:2], 1, device=tokens.x.device)
        before = ones if tokens.kept is None else tokens.kept
        chances = block.predictor(x[:, self.prefix :], before[:, self.prefix :])
        if self.training:
            drawn = decide(chances, before[:, self.prefix :])
            kept = torch.cat([ones[:, : self.prefix], drawn], dim=1)
            return replace(tokens, kept=kept, decided=(*tokens.decided, kept[:, self.prefix :]))
        index = best_first(chances[..., 0])[:, : self.kept[i]].sort(dim=-1).values
        return replace(tokens, x=torch.cat([x[:, : self.prefix], rows(x, index + self.prefix)], dim=1))

    def reduce(self, i: int, block: Any, tokens: Tokens, seen: Any) -> Tokens:
        """Leaves the tokens: they were dropped before the block."""
        return tokens

    def finish(self, tokens: Tokens) -> Tensor:
        """Returns (B, N', C), masked tokens among them in training; [prefix ; mean] where the model pools."""
        self.trace = tokens if self.training and tokens.decided else None
        return pooled(tokens, self.prefix) if self.pool else tokens.x

    def take_trace(self) -> Tokens:
        """Returns what the last forward pass in training decided, once.

        Raises:
            ValueError: there was none.
        """
        if self.trace is None:
            raise ValueError("dynamicvit: the loss needs a forward pass in training mode before it")
        trace, self.trace = self.trace, None
        return trace

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trace": None}


# --- loss -------------------------------------------------------------------------------------------------------------


def _loss(inputs: LossInputs, config: Config) -> LossTerm:
    vit: Any = inputs.model
    if not vit.blocks.kept:
        return LossTerm(1.0, inputs.logits.new_zeros(()))
    trace = vit.blocks.take_trace()
    loss = RATIO_WEIGHT * ratio_loss(trace.decided, config.keep)
    if config.logit_weight:
        if inputs.teacher_logits is None:
            raise ValueError("dynamicvit: the training must supply teacher logits, or logit_weight must be 0")
        loss = loss + config.logit_weight * soft_loss(inputs.logits, inputs.teacher_logits.to(inputs.logits), 1.0)
    if config.token_weight:
        if inputs.teacher is None:
            raise ValueError("dynamicvit: the training must supply the teacher, or token_weight must be 0")
        if comparable(inputs.teacher, vit):
            loss = loss + config.token_weight * _distance(inputs.teacher, vit, inputs.images, trace)
    return LossTerm(1.0, loss)


def comparable(teacher: nn.Module, model: nn.Module) -> bool:
    """Returns whether the two have the same patch tokens, of the same width."""
    a, b = cast(Any, teacher), cast(Any, model)
    return (a.patch_embed.num_patches, a.embed_dim) == (b.patch_embed.num_patches, b.embed_dim)


def _distance(teacher: Any, vit: Any, images: Tensor, trace: Tokens) -> Tensor:
    prefix = vit.num_prefix_tokens
    with torch.no_grad():
        theirs = teacher.forward_features(images)[:, teacher.num_prefix_tokens :]
    return token_loss(vit.norm(trace.x)[:, prefix:], theirs, trace.decided[-1].detach())


# --- record -----------------------------------------------------------------------------------------------------------


def _plan(patches: int, depth: int, config: Config) -> dict[int, int]:
    """Returns the patch tokens that stay, by block; {} where none would go."""
    layers = spread_layers(depth, config.start, config.stages)
    counts = kept_counts(patches, config.keep, len(layers))
    return dict(zip(layers, counts, strict=True)) if counts[-1] < patches else {}


def _check(info: ModelInfo, config: Config) -> str | None:
    patches = info.num_tokens - info.num_prefix_tokens
    if not _plan(patches, info.depth, config):
        return f"keep={config.keep:g} drops none of {patches} patch tokens"
    return None


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    require_blocks(model, "dynamicvit")
    vit: Any = model  # timm is not typed
    pool = pools_by_mean(vit, "dynamicvit")
    plan = _plan(vit.patch_embed.num_patches, len(vit.blocks), config)
    resolved = {
        "layers": list(plan),
        "kept": list(plan.values()),
        "prefix": vit.num_prefix_tokens,
        "pool": pool,
    }
    _rebuild(model, resolved)
    weight = vit.patch_embed.proj.weight
    for i in plan:
        predictor = vit.blocks[i].predictor.to_empty(device="cpu")
        predictor.start_(surroundings.generator)
        predictor.to(device=weight.device, dtype=weight.dtype)
    return Applied(model, resolved, [f"blocks.{i}" for i in plan])


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Predictors come on the meta device: whoever calls this fills them."""
    vit: Any = model
    for i in resolved["layers"]:
        vit.blocks[i].predictor = Predictor(vit.embed_dim, device="meta").train(vit.training)
    kept = dict(zip(resolved["layers"], resolved["kept"], strict=True))
    vit.blocks = ThinningBlocks(vit.blocks, kept, resolved["prefix"], resolved["pool"])
    return model


def _trains(config: Config) -> bool:
    return config.keep < 1


def _wants_logits(config: Config) -> bool:
    return config.keep < 1 and config.logit_weight > 0


def _wants_tokens(config: Config) -> bool:
    return config.keep < 1 and config.token_weight > 0


TECHNIQUE = Technique(
    name="dynamicvit",
    family="token_reduction",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    identity={"keep": 1.0},
    trains=_trains,
    needs_teacher=_wants_logits,
    needs_teacher_model=_wants_tokens,
    loss=_loss,
    source="DynamicViT, arXiv 2106.02034, sections 3.2 to 3.4",
)
