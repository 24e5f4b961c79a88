"""Quantisation-aware training of a model: which layers, their first scales, and what becomes of them afterwards.

:mod:`qat` and :mod:`lsq` differ in where the scales come from: a subclass of :class:`workers.techniques.quantisation.shared_fake_quantise.FakeQuantised`
each, from which :func:`technique` makes the rest.
Costs: two roundings a layer in training. Saves: the file, 32/bits of the linear layers' weights. With 8 bits for weights and
activations integer kernels run afterwards; other widths have none, save no time and are marked as simulated.
The classifier heads have 8 bits or are left alone, as have the word embeddings of a text encoder; the patch embedding, a
convolution, stays in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.techniques.quantisation.shared_affine import linears, require_finite, require_finite_parameters
from workers.techniques.quantisation.shared_fake_quantise import FakeQuantised, Seen, Stored, StoredIntegers
from workers.techniques.quantisation.shared_integer_linear import no_kernel
from workers.techniques.quantisation.shared_packed_embeddings import (
    rebuild_embeddings,
    store_embeddings,
    train_embeddings,
)
from workers.techniques.quantisation.weight_only import int8_table, packed, packed_later
from workers.techniques.record import Applied, Rule, Surroundings, Technique, choice, number

LEVELS_TRAINED = (
    Rule(
        ("importance_prune",),
        "forbidden",
        "both end with the same training: gates would be multiplied into weights whose levels are fixed",
    ),
    Rule(
        ("precision",),
        "forbidden",
        "the training fixes levels for float32, and packs the weights before they could be converted",
    ),
)
"""Of every technique whose levels the recovery training fixes."""


@dataclass(frozen=True)
class Config:
    """Bits of weights and of activations."""

    weight_bits: int = number(8, 2, 8, 1, search=(3, 8, 1), doc="bits a weight")
    activation_bits: int = choice(
        8, (8, 7, 6, 5, 4, 3, 2, 0), search=(8,), doc="bits of a number that comes into a layer; 0: floating point"
    )
    last_layer: str = choice(
        "int8", ("int8", "float", "same"), search=("int8",), doc="the classifier heads: 8 bits, untouched, or as all"
    )
    embeddings: bool = choice(
        True, (True, False), search=(True,), doc="quantise a text encoder's word embeddings as well, 8 bits a row"
    )


@dataclass(frozen=True)
class Layer:
    """A layer to train: its name and bits; ``input_bits`` 0 leaves the activations alone."""

    name: str
    bits: int
    input_bits: int


def chosen_layers(model: nn.Module, bits: int, input_bits: int, last_layer: str) -> list[Layer]:
    """Returns the linear layers with their bits; classifier heads as ``last_layer`` says: int8, float or same."""
    heads = linears(model, skip_head=False).keys() - linears(model, skip_head=True).keys()
    found = []
    for name in linears(model, skip_head=last_layer == "float"):
        if name in heads and last_layer == "int8":
            found.append(Layer(name, 8, 8 if input_bits else 0))
        else:
            found.append(Layer(name, bits, input_bits))
    return found


@torch.no_grad()
def observe(model: nn.Module, names: Sequence[str], surroundings: Surroundings) -> dict[str, Seen]:
    """Returns what comes into each layer on the first batch of training examples.

    Raises:
        NotQuantisable: NaN or infinity comes in; the message names the layer.
    """
    seen = dict.fromkeys(names, Seen())

    def note(name: str, x: Tensor) -> None:
        x = x.float()
        require_finite(x, f"what comes into {name}")
        seen[name] = seen[name].and_then(x)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name in names
    ]
    training = model.training
    try:
        inputs, _ = next(iter(surroundings.batches()))
        model.eval()(inputs)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return seen


def put(model: nn.Module, layers: Sequence[Layer], kind: type[FakeQuantised]) -> None:
    """Replaces linear layers in place by ones in training, whose scales have no values yet."""
    for layer in layers:
        linear: Any = model.get_submodule(layer.name)
        model.set_submodule(layer.name, kind(linear, layer.bits, layer.input_bits))


def convert(
    model: nn.Module, layers: Sequence[Layer], kind: type[FakeQuantised], surroundings: Surroundings
) -> dict[str, Any]:
    """Replaces linear layers in place by ones in training; returns what :func:`rebuild` needs."""
    names = [layer.name for layer in layers]
    seen = observe(model, names, surroundings)
    put(model, layers, kind)
    for name in names:
        layer: Any = model.get_submodule(name)
        layer.start(seen[name])
    return in_training(layers)


def in_training(layers: Sequence[Layer]) -> dict[str, Any]:
    """Returns what :func:`rebuild` needs for layers in training."""
    return {
        "linears": [layer.name for layer in layers],
        "bits": [layer.bits for layer in layers],
        "input_bits": [layer.input_bits for layer in layers],
        "stored": None,
    }


def rebuild(model: nn.Module, resolved: Mapping[str, Any], kind: type[FakeQuantised], *, scale_ndim: int) -> nn.Module:
    """Replaces the same layers of a skeleton by layers without values, in training or stored."""
    layers = [
        Layer(*values) for values in zip(resolved["linears"], resolved["bits"], resolved["input_bits"], strict=True)
    ]
    if resolved["stored"] is None:
        put(model, layers, kind)
        if resolved.get("embeddings"):
            train_embeddings(model)
        return model
    rebuild_embeddings(model, resolved.get("embeddings", ()), int8_table)
    for layer in layers:
        old: Any = model.get_submodule(layer.name)
        shape = (old.in_features, old.out_features)
        bias = old.bias is not None
        made: nn.Module
        if resolved["stored"] == "integers":
            made = StoredIntegers(*shape, bias=bias)
        else:
            made = Stored(*shape, bias, layer.bits, layer.input_bits, scale_ndim)
        model.set_submodule(layer.name, made)
    return model


def store(model: nn.Module) -> dict[str, Any]:
    """Packs the layers in training, in place; returns what changes in what was resolved."""
    require_finite_parameters(model)
    found = {name: part for name, part in model.named_modules() if isinstance(part, FakeQuantised)}
    store_embeddings(model, int8_table)
    integers = all(part.bits == part.input_bits == 8 for part in found.values())
    for name, part in found.items():
        model.set_submodule(name, part.stored_for_kernel() if integers else part.stored())
    return {"stored": "integers" if integers else "packed"}


def simulated(config: Config, device: str) -> bool:
    """Whether nothing multiplies these layers as they are stored: kernels take 8 bits for weights and activations."""
    return (config.weight_bits, config.activation_bits) != (8, 8) or no_kernel(config, device)


def technique(
    name: str,
    config: type[Config],
    kind: type[FakeQuantised],
    *,
    scale_ndim: int,
    source: str,
    parameter_groups: Callable[[nn.Module, Config], list[dict[str, Any]]] | None = None,
) -> Technique:
    """Returns the record of a technique that trains layers of one ``kind``.

    Args:
        scale_ndim: of the stored weights' scale: 0 for one a layer, 2 for one a row.
    """

    def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
        layers = chosen_layers(model, config.weight_bits, config.activation_bits, config.last_layer)
        resolved = convert(model, layers, kind, surroundings)
        tables = train_embeddings(model) if config.embeddings else []
        return Applied(model, resolved | packed(tables), resolved["linears"] + tables)

    def _foresee(model: nn.Module, config: Config, surroundings: Surroundings) -> dict[str, Any]:
        layers = chosen_layers(model, config.weight_bits, config.activation_bits, config.last_layer)
        return in_training(layers) | packed_later(model, config)

    return Technique(
        name=name,
        family="quantisation",
        version=1,
        Config=config,
        stage="surgery",
        apply=_apply,
        rebuild=lambda model, resolved: rebuild(model, resolved, kind, scale_ndim=scale_ndim),
        trains=lambda config: True,
        parameter_groups=parameter_groups,
        finalise=lambda model, config: store(model),
        simulated=simulated,
        foresee=_foresee,
        models=("timm", "vilt", "meter"),
        rules=LEVELS_TRAINED,
        source=source,
    )
