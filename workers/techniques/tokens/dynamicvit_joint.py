"""DynamicViT in vision-language models: a predictor before some joint layers says which image tokens go on.

Class token and text stay. In training the predictor's draw masks, otherwise its best tokens stay and the others are removed;
padding is never among the best. An example with two pictures has two traces, whose losses are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.record import Applied, LossInputs, LossTerm, Surroundings
from workers.techniques.tokens.dynamicvit import Config, predicted_layers, whole_loss
from workers.techniques.tokens.dynamicvit_predictors import Predictor, decide, kept_counts, ratio_loss, token_loss
from workers.techniques.tokens.shared_blocks import NEVER, best_first
from workers.techniques.tokens.shared_joint_tokens import (
    HIDDEN,
    Change,
    Reducer,
    Reduction,
    Seen,
    Stream,
    family_module,
    put_reducers,
)
from workers.techniques.tokens.shared_merging import Matching


@dataclass(frozen=True)
class Thinned:
    """What has been decided of one picture's patch tokens.

    Attributes:
        patches: P, of the whole picture.
        valid: (B, P', 1) float32 of 0 and 1, patches that are no padding, of those that are left.
        decided: one (B, P, 1) of 0 and 1 a predictor, in training.
        features: (B, P, C) of the last layer, in training.
    """

    patches: int
    valid: Tensor
    decided: tuple[Tensor, ...] = ()
    features: Tensor | None = None

    def shares(self) -> list[Tensor]:
        """Returns the decisions so that their mean is the share of the valid patches that were kept."""
        scale = self.patches / self.valid.sum(dim=1, keepdim=True)
        return [kept * scale for kept in self.decided]


class ThinningReducer(Reducer):
    """Drops image tokens before its layer; the last one of a model keeps what the losses need.

    Args:
        stage: how many predictors stand before this one.
        keep: share of the patch tokens that each predictor keeps of those before it.
        width: C of the tokens; None for a layer without a predictor. A predictor comes on the meta device.

    Attributes:
        traces: of the forward pass in training, one a picture, until the loss takes them; the graph of that step hangs
            on them, so they are never copied.
    """

    def __init__(self, stage: int, keep: float, width: int | None) -> None:
        super().__init__()
        self.stage, self.keep = stage, keep
        self.predictor = None if width is None else Predictor(width, device="meta")
        self.last = False
        self.traces: list[Thinned] = []

    def enter(self, image: Stream, carried: Any) -> tuple[Stream, Any]:
        """Drops patch tokens; the class token stays."""
        if self.predictor is None:
            return image, carried
        thinned = Thinned(image.x.shape[1] - 1, image.weight()[:, 1:]) if carried is None else carried
        left = thinned.decided[-1] if thinned.decided else thinned.valid
        chances = self.predictor(image.x[:, 1:], left)
        if self.training:
            return self._mask(image, thinned, decide(chances, left))
        kept = min(kept_counts(thinned.patches, self.keep, self.stage + 1)[-1], left.shape[1])
        index = best_first(chances[..., 0].masked_fill(left[..., 0] == 0, -torch.inf))[:, :kept].sort(dim=-1).values
        thinned = Thinned(thinned.patches, left.gather(1, index[..., None]))
        index = torch.cat([torch.zeros_like(index[:, :1]), index + 1], dim=1)
        mask = None if image.mask is None else image.mask.gather(1, index)
        return Change(Matching(index, index[:, :0], index[:, :0]), image.weight(), mask).stream(image), thinned

    def _mask(self, image: Stream, thinned: Thinned, decided: Tensor) -> tuple[Stream, Thinned]:
        bias = (decided + NEVER).log().masked_fill(thinned.valid == 0, HIDDEN)[..., 0]
        mask = torch.cat([torch.zeros_like(bias[:, :1]), bias], dim=1)
        return Stream(image.x, mask), Thinned(thinned.patches, thinned.valid, (*thinned.decided, decided))

    def reduce(self, text: Stream, image: Stream, seen: Seen, carried: Any) -> Reduction:
        """Leaves the tokens: they were dropped before the layer."""
        return Reduction(carried=carried)

    def leave(self, image: Tensor, carried: Any) -> None:
        """Notes the trace of a forward pass in training."""
        if self.training and self.last:
            self.traces.append(Thinned(carried.patches, carried.valid, carried.decided, image[:, 1:]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "traces": []}


# --- model ------------------------------------------------------------------------------------------------------------


def apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Puts the predictors in, in place."""
    vlm: Any = model
    layers = predicted_layers(config, vlm.family, len(vlm.layers)) if config.keep < 1 else []
    resolved = {"layers": layers, "keep": config.keep}
    rebuild(model, resolved)
    for i in layers:
        vlm.layers[i].reducer.predictor.fill_(next(vlm.parameters()), surroundings.generator)
    return Applied(model, resolved, [f"layers.{i}" for i in layers])


def rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Puts the predictors in, in place; they come on the meta device, and whoever calls this fills them."""
    vlm: Any = model
    chosen, keep, depth = resolved["layers"], resolved["keep"], len(vlm.layers)
    if not chosen:
        return model
    width = family_module(model).width(model)
    reducers = {i: ThinningReducer(stage, keep, width) for stage, i in enumerate(chosen)}
    reducers.setdefault(depth - 1, ThinningReducer(len(chosen), keep, None)).last = True
    put_reducers(model, reducers)
    model.register_forward_pre_hook(_forget)
    return model


def _last(model: Any) -> Any:
    return getattr(model.layers[-1], "reducer", None)


def _forget(model: nn.Module, args: object) -> None:
    _last(model).traces.clear()


# --- losses -----------------------------------------------------------------------------------------------------------


def loss(inputs: LossInputs, config: Config) -> LossTerm:
    """Returns DynamicViT's losses, averaged over the pictures of an example."""
    traces = take_traces(inputs.model)
    if traces is None:
        return LossTerm(1.0, inputs.logits.new_zeros(()))
    ratios = torch.stack([ratio_loss(trace.shares(), config.keep) for trace in traces]).mean()
    return LossTerm(1.0, whole_loss(inputs, config, ratios, partial(distance, inputs, traces)))


def take_traces(model: nn.Module) -> list[Thinned] | None:
    """Returns what the last forward pass in training decided, one trace a picture, once; None without predictors.

    Raises:
        ValueError: there was none.
    """
    reducer = _last(model)
    if not isinstance(reducer, ThinningReducer):
        return None
    if not reducer.traces:
        raise ValueError("dynamicvit: the loss needs a forward pass in training mode before it")
    traces, reducer.traces = reducer.traces, []
    return traces


def distance(inputs: LossInputs, traces: list[Thinned]) -> Tensor | None:
    """Returns the squared distance of the kept image tokens from the teacher's, mean over pictures, tokens and channels.

    None where the teacher's tokens are not those of the model.
    """
    teacher, batch = inputs.teacher, inputs.images
    if teacher is None:
        return None
    if not _comparable(teacher, inputs.model):
        return None
    with torch.no_grad():
        theirs = [found[:, 1:] for found in family_module(teacher).image_features(teacher, batch)]
    norm = family_module(inputs.model).last_norm
    losses = []
    for trace, expected in zip(traces, theirs, strict=True):
        if trace.features is None or trace.features.shape != expected.shape:
            return None
        losses.append(token_loss(norm(inputs.model, trace.features), expected, trace.decided[-1].detach()))
    return torch.stack(losses).mean()


def _comparable(teacher: Any, model: Any) -> bool:
    """Returns whether the two see pictures of the same size; the shapes of the tokens say the rest."""
    same: bool = (teacher.family, teacher.shape.img_size) == (model.family, model.shape.img_size)
    return same
