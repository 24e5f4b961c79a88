"""Evaluation: logits over a split, and top-1 accuracy with its interval."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from workers.tasks.image_classification import Split

BATCH_SIZE = 256
"""Images a call. Small enough for one chunk of shared work on a CPU with the embedded models."""

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


class NotFiniteOutput(Exception):
    """The model's logits hold NaN or infinity."""


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy over ``total`` images with its 95 % Wilson interval.

    Attributes:
        logits_digest: names the exact output.
        correct_bits: which images were right, in the split's order: eight a byte, first image in the highest bit, as
            hexadecimal digits. With it two models are compared image by image.
    """

    correct: int
    total: int
    top1_pct: float
    wilson_low_pct: float
    wilson_high_pct: float
    logits_digest: str
    correct_bits: str


def predict_logits(
    model: nn.Module,
    split: Split,
    *,
    device: torch.device | str,
    batch_size: int = BATCH_SIZE,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """Returns the logits of every image in the split's order: (N, classes) float32 on the CPU.

    The model runs in eval mode and is put back into the mode it had.

    Args:
        tick: called after every batch, when the device is idle.

    Raises:
        NotFiniteOutput: a logit is NaN or infinite.
    """
    training = model.training
    model.eval()
    found = []
    try:
        with torch.inference_mode():
            for _, images, _ in split.batches(batch_size, device=device):
                found.append(model(images).float().cpu())
                tick()
    finally:
        model.train(training)
    logits = torch.cat(found)
    bad = (~torch.isfinite(logits).all(dim=1)).nonzero().flatten()
    if len(bad):
        raise NotFiniteOutput(
            f"logits must be finite; those of {len(bad)} of {len(logits)} images are not, first of image {int(bad[0])}"
        )
    return logits.clone()  # an ordinary tensor: one made in inference mode cannot take part in a training


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    device: torch.device | str,
    batch_size: int = BATCH_SIZE,
    tick: Callable[[], None] = lambda: None,
) -> Accuracy:
    """Returns the top-1 accuracy of ``model`` over ``split``; see :func:`predict_logits`."""
    logits = predict_logits(model, split, device=device, batch_size=batch_size, tick=tick)
    right = (logits.argmax(dim=1) == torch.from_numpy(split.labels)).numpy()
    correct = int(right.sum())
    low, high = wilson(correct, len(split))
    name = hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]
    return Accuracy(
        correct, len(split), 100 * correct / len(split), 100 * low, 100 * high, name, np.packbits(right).tobytes().hex()
    )


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a proportion (Wilson 1927, JASA 22): both ends from 0 to 1."""
    share, spread = correct / total, Z_95**2 / total
    middle = share + spread / 2
    half = Z_95 * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return max(0.0, low), min(1.0, high)
