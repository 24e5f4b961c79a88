"""Static int8: linear layers hold int8 weights and quantise their inputs with scales known beforehand; the product is int8.

Source: Jacob et al., arXiv 1712.05877, section 2 (affine quantisation, integer products); ranges by percentiles: Wu et al.,
arXiv 2004.09602.
Differs from the papers: activations between linear layers (norms, attention, GELU, residuals) stay in the model's type, so
each layer quantises its input and scales its output; weights have one symmetric scale a row, inputs an asymmetric one a tensor;
the patch embedding stays as it is.

The plain baseline of post-training quantisation: LayerNorm's outputs have channels a hundred times larger than others, and one
scale for all of them loses the small ones. smoothquant and repq_vit are remedies; fq_vit, which is for the norms' inputs, is none. Costs: one pass over the calibration
images, at conversion. Saves: about 3.8x of the file, and time where an integer kernel is at hand (integer_linear says where);
unlike dynamic_int8 a call need not search its activations for their range. Elsewhere the row is ``simulated``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from workers.techniques.quantisation.shared_affine import linears
from workers.techniques.quantisation.shared_calibration import TensorRange, asymmetric, running, watch
from workers.techniques.quantisation.shared_integer_linear import IntegerLinear, no_kernel
from workers.techniques.quantisation.shared_packed_embeddings import pack_embeddings, rebuild_embeddings
from workers.techniques.quantisation.weight_only import int8_table, packed, packed_later
from workers.techniques.record import Applied, Surroundings, Technique, choice


@dataclass(frozen=True)
class Config:
    """How the range of an activation is taken, from how many images, and whether the head is left alone."""

    observer: str = choice("minmax", ("minmax", "percentile"), doc="range: the extremes, or a percentile")
    percentile: float = choice(
        99.99, (99.0, 99.9, 99.99, 99.999), search=(99.99,), doc="% of the values in the range; for percentile"
    )
    images: int = choice(256, (64, 128, 256, 512, 1024), search=(256,), doc="training images to calibrate on")
    skip_head: bool = choice(False, (False, True), search=(False,), doc="leave the classifier heads unquantised")
    embeddings: bool = choice(
        True, (True, False), search=(True,), doc="pack a text encoder's word embeddings as well, 8 bits a row"
    )


def quantise_linears(
    model: nn.Module, surroundings: Surroundings, *, percentile: float, images: int, skip_head: bool
) -> list[str]:
    """Replaces the linear layers that run by calibrated ones; returns their names.

    Args:
        percentile: see :class:`TensorRange`.

    Raises:
        NotQuantisable: a layer is quantised already, or its weights or inputs hold NaN or infinity.
    """
    found = linears(model, skip_head=skip_head)
    ranges = {name: TensorRange(percentile) for name in found}
    ran = watch(model, {name: seen.see for name, seen in ranges.items()}, surroundings, images)
    names = [name for name in found if name in ran]
    for name in names:
        model.set_submodule(name, IntegerLinear.of(found[name], *asymmetric(*ranges[name].range())))
    return names


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Calibrates on the model as it is, then replaces the linear layers in place."""
    percentile = config.percentile if config.observer == "percentile" else 100.0
    names = quantise_linears(
        model, surroundings, percentile=percentile, images=config.images, skip_head=config.skip_head
    )
    tables = pack_embeddings(model, int8_table) if config.embeddings else []
    return Applied(model, {"linears": names, **packed(tables)}, names + tables)


def _foresee(model: nn.Module, config: Config, surroundings: Surroundings) -> dict[str, Any]:
    names = running(model, linears(model, skip_head=config.skip_head), surroundings)
    return {"linears": names, **packed_later(model, config)}


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Replaces the same layers of a skeleton by layers without values."""
    for name in resolved["linears"]:
        model.set_submodule(name, IntegerLinear.like(model.get_submodule(name), "static"))
    rebuild_embeddings(model, resolved.get("embeddings", ()), int8_table)
    return model


TECHNIQUE = Technique(
    name="static_int8",
    family="quantisation",
    version=2,
    Config=Config,
    stage="conversion",
    apply=_apply,
    rebuild=_rebuild,
    foresee=_foresee,
    simulated=no_kernel,
    models=("timm", "vilt", "meter"),
    source="Jacob et al. 2018, arXiv 1712.05877, section 2; Wu et al. 2020, arXiv 2004.09602",
)
