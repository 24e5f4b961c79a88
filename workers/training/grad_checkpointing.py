"""Less memory for a training: activations are calculated again on the way back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

log = logging.getLogger("vitpareto")


@contextmanager
def grad_checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, each block calculates its activations again on the way back, which saves memory and changes no result.

    timm's switch makes timm go through the blocks itself and passes by a technique that does so in its own way; such
    blocks have a switch ``grad_checkpointing`` of their own, or train without.
    """
    vit: Any = model
    blocks: Any = getattr(vit, "blocks", None)
    if not wanted:
        yield
        return
    if hasattr(blocks, "grad_checkpointing"):
        blocks.grad_checkpointing = True
    elif type(blocks) in (nn.Sequential, nn.ModuleList) and hasattr(vit, "set_grad_checkpointing"):
        vit.set_grad_checkpointing(True)
    else:
        log.warning("grad_checkpointing has no effect on this model: its blocks cannot be calculated again one by one")
    try:
        yield
    finally:
        if hasattr(blocks, "grad_checkpointing"):
            blocks.grad_checkpointing = False
        elif hasattr(vit, "set_grad_checkpointing"):
            vit.set_grad_checkpointing(False)
