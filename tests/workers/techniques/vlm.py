"""Small vision-language models and batches that the tests of techniques share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tests.vision_language import CLASSES, batch, settings
from workers.techniques.record import Surroundings

FAMILIES = ("vilt", "meter")


def describe(family: str, task: str = "entailment", **more: Any) -> dict[str, Any]:
    """A complete description: 4 joint layers, 16 patches, texts of 20 tokens at most."""
    found: dict[str, Any] = import_module(f"workers.models.{family}").describe(
        {"name": f"{family}_tiny", "create": settings(task, **{"init_std": 0.02, **more})}
    )
    return found


def vlm(family: str, task: str = "entailment", *, seed: int = 0, **more: Any) -> Any:
    """A model in eval mode whose weights are large enough that every token matters."""
    torch.manual_seed(seed)
    model = import_module(f"workers.models.{family}").create(describe(family, task, **more))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def padded(task: str = "entailment", count: int = 3, length: int = 8) -> dict[str, Tensor]:
    """Texts of ``length``, ``length - 1``, ... tokens, padded."""
    examples = batch(task, count, length=length)
    lengths = length - torch.arange(count)
    return {**examples, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def surroundings(model: nn.Module, task: str = "entailment", seed: int = 0) -> Surroundings:
    """Two batches of noise, and a copy of the model as the teacher."""
    teacher = copy.deepcopy(model)

    def batches() -> Iterator[tuple[Any, Tensor]]:
        for i in range(2):
            yield batch(task, 8, seed=10 + i), torch.arange(8) % CLASSES[task]

    return Surroundings(torch.device("cpu"), seed, torch.Generator().manual_seed(seed), batches, lambda: teacher)


def apply(technique: Any, model: Any, **config: Any) -> Any:
    """Applies a technique whose check has nothing against it; returns what ``apply`` did, the model in eval mode."""
    from workers.models import model_info

    made = technique.Config(**config)
    reason = technique.check(model_info(model), made)
    assert reason is None, reason
    applied = technique.apply(model, made, surroundings(model, model.task))
    applied.model.eval()
    return applied
