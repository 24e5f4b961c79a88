"""What the weights of both vision-language releases have in common: how a task's fine-tuning starts from others' weights.

A release's module has ``PREFIX``, by which its weights are told from ours, ``from_release_state_dict`` and ``fetch``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TYPES = "token_type_embeddings.weight"
"""How our names of modality embeddings end."""

_IMAGE_TYPE = 1
"""Their row of the first image."""

_MATCHING = "itm_score.fc"
"""Image-text matching, of pretraining: two logits, of which the second is a match's."""


def start_task_(found: dict[str, Tensor], release: Mapping[str, Tensor], model: Any) -> None:
    """Makes weights from before the task's fine-tuning whole, as both papers start it; ``found`` is changed in place.

    The head is the model's own; retrieval's is image-text matching's row of a match, where that is there and fits.
    NLVR2's second image gets the modality embedding of the first.

    Args:
        found: the release's weights under our names; heads that they have go.
    """
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
    if model.task == "retrieval":
        parts = {name: f"{_MATCHING}.{name.removeprefix('head.')}" for name in head}
        match = {name: release[part][1:] for name, part in parts.items() if part in release}
        if {name: tensor.shape for name, tensor in match.items()} == {n: t.shape for n, t in head.items()}:
            head = match
    for name in [name for name in found if name.startswith("head.")]:
        del found[name]
    found |= head
    second_image_(found, model)


def second_image_(found: dict[str, Tensor], model: Any) -> None:
    """Gives the second image of a model of two the modality embedding of the first, where ``found`` is of a model of one."""
    for name, own in model.state_dict().items():
        if name.endswith(TYPES) and name in found and len(own) == len(found[name]) + 1:
            found[name] = torch.cat([found[name], found[name][_IMAGE_TYPE:]])
