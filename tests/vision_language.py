"""Batches and steps that the tests of both vision-language models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from workers.measuring.counting import FORMULAS

CLASSES = {"vqa": 5, "nlvr2": 2, "entailment": 3, "retrieval": 1}


def settings(task: str, **more: Any) -> dict[str, Any]:
    return {"task": task, **({"num_classes": CLASSES["vqa"]} if task == "vqa" else {}), **more}


def batch(task: str = "vqa", count: int = 3, *, length: int = 6, side: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Random examples; ids from 5 up, below the tiny vocabularies' 256."""
    generator = torch.Generator().manual_seed(seed)
    images = (2,) if task == "nlvr2" else ()
    return {
        "pixel_values": torch.randn(count, *images, 3, side, side, generator=generator),
        "input_ids": torch.randint(5, 256, (count, length), generator=generator),
    }


def macs(model: nn.Module, examples: dict[str, Tensor]) -> int:
    """Multiply-accumulates of one call, as workers.measuring.counting counts them."""
    counter = FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))
    with torch.inference_mode(), counter:
        model.eval()(examples)
    return int(counter.get_total_flops()) // 2


def losses(model: nn.Module, task: str, steps: int = 8) -> list[float]:
    """Cross-entropy (retrieval: binary) on eight examples before each of ``steps`` steps."""
    examples = batch(task, 8)
    targets = torch.arange(8) % CLASSES[task] if task != "retrieval" else torch.arange(8) % 2
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    model.train()
    for _ in range(steps):
        logits = model(examples)
        if task == "retrieval":
            loss = functional.binary_cross_entropy_with_logits(logits[:, 0], targets.float())
        else:
            loss = functional.cross_entropy(logits, targets)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        found.append(loss.item())
    return found
