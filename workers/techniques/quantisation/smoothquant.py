"""SmoothQuant: large channels of activations are made smaller, the weights that read them larger, then both are quantised to 8 bits.

Source: Xiao et al., SmoothQuant, arXiv 2211.10438, section 4: s = max |X|^alpha / max |W|^(1 - alpha) a channel, folded into the
LayerNorm before (equations 3 and 4); activations a scale a token (its O1) or one known beforehand (its O3).
Differs from the paper: for vision transformers, where the norms of a block are followed by query, key, value (and gate), and by the
first layer of the MLP; products inside the attention stay floating.

On vision-language models: all layers of ViLT; of METER the image encoder, the rest being quantised without smoothing, because norms
behind a residual feed the residual as well.

Exact before quantisation, apart from the rounding of the folded weights. Costs: one or two passes over the calibration images. Saves:
what ``static_int8`` saves, through the same kernel; ``simulated`` only where that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.quantisation.shared_affine import linears
from workers.techniques.quantisation.shared_calibration import ChannelRange, running, watch
from workers.techniques.quantisation.shared_integer_linear import INPUTS, IntegerLinear, no_kernel
from workers.techniques.quantisation.shared_norm_folding import fold_, folding_fault, pairs, reader_peaks
from workers.techniques.quantisation.shared_packed_embeddings import pack_embeddings, rebuild_embeddings
from workers.techniques.quantisation.static_int8 import quantise_linears
from workers.techniques.quantisation.weight_only import int8_table, packed, packed_later
from workers.techniques.record import Applied, ModelInfo, Surroundings, Technique, choice, number


@dataclass(frozen=True)
class Config:
    """How much of the activations' range moves into the weights, and how what is left is quantised."""

    alpha: float = number(
        0.5, 0.0, 1.0, 0.05, search=(0.3, 0.8, 0.1), doc="share of a channel's range that moves into the weights"
    )
    activations: str = choice("token", INPUTS, doc="a scale a token as it comes, or one calibrated scale a layer")
    images: int = choice(256, (64, 128, 256, 512, 1024), search=(256,), doc="training images to calibrate on")
    skip_head: bool = choice(False, (False, True), search=(False,), doc="leave the classifier heads unquantised")
    embeddings: bool = choice(
        True, (True, False), search=(True,), doc="pack a text encoder's word embeddings as well, 8 bits a row"
    )


def migration(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Returns (C,) float32 the factors s = max |X|^alpha / max |W|^(1 - alpha); 1 for a channel that is always zero.

    Args:
        activations: (C,) largest absolute activation; weights: (C,) largest absolute weight of the channel.
    """
    factor = activations.pow(alpha) / weights.pow(1 - alpha)
    usable = (activations > 0) & (weights > 0) & factor.isfinite() & (factor > 0)
    return torch.where(usable, factor, torch.ones_like(factor))


def smooth_(model: nn.Module, alpha: float, surroundings: Surroundings, images: int) -> list[str]:
    """Moves ranges from activations into weights, in place; returns the names of the norms that changed."""
    found = pairs(model)
    seen = {pair.readers[0]: ChannelRange() for pair in found}
    ran = watch(model, {name: channels.see for name, channels in seen.items()}, surroundings, images)
    changed = []
    for pair in found:
        if pair.readers[0] in ran:
            low, high = seen[pair.readers[0]].range()
            peak = torch.maximum(low.abs(), high.abs())
            fold_(model, pair, migration(peak, reader_peaks(model, pair), alpha))
            changed.append(pair.norm)
    return changed


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Smooths, then replaces the linear layers in place."""
    found = linears(model, skip_head=config.skip_head)
    norms = smooth_(model, config.alpha, surroundings, config.images)
    if config.activations == "static":
        names = quantise_linears(
            model, surroundings, percentile=100.0, images=config.images, skip_head=config.skip_head
        )
    else:
        names = list(found)
        for name in names:
            model.set_submodule(name, IntegerLinear.of(found[name]))
    tables = pack_embeddings(model, int8_table) if config.embeddings else []
    resolved = {"activations": config.activations, "linears": names, **packed(tables)}
    return Applied(model, resolved, [*norms, *names, *tables])


def _foresee(model: nn.Module, config: Config, surroundings: Surroundings) -> dict[str, Any]:
    found = linears(model, skip_head=config.skip_head)
    names = running(model, found, surroundings) if config.activations == "static" else list(found)
    return {"activations": config.activations, "linears": names, **packed_later(model, config)}


def _check(info: ModelInfo, config: Config) -> str | None:
    """Returns why the model cannot be quantised so, or None."""
    return folding_fault(info)


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Replaces the same layers of a skeleton by layers without values."""
    for name in resolved["linears"]:
        model.set_submodule(name, IntegerLinear.like(model.get_submodule(name), resolved["activations"]))
    rebuild_embeddings(model, resolved.get("embeddings", ()), int8_table)
    return model


TECHNIQUE = Technique(
    name="smoothquant",
    family="quantisation",
    version=1,
    Config=Config,
    stage="conversion",
    apply=_apply,
    rebuild=_rebuild,
    foresee=_foresee,
    check=_check,
    simulated=no_kernel,
    models=("timm", "vilt", "meter"),
    source="SmoothQuant, arXiv 2211.10438, section 4",
)
