"""DiffQ: learns how many bits each group of weights needs, with noise in the place of rounding and a price on the size.

Source: Défossez et al., DiffQ, arXiv 2104.09987, sections 3.2 (pseudo quantisation noise) and 3.3 (learned widths and size
penalty, groups).
Differs from the paper: linear layers only (the patch embedding and all vectors stay in floating point, the word embeddings of a text
encoder have 8 bits); the last group of a weight may be shorter, its rest is stored and counted; the range of a weight is no part of the gradient; widths are fixed and packed at the
end of the recipe's recovery training, and evaluation before that rounds as it will be stored.
Costs: noise for each weight in a training step. Saves: the file, to the learned widths and half a byte a group. Activations stay
in floating point and no integer kernel runs, so no time is saved and rows are marked as simulated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.techniques.quantisation.shared_affine import (
    PackedLinear,
    linears,
    pack_bits,
    require_finite,
    require_finite_parameters,
    unpack_bits,
)
from workers.techniques.quantisation.shared_packed_embeddings import (
    rebuild_embeddings,
    store_embeddings,
    train_embeddings,
)
from workers.techniques.quantisation.shared_quantised_training import LEVELS_TRAINED
from workers.techniques.quantisation.weight_only import int8_table, packed
from workers.techniques.record import Applied, LossInputs, LossTerm, Surroundings, Technique, choice

LEAST, MOST = 2, 15
"""Bits of a group, section 3.3."""

FIRST = 8
"""Bits that training starts from."""

WIDTH_LR = 0.02
"""Peak learning rate of what the widths are a sigmoid of. Ours: from 8 to 4 bits takes about a hundred training steps."""

EPS = torch.finfo(torch.float32).eps
"""Smallest step: that of a constant weight."""

RANGE_BITS = 64
"""Of a layer's range: two float32."""

INDEX_BITS = 4
"""Of a group's width."""

MEBIBYTE_BITS = 8 * 2**20


@dataclass(frozen=True)
class Config:
    """The price of size, and how many weights share a width."""

    penalty: float = choice(
        1.0,
        (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
        search=(0.1, 1.0, 10.0, 100.0),
        doc="weight of the size in MiB in the loss",
    )
    group_size: int = choice(8, (8, 16, 32, 64, 128), search=(8, 32), doc="neighbouring weights that share a width")
    skip_head: bool = choice(False, (False, True), search=(False,), doc="leave the classifier heads unquantised")
    embeddings: bool = choice(
        True, (True, False), search=(True,), doc="quantise a text encoder's word embeddings as well, 8 bits a row"
    )


# --- quantiser --------------------------------------------------------------------------------------------------------


def widths_of(logits: Tensor) -> Tensor:
    """Returns the learned bits of each group, from LEAST to MOST: 2 + 13 sigmoid(l)."""
    return LEAST + (MOST - LEAST) * logits.sigmoid()


def span_of(low: Tensor, high: Tensor) -> Tensor:
    """Returns the length of a range; never 0."""
    return (high - low).clamp_min(EPS)


def steps_of(span: Tensor, widths: Tensor) -> Tensor:
    """Returns the distance of levels, (max - min) / (2^b - 1), for each of ``widths``, which need not be integers."""
    return span / (torch.exp2(widths) - 1)


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """Returns weight as (G, group_size), the last value repeated to fill the last group."""
    flat = weight.reshape(-1)
    padding = -len(flat) % group_size
    return torch.cat([flat, flat[-1:].expand(padding)]).view(-1, group_size)


def ungrouped(groups: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns (O, I) from what :func:`grouped` made of it."""
    return groups.reshape(-1)[: math.prod(shape)].view(shape)


# --- in training ------------------------------------------------------------------------------------------------------


class LearnedWidths(nn.Linear):
    """A linear layer with ``width_logits`` (G,); its weight is noisy in training and rounded in evaluation."""

    quantised = True  # see workers.techniques.quantisation.shared_affine.linears

    def __init__(self, linear: nn.Linear, group_size: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.group_size = linear.weight, linear.bias, group_size
        count = -(-linear.weight.numel() // group_size)
        self.width_logits = nn.Parameter(torch.empty(count, device=linear.weight.device))
        self.train(linear.training)

    @torch.no_grad()
    def start(self) -> None:
        """Gives every group :data:`FIRST` bits."""
        share = (FIRST - LEAST) / (MOST - LEAST)
        self.width_logits.fill_(math.log(share / (1 - share)))

    def range(self) -> tuple[Tensor, Tensor]:
        """Returns the smallest weight and the length of the range, both ()."""
        low, high = self.weight.detach().aminmax()
        return low, span_of(low, high)

    def noisy(self) -> Tensor:
        """Returns the weight (O, I) with uniform noise of one step's length, the size of a rounding's error."""
        steps = steps_of(self.range()[1], widths_of(self.width_logits))
        noise = torch.rand(len(steps), self.group_size, device=steps.device) - 0.5
        return self.weight + ungrouped(noise * steps[:, None], (self.out_features, self.in_features))

    @torch.no_grad()
    def levels(self) -> tuple[Tensor, Tensor]:
        """Returns the levels (G, group_size), integers in float32, and the integer widths (G,) int64."""
        widths = widths_of(self.width_logits).round()
        low, span = self.range()
        steps = steps_of(span, widths)[:, None]
        levels = ((grouped(self.weight, self.group_size) - low) / steps).round()
        return torch.minimum(levels.clamp_min(0), (torch.exp2(widths) - 1)[:, None]), widths.long()

    def rounded(self) -> Tensor:
        """Returns the weight (O, I) as it will be stored."""
        levels, widths = self.levels()
        low, span = self.range()
        return ungrouped(levels * steps_of(span, widths.float())[:, None] + low, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) -> (..., O)."""
        return F.linear(x, self.noisy() if self.training else self.rounded(), self.bias)

    def bits(self) -> Tensor:
        """Returns the bits that the weight takes when it is stored, (), differentiable; widths not yet integers."""
        fixed = INDEX_BITS * len(self.width_logits) + RANGE_BITS
        return self.group_size * widths_of(self.width_logits).sum() + fixed

    @torch.no_grad()
    def stored(self) -> MixedWidths:
        """Returns the packed layer that computes the same in evaluation."""
        require_finite(self.weight, "the trained weight")
        levels, widths = self.levels()
        counts = [int((widths == bits).sum()) for bits in range(LEAST, MOST + 1)]
        made = MixedWidths(self.in_features, self.out_features, self.bias is not None, self.group_size, counts)
        parts = [pack_bits(levels[widths == bits].int(), bits).flatten() for bits in range(LEAST, MOST + 1)]
        made.weight = torch.cat(parts)
        made.widths = pack_bits((widths - LEAST)[None], INDEX_BITS)[0]
        made.low, made.span = (value.clone() for value in self.range())
        if self.bias is not None:
            made.bias = self.bias.detach().clone()
        return made.eval()


# --- afterwards -------------------------------------------------------------------------------------------------------


class MixedWidths(PackedLinear):
    """x W^T + b: groups in the order of their widths in ``weight`` (bytes,) uint8, ``widths`` (ceil(G/2),) uint8, range.

    Args:
        counts: groups of each width from LEAST to MOST.
    """

    weight: Tensor
    widths: Tensor
    low: Tensor
    span: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, group_size: int, counts: list[int]) -> None:
        super().__init__(in_features, out_features)
        self.group_size, self.counts = group_size, counts
        size = sum(count * self._row(bits) for bits, count in self._present())
        self.register_buffer("weight", torch.empty(size, dtype=torch.uint8, device="meta"))
        self.register_buffer("widths", torch.empty((sum(counts) + 1) // 2, dtype=torch.uint8, device="meta"))
        self.register_buffer("low", torch.empty((), device="meta"))
        self.register_buffer("span", torch.empty((), device="meta"))
        self.register_buffer("bias", torch.empty(out_features, device="meta") if bias else None)

    def _row(self, bits: int) -> int:
        return self.group_size * bits // 8  # group sizes are multiples of 8: nothing is wasted

    def _present(self) -> list[tuple[int, int]]:
        return [(bits, count) for bits, count in enumerate(self.counts, LEAST) if count]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        parts, start = [], 0
        for bits, count in self._present():
            size = count * self._row(bits)
            q = unpack_bits(self.weight[start : start + size].view(count, -1), bits, self.group_size)
            step = steps_of(self.span, torch.full((), float(bits), device=q.device))
            parts.append(q.float() * step + self.low)
            start += size
        widths = unpack_bits(self.widths[None], INDEX_BITS, sum(self.counts))[0]
        place = widths.long().argsort(stable=True).argsort()  # of each group among those in order of width
        return ungrouped(torch.cat(parts)[place], (self.out_features, self.in_features)).to(dtype)


# --- record -----------------------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> list[LearnedWidths]:
    return [part for part in model.modules() if isinstance(part, LearnedWidths)]


def mebibytes(model: nn.Module) -> Tensor:
    """Returns what the quantised weights will take, (), differentiable: section 3.3's model size."""
    return torch.stack([layer.bits() for layer in _layers(model)]).sum() / MEBIBYTE_BITS


def _loss(inputs: LossInputs, config: Config) -> LossTerm:
    return LossTerm(1.0, config.penalty * mebibytes(inputs.model))


def _groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    return [{"params": [layer.width_logits for layer in _layers(model)], "lr": WIDTH_LR, "weight_decay": 0.0}]


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    names = list(linears(model, skip_head=config.skip_head))
    resolved = {"linears": names, "group_size": config.group_size, "counts": None}
    _rebuild(model, resolved)
    for layer in _layers(model):
        layer.start()
    tables = train_embeddings(model) if config.embeddings else []
    return Applied(model, resolved | packed(tables), names + tables)


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """The widths of layers in training have no values yet."""
    group_size = int(resolved["group_size"])
    for i, name in enumerate(resolved["linears"]):
        old: Any = model.get_submodule(name)
        if resolved["counts"] is None:
            model.set_submodule(name, LearnedWidths(old, group_size))
        else:
            shape = (old.in_features, old.out_features, old.bias is not None)
            model.set_submodule(name, MixedWidths(*shape, group_size, list(resolved["counts"][i])))
    tables = resolved.get("embeddings", [])
    if tables and resolved["counts"] is None:
        train_embeddings(model)
    else:
        rebuild_embeddings(model, tables, int8_table)
    return model


def _finalise(model: nn.Module, config: Config) -> dict[str, Any]:
    """Rounds the widths and packs the weights."""
    require_finite_parameters(model)
    counts = []
    for name, part in list(model.named_modules()):
        if isinstance(part, LearnedWidths):
            made = part.stored()
            model.set_submodule(name, made)
            counts.append(made.counts)
    store_embeddings(model, int8_table)
    return {"counts": counts}


TECHNIQUE = Technique(
    name="diffq",
    family="quantisation",
    version=1,
    Config=Config,
    stage="surgery",
    apply=_apply,
    rebuild=_rebuild,
    trains=lambda config: True,
    loss=_loss,
    parameter_groups=_groups,
    finalise=_finalise,
    simulated=lambda config, device: True,
    models=("timm", "vilt", "meter"),
    rules=LEVELS_TRAINED,
    source="Défossez et al. 2022, arXiv 2104.09987, section 3",
)
