"""PuMer: in a few joint layers the text says which image tokens go, and similar tokens of one modality are merged.

Between attention and MLP of a reducing layer: the image tokens to which the text attends least are removed, then similar
image tokens are merged, then similar text tokens; image and text never merge with each other. The recovery training adds
the divergence from the fine-tuned original's logits.

Source: Cao, Paranjape, Hajishirzi, PuMer: Pruning and Merging Tokens for Efficient Vision Language Models, arXiv 2305.17530,
section 3.
Differs from the paper: the image's class token is not pruned, image tokens keep their order, padded text tokens have no
vote, and padding has no part in a merged token; with ``paper_compatible`` all that is as it was published, where the mask
of a merged token is the mean of its tokens' masks, 1 and 0. Not in any setting: there a padded or merged token attends to itself
with weight 1 whatever its mask, which shows where texts are padded; and METER with image_merge 0 is not pruned. Attention stays fused but for the text's few rows of a reducing
layer, whose map is needed. METER's image layer attends to the text as it was before the layer, reduced as the text is.
Saves MACs, time and activation memory; the size of the model stays. Adds no parameters. Wants the recovery training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.distillation.distill import soft_loss
from workers.techniques.record import Applied, LossInputs, LossTerm, ModelInfo, Surroundings, Technique, choice, number
from workers.techniques.tokens.shared_blocks import (
    NEEDS_ATTENTION_MAP,
    best_first,
    rows,
)
from workers.techniques.tokens.shared_joint_tokens import (
    HIDDEN,
    LAYER_NAMES,
    LAYERS,
    Change,
    Reducer,
    Reduction,
    Seen,
    Stream,
    added,
    chosen_layers,
    layers_fault,
    numbers_fault,
    put_reducers,
    valid_change,
)
from workers.techniques.tokens.shared_merging import Matching
from workers.techniques.tokens.tome import match


@dataclass(frozen=True)
class Config:
    """Which share of the tokens goes in each reducing layer, and in which layers; a ratio of 0 switches that part off."""

    layers: str = choice(
        "spread_3",
        LAYER_NAMES,
        search=("spread_2", "spread_3", "spread_4"),
        others=numbers_fault,
        doc="layers that reduce: numbers in ascending order, or that many of them spread over the depth",
    )
    prune: float = number(
        0.1,
        0.0,
        0.5,
        0.05,
        search=(0.1, 0.3, 0.1),
        doc="share of the image tokens removed, least asked for by the text",
    )
    image_merge: float = number(
        0.3, 0.0, 0.5, 0.05, search=(0.2, 0.5, 0.1), doc="share of the image tokens merged into similar ones"
    )
    text_merge: float = number(
        0.2, 0.0, 0.5, 0.05, search=(0.0, 0.3, 0.1), doc="share of the text tokens merged into similar ones"
    )
    distil: bool = choice(True, (True, False), search=(True,), doc="adds the divergence from the teacher's logits")
    paper_compatible: bool = choice(
        False,
        (False, True),
        search=(False,),
        doc="as published: class token may be pruned, tokens sorted by score, padding votes and merges, prune=0 merges none",
    )


# --- mathematics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratios:
    """What one layer does: the ratios of :class:`Config`."""

    prune: float
    image_merge: float
    text_merge: float
    paper_compatible: bool

    def __post_init__(self) -> None:
        if self.paper_compatible and self.prune == 0:
            object.__setattr__(self, "image_merge", 0.0)
            object.__setattr__(self, "text_merge", 0.0)

    def image(self, tokens: int) -> tuple[int, int]:
        """Returns how many of ``tokens`` image tokens stay in the pruning, and how many of those are then merged."""
        kept = max(tokens - share(self.prune, tokens), 1)
        return kept, min(share(self.image_merge, tokens), (kept - 1) // 2)

    def text(self, tokens: int) -> int:
        """Returns how many of ``tokens`` text tokens are merged."""
        return min(share(self.text_merge, tokens), (tokens - 1) // 2)


def share(ratio: float, tokens: int) -> int:
    """Returns the nearest whole number to ratio times ``tokens``, a half to the even one; 0.1 of 145 is 14."""
    return round(round(ratio * tokens, 6))  # 0.1 + 0.2 of 5 is 1.5 as well


def token_counts(text: int, image: int, ratios: Ratios, layers: int) -> list[tuple[int, int]]:
    """Returns (text, image) tokens after each of so many reducing layers."""
    counts = []
    for _ in range(layers):
        kept, merged = ratios.image(image)
        text, image = text - ratios.text(text), kept - merged
        counts.append((text, image))
    return counts


def pruned(score: Tensor, kept: int, valid: Tensor | None) -> Tensor:
    """Returns (B, kept) int64: the class token and the tokens of the highest score, in their order.

    Args:
        score: (B, I) votes; valid: (B, I) bool, false for padding, which goes first.
    """
    if valid is not None:
        score = score.masked_fill(~valid, -1.0)  # below every share of attention
    score = torch.cat([torch.full_like(score[:, :1], torch.inf), score[:, 1:]], dim=1)
    return best_first(score)[:, :kept].sort(dim=-1).values


def then(index: Tensor, matching: Matching | None) -> Matching:
    """Returns what ``index`` (B, M) of the rows and then ``matching`` of those make of all rows."""
    if matching is None:
        return Matching(rest=index, merged=index[:, :0], into=index[:, :0])
    return Matching(index.gather(1, matching.rest), index.gather(1, matching.merged), matching.into)


# --- module -----------------------------------------------------------------------------------------------------------


class TextInformedReducer(Reducer):
    """Prunes image tokens by the text's attention, merges image tokens, merges text tokens."""

    def __init__(self, ratios: Ratios) -> None:
        super().__init__()
        self.ratios = ratios
        self.asks = ratios.prune > 0

    def reduce(self, text: Stream, image: Stream, seen: Seen, carried: Any) -> Reduction:
        """Returns the changes of both modalities; sizes start at 1 in each layer, so every mean is a plain one."""
        return Reduction(self._text(text, seen), self._image(text, image, seen))

    def _image(self, text: Stream, image: Stream, seen: Seen) -> Change | None:
        total, paper = image.x.shape[1], self.ratios.paper_compatible
        kept, merged = self.ratios.image(total)
        valid = None if paper else image.valid()
        metric, index = seen.image_metric(), None
        if kept < total:
            votes = seen.votes(None if paper else text.valid())
            index = best_first(votes)[:, :kept] if paper else pruned(votes, kept, valid)
            metric = rows(metric, index)
            valid = None if valid is None else valid.gather(1, index)
        matching = match(metric, merged, prefix=1, valid=valid)
        if index is not None:
            matching = then(index, matching)
        return self._change(image, matching)

    def _text(self, text: Stream, seen: Seen) -> Change | None:
        valid = None if self.ratios.paper_compatible else text.valid()
        return self._change(text, match(seen.text_metric(), self.ratios.text(text.x.shape[1]), prefix=1, valid=valid))

    def _change(self, stream: Stream, matching: Matching | None) -> Change | None:
        if matching is None:
            return None
        return plain_change(stream, matching) if self.ratios.paper_compatible else valid_change(stream, matching)


def plain_change(stream: Stream, matching: Matching) -> Change:
    """Returns the change as published: padding counts in a mean like any token, and the masks, 1 for a token and 0 for
    padding, are averaged with the tokens.

    The mean w is what a merged token's exp(logit) is multiplied by in later attentions: the mask afterwards is log w.
    """
    change = Change(matching, torch.ones(*stream.x.shape[:2], 1, device=stream.x.device), None)
    mask = added(stream.mask)
    if mask is None:
        return change
    return replace(change, mask=change.of(mask.exp()[..., None])[..., 0].log().clamp(min=HIDDEN))


# --- record -----------------------------------------------------------------------------------------------------------


def _ratios(values: Any) -> Ratios:
    return Ratios(**{f.name: getattr(values, f.name) for f in fields(Ratios)})


def _reduces(config: Config) -> bool:
    ratios = _ratios(config)
    return ratios.prune + ratios.image_merge + ratios.text_merge > 0


def _check(info: ModelInfo, config: Config) -> str | None:
    if info.reduces_tokens:
        return (
            "its layers reduce tokens already; on METER, ToMe goes with it in the image tower alone: where=image_tower"
        )
    fault = layers_fault(config.layers, info.family, info.depth)
    if fault:
        return fault
    before = (info.num_text_tokens, info.num_tokens - info.num_text_tokens)
    layers = chosen_layers(config.layers, info.family, info.depth)
    if token_counts(*before, _ratios(config), len(layers))[-1] == before:
        zero = "; as published, prune=0 merges nothing either" if config.paper_compatible and config.prune == 0 else ""
        return f"these ratios change nothing in {before[0]} text and {before[1]} image tokens{zero}"
    return None


def _after(info: ModelInfo, config: Config) -> ModelInfo:
    return replace(info, reduces_tokens=_reduces(config))


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    vlm: Any = model
    layers = chosen_layers(config.layers, vlm.family, len(vlm.layers)) if _reduces(config) else []
    ratios = {f.name: getattr(config, f.name) for f in fields(Ratios)}
    resolved = {"layers": layers, "ratios": ratios}
    return Applied(_rebuild(model, resolved), resolved, [f"layers.{i}" for i in layers])


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    ratios = Ratios(**resolved["ratios"])
    put_reducers(model, {i: TextInformedReducer(ratios) for i in resolved["layers"]})
    return model


def _wants_teacher(config: Config) -> bool:
    return config.distil and _reduces(config)


def _loss(inputs: LossInputs, config: Config) -> LossTerm:
    if not _wants_teacher(config):
        return LossTerm(1.0, inputs.logits.new_zeros(()))
    if inputs.teacher_logits is None:
        raise ValueError("pumer: the training must supply teacher logits, or distil must be false")
    return LossTerm(1.0, soft_loss(inputs.logits, inputs.teacher_logits.to(inputs.logits), 1.0))


TECHNIQUE = Technique(
    name="pumer",
    family="token_reduction",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    identity={"prune": 0.0, "image_merge": 0.0, "text_merge": 0.0},
    trains=_reduces,
    needs_teacher=_wants_teacher,
    loss=_loss,
    info_after=_after,
    models=tuple(LAYERS),
    rules=(NEEDS_ATTENTION_MAP,),
    source="PuMer, arXiv 2305.17530, section 3",
)
