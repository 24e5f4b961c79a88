"""Evaluation: logits over a split, and the accuracies of its task with their intervals."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.tasks.answers import SCORES, image_ranks, text_ranks, vqa_levels
from workers.tasks.batches import LabelledData

BATCH_SIZE = 256
"""Examples a call. Small enough for one chunk of shared work on a CPU with the embedded models."""

if TYPE_CHECKING:
    from workers.tasks.examples import Examples

RECALLS = (1, 5, 10)
"""Ranks of retrieval; the first is an objective."""

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


class NotFiniteOutput(Exception):
    """The model's logits hold NaN or infinity."""


@dataclass(frozen=True)
class Accuracy:
    """One accuracy over ``total`` questions with its 95 % interval.

    Attributes:
        metric: its name, one of :data:`workers.protocol.ACCURACIES`.
        correct: how many were right; shares of them for VQA, whose answers may be right in part.
        low_pct, high_pct: Wilson's; for VQA of the normal distribution, about the mean of shares.
        correct_bits: which were right, in the split's order: eight a byte, the first in the highest bit, as hexadecimal
            digits. With it two models are compared question by question. Empty for VQA.
        levels: for VQA one hexadecimal digit a question: 0, 1, 2, 3, 4 for 0, 30, 60, 90, 100 per cent. Else empty.
    """

    metric: str
    correct: float
    total: int
    pct: float
    low_pct: float
    high_pct: float
    correct_bits: str = ""
    levels: str = ""


@dataclass(frozen=True)
class Evaluation:
    """How a model does on a split.

    Attributes:
        accuracies: the objectives of the task.
        logits_digest: names the exact output.
        more: further metrics: recalls at higher ranks.
    """

    accuracies: tuple[Accuracy, ...]
    logits_digest: str
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def correct(self) -> float:
        """Questions that were right, of all accuracies together: what a training that stops early looks at."""
        return sum(found.correct for found in self.accuracies)


def predict_logits(
    model: nn.Module,
    split: LabelledData,
    *,
    device: torch.device | str,
    batch_size: int = BATCH_SIZE,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """Returns the logits of every example in the split's order: (N, classes) float32 on the CPU.

    The model runs in eval mode and is put back into the mode it had.

    Args:
        tick: called after every batch, when the device is idle.

    Raises:
        NotFiniteOutput: a logit is NaN or infinite.
    """
    found = []

    def run() -> None:
        for _, inputs, _ in split.batches(batch_size, device=device):
            found.append(model(inputs).float().cpu())
            tick()

    _in_eval_mode(model, run)
    logits = torch.cat(found)
    _require_finite(logits, "images" if split.task == "image_classification" else "examples")
    return logits.clone()  # an ordinary tensor: one made in inference mode cannot take part in a training


def evaluate(
    model: nn.Module,
    split: LabelledData,
    *,
    device: torch.device | str,
    batch_size: int = BATCH_SIZE,
    tick: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Returns the accuracies of ``model`` over ``split``; see :func:`predict_logits`."""
    if split.task == "retrieval":
        return _retrieval(model, cast("Examples", split), device, batch_size, tick)
    logits = predict_logits(model, split, device=device, batch_size=batch_size, tick=tick)
    if split.task == "vqa":
        return Evaluation((_vqa(logits, cast("Examples", split)),), _digest(logits))
    right = (logits.argmax(dim=1) == torch.from_numpy(split.labels)).numpy()
    return Evaluation((_share("top1_pct", right),), _digest(logits))


def _share(metric: str, right: NDArray[np.bool_]) -> Accuracy:
    """Makes an accuracy of questions that are right or wrong: (N,)."""
    correct = int(right.sum())
    low, high = wilson(correct, len(right))
    bits = np.packbits(right).tobytes().hex()
    return Accuracy(metric, correct, len(right), 100 * correct / len(right), 100 * low, 100 * high, correct_bits=bits)


def _vqa(logits: Tensor, split: Examples) -> Accuracy:
    """Makes the VQA accuracy of logits (N, A): the mean score of the answers that have the highest ones."""
    assert split.answers is not None
    levels = vqa_levels(logits.numpy(), split.answers)
    scores = SCORES[levels].astype(np.float64)
    mean = float(scores.mean())
    half = Z_95 * float(scores.std(ddof=1 if len(scores) > 1 else 0)) / math.sqrt(len(scores))
    low, high = max(0.0, mean - half), min(1.0, mean + half)
    digits = "".join(map(str, levels.tolist()))
    return Accuracy("vqa_pct", float(scores.sum()), len(scores), 100 * mean, 100 * low, 100 * high, levels=digits)


def _retrieval(
    model: nn.Module, split: Examples, device: torch.device | str, batch_size: int, tick: Callable[[], None]
) -> Evaluation:
    """Scores every text of the split with every image of it."""
    assert split.picture_of_text is not None
    of_text = split.picture_of_text
    scores = torch.full((len(split.images), len(split.texts)), float("nan"))

    def run() -> None:
        for images, texts, inputs in split.pairs(batch_size, device):
            rows, columns = torch.from_numpy(images), torch.from_numpy(texts)
            scores[rows[:, None], columns] = model(inputs).float().cpu()
            tick()

    _in_eval_mode(model, run)
    _require_finite(scores, "images")
    ranks = {"text_recall": text_ranks(scores.numpy(), of_text), "image_recall": image_ranks(scores.numpy(), of_text)}
    accuracies = tuple(_share(f"{name}{RECALLS[0]}_pct", found < RECALLS[0]) for name, found in ranks.items())
    more = {f"{name}{k}_pct": 100 * float((found < k).mean()) for name, found in ranks.items() for k in RECALLS[1:]}
    return Evaluation(accuracies, _digest(scores), more)


def _in_eval_mode(model: nn.Module, run: Callable[[], None]) -> None:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            run()
    finally:
        model.train(training)


def _require_finite(logits: Tensor, what: str) -> None:
    bad = (~torch.isfinite(logits).all(dim=1)).nonzero().flatten()
    if len(bad):
        raise NotFiniteOutput(
            f"logits must be finite; those of {len(bad)} of {len(logits)} {what} are not, first of {what[:-1]} {int(bad[0])}"
        )


def _digest(logits: Tensor) -> str:
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a proportion (Wilson 1927, JASA 22): both ends from 0 to 1."""
    share, spread = correct / total, Z_95**2 / total
    middle = share + spread / 2
    half = Z_95 * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return max(0.0, low), min(1.0, high)
