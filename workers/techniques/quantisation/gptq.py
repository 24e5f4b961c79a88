"""GPTQ: weights rounded one column after the other, the columns that are left making up for the error, by second-order information.

Source: Frantar et al., GPTQ, arXiv 2210.17323, section 3: the inverse Hessian's Cholesky factor (step 3), lazy updates in blocks of
128 (step 2), damping by 1 % of the mean diagonal; groups: section 4, "Additional Tricks". Columns ordered by
activation are not in the paper: a heuristic that its authors added later.
Differs from the paper: a row that rounding to nearest serves better on the calibration images takes that, so the loss there is never
the larger one; with ``act_order`` the scales of groups are those of the weights before rounding, so neighbours share a scale in
the file; vision transformers, block by block, each calibrated behind the blocks already rounded; the heads last.

The file, its kernels and its speed are those of ``weight_only`` at the same bits and groups; only the codes differ. Costs: a pass over
the calibration images for each block, an (I, I) matrix of each layer, and its inverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.quantisation import weight_only
from workers.techniques.quantisation.shared_affine import (
    NotQuantisable,
    grouped_affine,
    linears,
    pack_bits,
    symmetric_int8,
)
from workers.techniques.quantisation.shared_calibration import watch
from workers.techniques.quantisation.shared_packed_embeddings import pack_embeddings
from workers.techniques.quantisation.weight_only import WIDTHS, GroupedLinear, Int8Linear, empty_layer
from workers.techniques.record import Applied, ModelInfo, Surroundings, Technique, choice

DAMP = 0.01
"""Share of the mean diagonal that is added to the Hessian's; ten times more where it still has no Cholesky factor."""

BLOCK = 128
"""Columns whose updates of later columns are done together; a multiple of every group size."""


@dataclass(frozen=True)
class Config:
    """Bits, what shares a scale, the order of the columns, and from how many images."""

    bits: int = choice(4, WIDTHS, search=(4, 3), doc="bits a weight")
    granularity: str = choice("group", ("group", "per_channel"), search=("group",), doc="what shares a scale")
    group_size: int = choice(32, (32, 64, 128), search=(32,), doc="neighbouring weights that share a scale, in groups")
    act_order: bool = choice(False, (False, True), doc="round the columns with the largest activations first")
    images: int = choice(128, (64, 128, 256, 512), search=(128,), doc="training images to calibrate on")
    kernel: str = choice("dequantise", ("dequantise", "packed"), search=("dequantise",), doc="how it is multiplied")
    skip_head: bool = choice(False, (False, True), search=(False,), doc="leave the classifier heads unquantised")
    embeddings: bool = choice(
        True, (True, False), search=(True,), doc="pack a text encoder's word embeddings as well, rounded to nearest"
    )

    def storage(self) -> weight_only.Config:
        """The format of the file."""
        return weight_only.Config(
            bits=self.bits, group_size=self.group_size, kernel=self.kernel, granularity=self.granularity
        )


# --- mathematics ------------------------------------------------------------------------------------------------------


class SecondMoment:
    """Mean of x x^T over tokens, (I, I) float32: half the Hessian of a layer's squared error, for each of its rows."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def see(self, x: Tensor) -> None:
        """Takes x (..., I); raises NotQuantisable for NaN and infinity."""
        rows = x.reshape(-1, x.shape[-1]).float()
        added = rows.T @ rows
        if not bool(added.isfinite().all()):
            raise NotQuantisable("holds NaN or infinity")
        self.total = added if self.total is None else self.total.add_(added)
        self.count += len(rows)

    def mean(self) -> Tensor:
        """Returns the mean, (I, I) float32."""
        if self.total is None:
            raise NotQuantisable("calibration saw no image")
        return self.total / self.count


@dataclass
class Grid:
    """The values that codes stand for: ``q * scale + start`` with q from ``low`` to ``high``; scale and start (O, G).

    Attributes:
        group_size: columns that share a scale.
        zero: (O, G) what the file keeps in place of ``start``; None for symmetric codes.
    """

    scale: Tensor
    start: Tensor
    low: int
    high: int
    group_size: int
    zero: Tensor | None = None

    def codes(self, values: Tensor, group: int) -> Tensor:
        """Rounds one column (O,) to codes, float32."""
        steps = (values - self.start[:, group]) / self.scale[:, group]
        return steps.round().clamp_(self.low, self.high)

    def values(self, codes: Tensor) -> Tensor:
        """Returns what codes (O, I) stand for, (O, I) float32."""
        group = torch.arange(codes.shape[1], device=codes.device) // self.group_size
        return codes.float() * self.scale[:, group] + self.start[:, group]


def make_grid(weight: Tensor, layer: Int8Linear) -> tuple[Grid, Tensor]:
    """Returns the grid of a layer's format for weight (O, I), and the codes to nearest, (O, I) float32."""
    if not isinstance(layer, GroupedLinear):
        q, scale = symmetric_int8(weight, per_channel=True)
        return Grid(scale[:, None], torch.zeros_like(scale)[:, None], -128, 127, weight.shape[1]), q.float()
    q, scale, zero = grouped_affine(weight, layer.bits, layer.group_size, layer.scale.dtype)
    start = zero.float() - 2 ** (layer.bits - 1) * scale.float()
    return Grid(scale.float(), start, 0, 2**layer.bits - 1, layer.group_size, zero), q.float()


def inverse_factor(moment: Tensor) -> Tensor:
    """Returns the upper Cholesky factor U of the inverse of the damped ``moment`` (I, I): inverse = U^T U.

    Channels that are always zero count as uncorrelated with the mean strength: their weights do not matter.

    Raises:
        NotQuantisable: the matrix stays singular however it is damped.
    """
    H = moment.double().clone()
    diagonal = H.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    damp = DAMP
    for _ in range(4):
        factor, fault = torch.linalg.cholesky_ex(H + damp * mean * torch.eye(len(H), dtype=H.dtype, device=H.device))
        if not bool(fault):
            inverse = torch.cholesky_inverse(factor)
            upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
            return upper.float()
        damp *= 10
    raise NotQuantisable("the second moment of its input has no Cholesky factor")


def loss(weight: Tensor, rounded: Tensor, moment: Tensor) -> Tensor:
    """Returns (O,) the mean squared error of each output over the tokens of ``moment`` (I, I): e^T H e."""
    error = (weight - rounded).double()
    return ((error @ moment.double()) * error).sum(1)


def second_order_codes(
    weight: Tensor, moment: Tensor, grid: Grid, layer: Int8Linear, act_order: bool
) -> tuple[Tensor, Grid]:
    """Rounds column after column; returns codes (O, I) float32 and the grid, whose groups follow the updated weights.

    Args:
        weight: (O, I) float32; moment: (I, I).
        grid: of the weights as they are; kept with ``act_order``, and where a row has one scale.
    """
    columns = weight.shape[1]
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = moment.diagonal().argsort(descending=True, stable=True)
    group_of = (order // grid.group_size).tolist()
    U = inverse_factor(moment[order][:, order])
    W, codes = weight[:, order].clone(), torch.empty_like(weight)
    follows = not act_order and grid.group_size < columns
    parts: list[Grid] = []
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        errors = torch.empty(len(W), last - first, device=W.device)
        for i in range(first, last):
            group = group_of[i]
            if follows and i % grid.group_size == 0:
                parts.append(make_grid(W[:, i : min(i + grid.group_size, columns)], layer)[0])
            part, index = (parts[-1], 0) if follows else (grid, group)
            q = part.codes(W[:, i], index)
            codes[:, order[i]] = q
            error = (W[:, i] - (q * part.scale[:, index] + part.start[:, index])) / U[i, i]
            W[:, i:last] -= torch.outer(error, U[i, i:last])
            errors[:, i - first] = error
        W[:, last:] -= errors @ U[first:last, last:]
    return codes, _joined(parts, grid) if follows else grid


def _joined(parts: list[Grid], like: Grid) -> Grid:
    zero = None if like.zero is None else torch.cat([part.zero for part in parts if part.zero is not None], 1)
    return Grid(
        torch.cat([part.scale for part in parts], 1),
        torch.cat([part.start for part in parts], 1),
        like.low,
        like.high,
        like.group_size,
        zero,
    )


def round_(layer: Int8Linear, weight: Tensor, moment: Tensor, act_order: bool) -> None:
    """Gives ``layer`` the better codes of each row of weight (O, I): second order, or to nearest."""
    weight = weight.detach().float()
    nearest_grid, nearest = make_grid(weight, layer)
    codes, grid = second_order_codes(weight, moment, nearest_grid, layer, act_order)
    worse = loss(weight, grid.values(codes), moment) > loss(weight, nearest_grid.values(nearest), moment)
    worse = worse[:, None]
    codes = torch.where(worse, nearest, codes)
    scale = torch.where(worse, nearest_grid.scale, grid.scale)
    if isinstance(layer, GroupedLinear):
        assert grid.zero is not None
        assert nearest_grid.zero is not None
        layer.weight = pack_bits(codes.to(torch.uint8), layer.bits)
        layer.scale = scale.to(layer.scale.dtype)
        layer.zero = torch.where(worse, nearest_grid.zero, grid.zero)
    else:
        layer.weight, layer.scale = codes.to(torch.int8).contiguous(), scale[:, 0].contiguous()


# --- record -----------------------------------------------------------------------------------------------------------


def _stages(names: list[str]) -> list[list[str]]:
    """Splits the layers, which stand in the order in which they run, into those of each block and those between blocks."""
    stages: list[list[str]] = []
    last = None
    for name in names:
        parts = name.split(".")
        block = next((parts[: i + 1] for i, part in enumerate(parts) if part.isdigit()), [])
        if block != last:
            stages.append([])
        stages[-1].append(name)
        last = block
    return stages


@torch.no_grad()
def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Rounds block after block, then replaces the linear layers in place. Layers that never run are rounded to nearest."""
    found = linears(model, skip_head=config.skip_head)
    storage, layers = config.storage(), dict[str, Int8Linear]()
    for names in _stages(list(found)):
        moments = {name: SecondMoment() for name in names}
        watchers = {name: moment.see for name, moment in moments.items()}
        ran = watch(model, watchers, surroundings, config.images)
        for name in names:
            surroundings.tick()
            linear = found[name]
            layer = layers[name] = empty_layer(linear, storage, config.bits)
            if name in ran:
                try:
                    round_(layer, linear.weight, moments[name].mean(), config.act_order)
                except NotQuantisable as error:
                    raise NotQuantisable(f"gptq: {name}: {error}") from None
            else:
                layer.quantise_(linear.weight)
            if linear.bias is not None:
                layer.bias = linear.bias.detach().clone()
            # The blocks behind see rounded weights; the packed ones would be unpacked at every call.
            linear.weight.copy_(layer.dequantised(torch.float32))
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    names = list(found)
    tables = pack_embeddings(model, weight_only.empty_table(storage)) if config.embeddings else []
    return Applied(model, _resolved(config, names, weight_only.packed(tables)), names + tables)


def _resolved(config: Config, names: list[str], tables: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {"bits": config.bits, "group_size": config.group_size, "kernel": config.kernel}
    return kept | {"granularity": config.granularity, "linears": names, **tables}


def _foresee(model: nn.Module, config: Config, surroundings: Surroundings) -> dict[str, Any]:
    names = list(linears(model, skip_head=config.skip_head))
    return _resolved(config, names, weight_only.packed_later(model, config))


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Replaces the same layers of a skeleton by layers without values."""
    return weight_only.TECHNIQUE.rebuild(model, resolved)


def _check(info: ModelInfo, config: Config) -> str | None:
    """Returns why the packed kernel cannot take the format, or None."""
    return weight_only.TECHNIQUE.check(info, config.storage())


def _simulated(config: Config, device: str) -> bool:
    """Whether no kernel takes the format; see :mod:`weight_only`."""
    return weight_only.TECHNIQUE.simulated(config.storage(), device)


TECHNIQUE = Technique(
    name="gptq",
    family="quantisation",
    version=1,
    Config=Config,
    stage="conversion",
    apply=_apply,
    rebuild=_rebuild,
    foresee=_foresee,
    check=_check,
    simulated=_simulated,
    models=("timm", "vilt", "meter"),
    source="GPTQ, arXiv 2210.17323, section 3",
)
