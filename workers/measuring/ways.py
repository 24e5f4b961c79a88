"""The ways to run an uncompressed model: what a user could do before compressing anything.

A speed-up is worth its name only against the best of them (docs/decisions/0014-strong-baseline.md): half precision, fused attention, and
``torch.compile`` where the study allows it.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn

from workers.techniques.quantisation import precision

COMPILE = "+compile"


def way_names(*, compiled: bool) -> list[str]:
    """Returns the names of the ways: ``fp32``, ``bf16``, ``fp16``, each also ``+compile`` where ``compiled``."""
    plain = ["fp32", *precision.DTYPES]
    return plain + [name + COMPILE for name in plain] if compiled else plain


def as_way(model: nn.Module, name: str) -> nn.Module:
    """Returns ``model`` as the way ``name`` runs it: eval mode, fused attention, float32 images in and logits out.

    ``model`` keeps its dtype: half precision is a copy, made as the technique ``precision`` makes it.

    Raises:
        ValueError: for an unknown way.
    """
    dtype = name.removesuffix(COMPILE)
    if dtype not in ("fp32", *precision.DTYPES):
        raise ValueError(f"way: must be one of {', '.join(way_names(compiled=True))}, got {name!r}")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", True)  # noqa: B010 - nn.Module declares no such attribute
    run = model if dtype == "fp32" else precision.TECHNIQUE.rebuild(copy.deepcopy(model), {"dtype": dtype})
    return compile_model(run.eval()) if name.endswith(COMPILE) else run.eval()


def compile_model(model: nn.Module) -> nn.Module:
    """Returns ``model`` compiled for one shape at a time; compiling happens at the first call of a shape.

    What this process compiled before is compiled again at its next call: PyTorch compiles the code of one ``forward`` for eight
    models or shapes, and from then on runs it as it is and says nothing, which a worker of many trials would meet.
    """
    torch.compiler.reset()
    return cast(nn.Module, torch.compile(model, dynamic=False))
