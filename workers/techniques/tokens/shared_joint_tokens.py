"""Tokens of text and image between the layers of ViLT and METER: what the techniques that reduce them share.

A technique says in a :class:`Reducer` what happens to the tokens of one layer; :mod:`workers.techniques.tokens.shared_vilt_layers` and
:mod:`workers.techniques.tokens.shared_meter_layers` are the layers that do it. The two modalities never mix: what leaves a modality's
tokens is a :class:`Change` of that modality alone. Class tokens come first in each. Attention stays fused. Imports no
transformers, so that what knows image models alone stays quick to import.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.models import vision_language as vl
from workers.techniques.backbones import half
from workers.techniques.tokens.shared_blocks import rows, spread_layers
from workers.techniques.tokens.shared_merging import Matching

LAYERS = {family: f"workers.techniques.tokens.shared_{family}_layers" for family in ("vilt", "meter")}
"""Model families whose layers see text and image, and the modules with those layers."""

HIDDEN = -1e4
"""Added to the logits of a padded key: finite in every float type, and exp of it is 0 in each."""


# --- layers by name ---------------------------------------------------------------------------------------------------

SPREADS = {f"spread_{count}": count for count in range(1, 5)}
"""That many layers, evenly from a sixth of the depth on: of 12 layers 2; 2, 7; 2, 5, 8; 2, 4, 7, 9."""

_SPREAD_START = 1 / 6

PUBLISHED = ("2,5,8", "2,4,6,8", "2,3,4", "7,8,9", "0,2,4,6", "2,4,6")
"""Layers of the paper's configurations and of its ablation."""

_SMALL = ("0", "1", "2", "0,1", "0,2", "1,2", "1,3", "2,3", "2,4", "0,1,2", "1,2,3", "0,2,4", "0,1,2,3")
LAYER_NAMES = (*SPREADS, *PUBLISHED, *_SMALL)
"""What a parameter ``layers`` offers: a spread over any depth, or the numbers of the layers from 0 on, of which any set is
allowed (:func:`numbers_fault`).

METER's layers are numbered as in the paper, whose configurations go beyond its six fusion layers: those of both streams in
turn, text first. Text layers decide, so the numbers are even, and 2 i is fusion layer i.
"""


_NUMBERS = re.compile(r"(0|[1-9][0-9]{0,2})(,[1-9][0-9]{0,2})*")
"""One spelling a set, so that equal recipes have equal hashes."""


def numbers_fault(value: object) -> str | None:
    """Returns why ``value`` is not the numbers of some layers in ascending order, or None; a model's depth is not asked."""
    if isinstance(value, str) and _NUMBERS.fullmatch(value):
        numbers = [int(number) for number in value.split(",")]
        if all(a < b for a, b in pairwise(numbers)):
            return None
    return "must be a name such as 'spread_3', or layer numbers in ascending order without spaces, such as '2,5,8'"


def chosen_layers(name: str, family: str, depth: int) -> list[int]:
    """Returns the layers that reduce, fusion layers for METER, in ascending order; see :data:`LAYER_NAMES`."""
    if name in SPREADS:
        return spread_layers(depth, _SPREAD_START, SPREADS[name])
    numbers = [int(number) for number in name.split(",")]
    return [number // 2 for number in numbers] if family == "meter" else numbers


def layers_fault(name: str, family: str, depth: int) -> str | None:
    """Returns why a model of ``depth`` layers (METER: fusion layers) cannot reduce in the layers of that name, or None."""
    if name not in SPREADS and family == "meter" and any(int(number) % 2 for number in name.split(",")):
        return f"layers={name}: METER's odd layers are the image stream's; text layers, which decide, have even numbers"
    if max(chosen_layers(name, family, depth)) >= depth:
        last = 2 * depth - 2 if family == "meter" else depth - 1
        return f"layers={name}: the last layer that can reduce is number {last}; a spread fits every depth"
    return None


# --- streams ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """One modality's tokens between two layers, class token first.

    Attributes:
        x: (B, N, C).
        mask: (B, N): bool, true where valid; or float, added to the attention logits; None where nothing is padding.
    """

    x: Tensor
    mask: Tensor | None

    def valid(self) -> Tensor | None:
        """Returns (B, N) bool, None where nothing is padding."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return self.mask
        return self.mask > HIDDEN / 2

    def weight(self) -> Tensor:
        """Returns (B, N, 1) float32: 1 for a token, 0 for padding."""
        valid = self.valid()
        return torch.ones(*self.x.shape[:2], 1, device=self.x.device) if valid is None else valid[..., None].float()


def added(mask: Tensor | None) -> Tensor | None:
    """Returns a mask (B, N) as float32 to be added to attention logits."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, HIDDEN)


def joined(text: Stream, image: Stream) -> tuple[Tensor, Tensor | None]:
    """Returns tokens (B, T + I, C) and mask (B, T + I) of the joint sequence."""
    x, masks = torch.cat([text.x, image.x], dim=1), [text.mask, image.mask]
    if masks == [None, None]:
        return x, None
    if any(mask is not None and mask.dtype != torch.bool for mask in masks):
        sizes = (text.x.shape[:2], image.x.shape[:2])
        found = [torch.zeros(s, device=x.device) if m is None else added(m) for m, s in zip(masks, sizes, strict=True)]
    else:
        found = [s.x.new_ones(s.x.shape[:2], dtype=torch.bool) if s.mask is None else s.mask for s in (text, image)]
    return x, torch.cat([part for part in found if part is not None], dim=1)


@dataclass(frozen=True)
class Change:
    """What happens to one modality's tokens in one layer.

    Attributes:
        matching: rows that stay, that are merged and, in neither, that are removed.
        weight: (B, N, 1) float32 of each token in the means, before; 0 for padding.
        mask: (B, M) afterwards.
    """

    matching: Matching
    weight: Tensor
    mask: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """Returns the weighted means (B, M, C) of x (B, N, C); rows whose weights are all 0 are 0."""
        if self.matching.merged.shape[1] == 0:
            return rows(x, self.matching.rest)
        total = self.matching.sums(self.weight)
        mean = self.matching.sums(x * self.weight) / total.masked_fill(total == 0, 1.0)
        return mean.to(x.dtype)

    def stream(self, stream: Stream) -> Stream:
        """Returns the changed tokens with their mask."""
        return Stream(self.of(stream.x), self.mask)


def valid_change(stream: Stream, matching: Matching) -> Change:
    """Returns the change in which padding has no part: means are of valid tokens, and valid is what has one of them."""
    weight = stream.weight()
    mask = None if stream.mask is None else matching.sums(weight)[..., 0] > 0
    return Change(matching, weight, mask)


# --- what an attention compared ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What the text asked the image in a layer.

    Attributes:
        image_keys: (B, H, I, D), those that the text compares itself with; text_keys: (B, H, T, D), of the text's
            attention to itself.
        shares: (B, T, I) float32, mean over heads of the attention of each text token to each image token; None where
            the reducer has no use for it.
    """

    image_keys: Tensor
    text_keys: Tensor
    shares: Tensor | None

    def image_metric(self) -> Tensor:
        """Returns the image's keys, mean over the heads: (B, I, D)."""
        return self.image_keys.detach().mean(dim=1)

    def text_metric(self) -> Tensor:
        """Returns the text's keys, mean over the heads: (B, T, D)."""
        return self.text_keys.detach().mean(dim=1)

    def votes(self, voters: Tensor | None) -> Tensor:
        """Returns (B, I) float32: the attention that each image token gets from the text, mean over heads and text tokens.

        Args:
            voters: (B, T) bool, which text tokens count; None for all.
        """
        if self.shares is None:
            raise ValueError("votes need a reducer that has asks = True")
        if voters is None:
            return self.shares.mean(dim=1)
        return (self.shares * voters[..., None]).sum(dim=1) / voters.sum(dim=1, keepdim=True)


def attend(
    attention: vl.FusedAttention,
    q: Tensor,  # (B, H, N, D), the text's first
    k: Tensor,  # (B, H, S, D), the image's last
    v: Tensor,  # (B, H, S, D)
    mask: Tensor | None,  # (B, S) of the keys, as in Stream
    asking: int,  # how many queries are the text's; 0 where nothing is to be told
    image_tokens: int,
) -> tuple[Tensor, Tensor | None]:
    """Returns the output (B, N, H * D), and the attention (B, asking, image_tokens) of the text to the image, mean over heads.

    A fused kernel does not give its map out. The few rows of the text are computed openly instead, all others fused, so
    that nothing is computed twice.
    """
    if asking == 0:
        return attention.attend(q, k, v, mask), None
    logits = (q[:, :, :asking] @ k.transpose(-1, -2)).float() * attention.scale
    if mask is not None:
        logits = logits + cast(Tensor, added(mask))[:, None, None, :]
    weights = logits.softmax(dim=-1)
    shares = weights.detach()[..., -image_tokens:].mean(dim=1)
    if type(attention) is not vl.FusedAttention:  # one that computes something else, of a quantiser for example
        return attention.attend(q, k, v, mask), shares
    weights = functional.dropout(weights.to(v.dtype), attention.dropout, attention.training)
    out = (weights @ v).transpose(1, 2).flatten(2)
    if asking < q.shape[2]:
        out = torch.cat([out, attention.attend(q[:, :, asking:], k, v, mask)], dim=1)
    return out, shares


# --- what happens in a layer ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reduction:
    """What happens to the tokens in the middle of a layer; None leaves a modality as it is.

    Attributes:
        carried: what the next layer's reducer gets.
    """

    text: Change | None = None
    image: Change | None = None
    carried: Any = None


class Reducer(nn.Module, ABC):
    """What happens to the tokens of one layer. Weights that a technique adds are this module's.

    Attributes:
        asks: wants :attr:`Seen.shares`.
    """

    asks = False

    def enter(self, image: Stream, carried: Any) -> tuple[Stream, Any]:
        """Changes the image tokens before the layer; ``carried`` is what the reducer before handed on, None at first."""
        return image, carried

    @abstractmethod
    def reduce(self, text: Stream, image: Stream, seen: Seen, carried: Any) -> Reduction:
        """Says what changes between attention and MLP."""

    def leave(self, image: Tensor, carried: Any) -> None:
        """Looks at the image tokens (B, I, C) after the layer."""


class ReducingLayer(nn.Module):
    """What the reducing layers of both families share: the children of the layer that was, under their names, and ``reducer``.

    Args:
        layer: from here on it runs only as part of this one.
    """

    reduces_tokens = True

    def __init__(self, layer: nn.Module, reducer: Reducer) -> None:
        nn.Module.__init__(self)  # the parts are there already
        for name, part in layer.named_children():
            self.add_module(name, part)
        self.reducer = reducer
        self.training = layer.training  # a new module would be in training mode
        reducer.train(layer.training)


def family_module(model: nn.Module) -> Any:
    """Returns the module that reduces tokens in models of this family.

    Raises:
        ValueError: a family without one.
    """
    return half(model, LAYERS)


def put_reducers(model: nn.Module, reducers: Mapping[int, Reducer]) -> None:
    """Lets the given layers (METER: fusion layers) reduce tokens, in place; names of weights stay."""
    layers: Any = model.layers
    make = family_module(model).ReducedLayer
    for number, reducer in reducers.items():
        layers[number] = make(layers[number], reducer)
