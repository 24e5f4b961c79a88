"""Evaluation: logits over a split, and the accuracies of its task with their intervals."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.inputs import Inputs
from workers.tasks.answers import SCORES, image_ranks, text_ranks, vqa_levels
from workers.tasks.batches import LabelledData

BATCH_SIZE = 256
"""Examples a call. Small enough for one chunk of shared work on a CPU with the embedded models."""

if TYPE_CHECKING:
    from workers.tasks.examples import Examples

TEXT_BYTES = 1 << 30
"""About as much the features of a retrieval split's texts may take on the device; Flickr30k's 5,070 take 0.5 GB in METER."""

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
        metric: its name, one of :data:`workers.metrics.ACCURACIES`.
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
    """Returns the logits of every example in the split's order: (N, classes) float32 on the CPU, held once.

    The model runs in eval mode and is put back into the mode it had. The tensor is an ordinary one, which can take part in
    a training, unlike those made in inference mode.

    Args:
        tick: called after every batch, when the device is idle.

    Raises:
        NotFiniteOutput: a logit is NaN or infinite.
    """
    whole: list[NDArray[np.float32]] = []

    def keep(first: int, logits: NDArray[np.float32]) -> None:
        if not whole:
            whole.append(np.empty((len(split), logits.shape[1]), dtype=np.float32))
        whole[0][first : first + len(logits)] = logits

    _visit(model, split, keep, device, batch_size, tick)
    return torch.from_numpy(whole[0])


def _visit(
    model: nn.Module,
    split: LabelledData,
    take: Callable[[int, NDArray[np.float32]], None],
    device: torch.device | str,
    batch_size: int,
    tick: Callable[[], None],
) -> None:
    """Gives ``take`` the logits (b, classes) of each batch in the split's order, with the row of their first example.

    Raises:
        NotFiniteOutput: a logit is NaN or infinite; after the last batch, so that all of them are counted.
    """
    bad: list[int] = []

    def run() -> None:
        first = 0
        for _, inputs, _ in split.batches(batch_size, device=device):
            logits = model(inputs).float().cpu().contiguous().numpy()
            bad.extend((first + _not_finite(logits)).tolist())
            take(first, logits)
            first += len(logits)
            tick()

    _in_eval_mode(model, run)
    _require_none(bad, len(split), "images" if split.task == "image_classification" else "examples")


def evaluate(
    model: nn.Module,
    split: LabelledData,
    *,
    device: torch.device | str,
    batch_size: int = BATCH_SIZE,
    tick: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Returns the accuracies of ``model`` over ``split``; see :func:`predict_logits`. Logits are held for a batch only."""
    if split.task == "retrieval":
        return _retrieval(model, cast("Examples", split), device, batch_size, tick)
    scores = cast("Examples", split).answers if split.task == "vqa" else None
    judged = np.empty(len(split), dtype=np.int64)  # whether an answer is right; for VQA how many gave it
    seen = hashlib.sha256()

    def judge(first: int, logits: NDArray[np.float32]) -> None:
        seen.update(logits.data)
        rows = slice(first, first + len(logits))
        judged[rows] = (
            logits.argmax(axis=1) == split.labels[rows] if scores is None else vqa_levels(logits, scores, first)
        )

    _visit(model, split, judge, device, batch_size, tick)
    accuracy = _share("top1_pct", judged.astype(bool)) if scores is None else _vqa(judged)
    return Evaluation((accuracy,), _short(seen))


def _share(metric: str, right: NDArray[np.bool_]) -> Accuracy:
    """Makes an accuracy of questions that are right or wrong: (N,)."""
    correct = int(right.sum())
    low, high = wilson(correct, len(right))
    bits = np.packbits(right).tobytes().hex()
    return Accuracy(metric, correct, len(right), 100 * correct / len(right), 100 * low, 100 * high, correct_bits=bits)


def _vqa(levels: NDArray[np.int64]) -> Accuracy:
    """Makes the VQA accuracy: the mean score of answers that so many annotators gave, (N,), capped at 4."""
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
    known = _KnownTexts(model)

    def run() -> None:
        for images, texts, inputs in split.pairs(batch_size, device):
            rows, columns = torch.from_numpy(images), torch.from_numpy(texts)
            scores[rows[:, None], columns] = model(known.added(int(texts[0]), inputs)).float().cpu()
            tick()

    _in_eval_mode(model, run)
    found = scores.numpy()
    _require_none(_not_finite(found).tolist(), len(found), "images")
    ranks = {"text_recall": text_ranks(found, of_text), "image_recall": image_ranks(found, of_text)}
    accuracies = tuple(_share(f"{name}{RECALLS[0]}_pct", rank < RECALLS[0]) for name, rank in ranks.items())
    more = {f"{name}{k}_pct": 100 * float((rank < k).mean()) for name, rank in ranks.items() for k in RECALLS[1:]}
    return Evaluation(accuracies, _short(hashlib.sha256(found.data)), more)


class _KnownTexts:
    """Features of texts that a model encodes without looking at an image, kept over one pass up to :data:`TEXT_BYTES`.

    Only for batches of one image: the same texts together give the same features to the last bit.
    """

    def __init__(self, model: nn.Module) -> None:
        self._encode: Any = getattr(model, "encode_text", None)
        self._kept: dict[int, Tensor] = {}
        self._bytes = 0

    def added(self, first: int, inputs: Inputs) -> Inputs:
        """Returns the inputs with the features of their texts, of which ``first`` is the row of the first, where there is room."""
        if self._encode is None or len(inputs) > 1:
            return inputs
        if first not in self._kept:
            if self._bytes >= TEXT_BYTES:
                return inputs
            self._kept[first] = self._encode(inputs)[0][None]
            self._bytes += self._kept[first].nbytes
        return inputs.replace(text_features=self._kept[first])


def _in_eval_mode(model: nn.Module, run: Callable[[], None]) -> None:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            run()
    finally:
        model.train(training)


def _not_finite(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Returns the rows of logits (N, classes) that hold NaN or infinity."""
    return np.flatnonzero(~np.isfinite(logits).all(axis=1))


def _require_none(bad: Sequence[int], total: int, what: str) -> None:
    if bad:
        raise NotFiniteOutput(
            f"logits must be finite; those of {len(bad)} of {total} {what} are not, first of {what[:-1]} {bad[0]}"
        )


def _short(seen: hashlib._Hash) -> str:
    return seen.hexdigest()[:16]


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a proportion (Wilson 1927, JASA 22): both ends from 0 to 1."""
    share, spread = correct / total, Z_95**2 / total
    middle = share + spread / 2
    half = Z_95 * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return max(0.0, low), min(1.0, high)
