"""Half precision: every parameter is stored and calculated in bfloat16 or float16.

Source: Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, section 3 (16-bit storage and arithmetic);
bfloat16: Kalamkar et al., arXiv 1905.12322.
Differs from the paper: conversion after training, no master weights, no loss scaling. Buffers keep their type: scales
of packed weights and constants.

Costs: rounding of weights and activations (8 significant bits in bf16, 11 in fp16; fp16 overflows above 65504).
Saves: half the file; on devices with 16-bit matrix units half the memory traffic and more. On a CPU without such units
bf16 can be slower than float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.inputs import Inputs
from workers.techniques.record import Applied, ModelInfo, Surroundings, Technique, choice

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Config:
    """Which 16-bit type."""

    dtype: str = choice("bf16", tuple(DTYPES), doc="number format of weights and activations")


def _check(info: ModelInfo, config: Config) -> str | None:
    """Returns why the device cannot calculate in this type, or None."""
    if info.device == "cpu":
        return _cpu_lacks(config.dtype)
    if config.dtype == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        return "this CUDA device has no bfloat16 arithmetic; use fp16"
    return None


@cache
def _cpu_lacks(dtype: str) -> str | None:
    """Runs every kind of kernel that the models need once, on a few numbers; returns what fails, or None."""
    x = torch.ones(1, 1, 4, 4, dtype=DTYPES[dtype])
    try:
        y = F.conv2d(x, x).flatten(2)
        y = F.gelu(F.layer_norm(F.linear(F.scaled_dot_product_attention(x, x, x)[0], x[0, 0]), (4,)) + y)
        y = (y + F.embedding(torch.zeros(1, dtype=torch.long), x[0, 0])).tanh() * y.sigmoid()
        finite = bool(y.softmax(-1).isfinite().all())
    except RuntimeError as error:
        return f"this PyTorch has no {dtype} CPU kernel: {str(error).splitlines()[0]}"
    return None if finite else f"this PyTorch's {dtype} CPU kernels give values that are not finite"


def _apply(model: nn.Module, config: Config, surroundings: Surroundings) -> Applied:
    """Converts the parameters in place; inputs and logits stay float32 outside the model."""
    changed = [name for name, p in model.named_parameters() if p.is_floating_point()]
    return Applied(_convert(model, config.dtype), {"dtype": config.dtype}, changed)


def _rebuild(model: nn.Module, resolved: Mapping[str, Any]) -> nn.Module:
    """Converts a skeleton the same way."""
    return _convert(model, resolved["dtype"])


def _convert(model: nn.Module, dtype: str) -> nn.Module:
    target = DTYPES[dtype]
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(target)
    model.register_forward_pre_hook(partial(_inputs_to, target))
    model.register_forward_hook(_logits_to_float)
    return model


def _inputs_to(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_converted(a, dtype) for a in args)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """Converts what is floating-point: of a batch of several tensors the pixels, not the tokens."""
    if isinstance(value, Inputs):
        return value.to(dtype)
    if isinstance(value, Mapping):
        return {name: _converted(part, dtype) for name, part in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _logits_to_float(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):  # both heads of a distilled model that is in distilled training
        return tuple(o.float() for o in output)
    return output.float()


TECHNIQUE = Technique(
    name="precision",
    family="precision",
    version=1,
    Config=Config,
    stage="conversion",
    apply=_apply,
    rebuild=_rebuild,
    check=_check,
    models=("timm", "vilt", "meter"),
    source="Micikevicius et al. 2018, arXiv 1710.03740, section 3",
)
