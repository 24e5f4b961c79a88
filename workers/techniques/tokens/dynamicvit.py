"""DynamicViT: small predictors decide for each image which patch tokens go on, before a few of the blocks.

Source: Rao et al., DynamicViT, arXiv 2106.02034, sections 3.2 to 3.4.
Differs from the paper: tokens are masked by a bias on the keys, so that attention stays fused, and a masked token does not
attend to itself either (nothing reads it any more); the token that is most likely to stay always does; the squared error
of a token is averaged over its channels, so that its weight does not depend on the width; a model may average its patch
tokens instead of reading its class token; class, distillation and register tokens are all protected. Where the teacher's
tokens are not those of the model (another width or resolution), the loss between tokens is left out. In ViLT and METER image
tokens are dropped: see :mod:`workers.techniques.tokens.dynamicvit_joint`.
Saves MACs, time and activation memory; the predictors add parameters. Must train. Training itself is not faster: it masks
instead of removing, and the loss between tokens runs the teacher.
Not covered: attention masks and intermediate features (an error); pooling other than by class token or mean (an error).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from workers.techniques.backbones import by_backbone
from workers.techniques.distillation.distill import soft_loss
from workers.techniques.record import Applied, LossInputs, LossTerm, ModelInfo, Surroundings, Technique, choice, number
from workers.techniques.tokens.dynamicvit_predictors import Predictor, decide, kept_counts, ratio_loss, token_loss
from workers.techniques.tokens.shared_blocks import (
    NEEDS_ATTENTION_MAP,
    TokenBlocks,
    Tokens,
    best_first,
    blocks_fault,
    pooled,
    pooling_fault,
    pools_by_mean,
    require_blocks,
    rows,
    spread_layers,
)
from workers.techniques.tokens.shared_joint_tokens import LAYER_NAMES, chosen_layers, layers_fault, numbers_fault

RATIO_WEIGHT = 2.0
"""Lambda of the loss that holds the shares kept: section 4.1 of the paper."""

BY_START = "by_start"
"""Value of ``layers`` that leaves them to ``start`` and ``stages``."""


@dataclass(frozen=True)
class Config:
    """How many tokens stay, before which blocks the others go, and how much the teacher says."""

    keep: float = number(0.7, 0.3, 1.0, 0.05, search=(0.5, 0.9, 0.1), doc="share of the patch tokens kept each time")
    start: float = number(
        0.25, 0.0, 0.75, 0.05, search=(0.25, 0.25, 0.05), doc="share of the depth before the first predictor"
    )
    stages: int = number(3, 1, 4, 1, search=(3, 3, 1), doc="predictors, evenly from the first one on")
    layers: str = choice(
        BY_START,
        (BY_START, *LAYER_NAMES),
        search=(BY_START,),
        others=numbers_fault,
        doc="layers before which a predictor stands; by_start: as start and stages say",
    )
    logit_weight: float = number(
        0.5, 0.0, 1.0, 0.1, search=(0.5, 0.5, 0.1), doc="weight of the divergence from the teacher's logits"
    )
    token_weight: float = number(
        0.5, 0.0, 1.0, 0.1, search=(0.5, 0.5, 0.1), doc="weight of the distance from the teacher's tokens"
    )


# --- module -----------------------------------------------------------------------------------------------------------


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
    ratios = ratio_loss(trace.decided, config.keep)
    return LossTerm(1.0, whole_loss(inputs, config, ratios, partial(_distance, inputs, trace)))


def whole_loss(inputs: LossInputs, config: Config, ratios: Tensor, distance: Callable[[], Tensor | None]) -> Tensor:
    """Returns the weighted sum of all losses.

    Args:
        ratios: how far the shares of kept tokens are from the wanted ones, scalar.
        distance: of the kept tokens from the teacher's, asked where it has a weight; None where they cannot be compared.
    """
    loss = RATIO_WEIGHT * ratios
    if config.logit_weight:
        if inputs.teacher_logits is None:
            raise ValueError("dynamicvit: the training must supply teacher logits, or logit_weight must be 0")
        loss = loss + config.logit_weight * soft_loss(inputs.logits, inputs.teacher_logits.to(inputs.logits), 1.0)
    if config.token_weight:
        if inputs.teacher is None:
            raise ValueError("dynamicvit: the training must supply the teacher, or token_weight must be 0")
        apart = distance()
        if apart is not None:
            loss = loss + config.token_weight * apart
    return loss


def comparable(teacher: nn.Module, model: nn.Module) -> bool:
    """Returns whether the two have the same patch tokens, of the same width."""
    a, b = cast(Any, teacher), cast(Any, model)
    return (a.patch_embed.num_patches, a.embed_dim) == (b.patch_embed.num_patches, b.embed_dim)


def _distance(inputs: LossInputs, trace: Tokens) -> Tensor | None:
    vit, teacher = cast(Any, inputs.model), cast(Any, inputs.teacher)
    if not comparable(teacher, vit):
        return None
    prefix = vit.num_prefix_tokens
    with torch.no_grad():
        theirs = teacher.forward_features(inputs.images)[:, teacher.num_prefix_tokens :]
    return token_loss(vit.norm(trace.x)[:, prefix:], theirs, trace.decided[-1].detach())


# --- record -----------------------------------------------------------------------------------------------------------


def predicted_layers(config: Config, family: str, depth: int) -> list[int]:
    """Returns the layers of a model of ``depth`` that get a predictor before them, in ascending order."""
    if config.layers == BY_START:
        return spread_layers(depth, config.start, config.stages)
    return chosen_layers(config.layers, family, depth)


def _plan(patches: int, layers: list[int], keep: float) -> dict[int, int]:
    """Returns the patch tokens that stay, by block; {} where none would go."""
    counts = kept_counts(patches, keep, len(layers))
    return dict(zip(layers, counts, strict=True)) if counts[-1] < patches else {}


def _check(info: ModelInfo, config: Config) -> str | None:
    if reason := blocks_fault(info) or pooling_fault(info):
        return reason
    if info.reduces_tokens:
        return "its layers reduce tokens already"
    if info.drops_patches and config.token_weight:
        return "patch_drop_rate must be 0: training then has fewer tokens than the teacher that they are compared with; or token_weight must be"
    fault = None if config.layers == BY_START else layers_fault(config.layers, info.family, info.depth)
    if fault:
        return fault
    patches = info.num_tokens - info.num_text_tokens - info.num_prefix_tokens
    if not _plan(patches, predicted_layers(config, info.family, info.depth), config.keep):
        return f"keep={config.keep:g} drops none of {patches} patch tokens"
    return None


def _after(info: ModelInfo, config: Config) -> ModelInfo:
    return replace(info, reduces_tokens=info.num_text_tokens > 0)


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    require_blocks(model, "dynamicvit")
    vit: Any = model  # timm is not typed
    pool = pools_by_mean(vit, "dynamicvit")
    plan = _plan(vit.patch_embed.num_patches, predicted_layers(config, "timm", len(vit.blocks)), config.keep)
    resolved = {
        "layers": list(plan),
        "kept": list(plan.values()),
        "prefix": vit.num_prefix_tokens,
        "pool": pool,
    }
    _rebuild(model, resolved)
    weight = vit.patch_embed.proj.weight
    for i in plan:
        vit.blocks[i].predictor.fill_(weight, surroundings.generator)
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


HALVES = dict.fromkeys(("vilt", "meter"), "workers.techniques.tokens.dynamicvit_joint")

TECHNIQUE = Technique(
    name="dynamicvit",
    family="token_reduction",
    version=1,
    Config=Config,
    stage="surgery",
    apply=by_backbone(_apply, HALVES),
    rebuild=by_backbone(_rebuild, HALVES),
    check=_check,
    identity={"keep": 1.0},
    trains=_trains,
    needs_teacher=_wants_logits,
    needs_teacher_model=_wants_tokens,
    loss=by_backbone(_loss, HALVES),
    info_after=_after,
    models=("timm", "vilt", "meter"),
    rules=(NEEDS_ATTENTION_MAP,),
    source="DynamicViT, arXiv 2106.02034, sections 3.2 to 3.4",
)
