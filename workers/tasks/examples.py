"""Batches of vision-language examples: pictures from one array, texts from another, each kept once.

To vision-language data what :mod:`workers.tasks.batches` is to images. Its loader gathers and normalises the pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.inputs import Inputs
from workers.tasks.answers import SoftScores
from workers.tasks.batches import Loader, Split


@dataclass(frozen=True)
class Examples:
    """Examples of one split: which pictures and texts each of them shows.

    Attributes:
        task: a key of ``workers.models.vision_language.TASKS``.
        images: (M, S, S, C) uint8, distinct pictures; may be memory-mapped.
        pictures: (N, K) int64, rows of ``images``; K is 2 for nlvr2, left one first, else 1.
        texts: (Q, L) int64, token ids, padded at the right.
        text_mask: (Q, L) bool, true where a token is no padding.
        text_rows: (N, T) int64, rows of ``texts``. T is 1, but in retrieval's training split the number of texts that an
            image is scored against: its own first, the others of other images.
        labels: (N,) int64. VQA: the answer of most annotators that is in the vocabulary, -1 where none is; retrieval: 0.
        answers: VQA's soft scores, (N, A); None for other tasks.
        picture_of_text: retrieval: (Q,) int64, the row of ``images`` that a text describes; None for other tasks.
        mean, std: of the training pictures, one a channel, in units of 0..1.
    """

    task: str
    images: NDArray[np.uint8]
    pictures: NDArray[np.int64]
    texts: NDArray[np.int64]
    text_mask: NDArray[np.bool_]
    text_rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    answers: SoftScores | None
    picture_of_text: NDArray[np.int64] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def padded(self) -> bool:
        """Whether some text has padding; only then is there an attention mask, which may cost a faster kernel."""
        return not bool(self.text_mask.all())

    def batches(
        self, batch_size: int, *, shuffle_seed: int | None = None, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Inputs, Tensor]]:
        """Yields all examples once.

        Args:
            batch_size: the last batch may be smaller.
            shuffle_seed: decides the order; None keeps the split's own.

        Yields:
            indices (B,) int64 on the CPU; on ``device`` the inputs: ``pixel_values`` (B, 3, S, S), for nlvr2
            (B, 2, 3, S, S), float32 normalised; ``input_ids`` (B, L) int64 and ``attention_mask`` (B, L) bool, with T > 1
            (B, T, L); and targets: labels (B,) int64, for VQA soft scores (B, A) float32.
        """
        return self.loader(batch_size, device=device).epoch(shuffle_seed=shuffle_seed)

    def loader(self, batch_size: int, *, device: torch.device | str = "cpu") -> ExampleLoader:
        """Returns a reader that goes through the split over and over."""
        return ExampleLoader(self, batch_size, device)

    def pairs(
        self, count: int, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Inputs]]:
        """Yields every pair of a picture and a text once, for retrieval's evaluation.

        Args:
            count: about how many pairs a batch has. As many texts as possible share a picture, which a model then embeds once.

        Yields:
            rows of ``images`` (b,); rows of ``texts`` (t,); inputs with ``pixel_values`` (b, 3, S, S), ``input_ids`` and
            ``attention_mask`` (b, t, L): logits (b, t) are the scores of these rows and columns.
        """
        texts, shown = min(len(self.texts), max(1, count)), max(1, count // len(self.texts))
        rows = [np.arange(at, min(at + shown, len(self.images))) for at in range(0, len(self.images), shown)]
        for chosen, pixels in zip(rows, self._image_loader(shown, device).images(rows), strict=True):
            for at in range(0, len(self.texts), texts):
                columns = np.arange(at, min(at + texts, len(self.texts)))
                scored = np.broadcast_to(columns, (len(chosen), len(columns)))
                yield chosen, columns, Inputs({"pixel_values": pixels, **self._tokens(scored, pixels.device)})

    def _image_loader(self, batch_size: int, device: torch.device | str) -> Loader:
        unlabelled = np.zeros(len(self.images), dtype=np.int64)
        return Loader(Split(self.images, unlabelled, self.mean, self.std), batch_size, device=device)

    def _tokens(self, rows: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
        """Returns ids and mask, (*rows.shape, L), of these texts."""
        found = {"input_ids": torch.from_numpy(self.texts[rows]).to(device)}
        if self.padded:
            found["attention_mask"] = torch.from_numpy(self.text_mask[rows]).to(device)
        return found


class ExampleLoader:
    """Reads a split over and over; see :meth:`Examples.batches`."""

    def __init__(self, examples: Examples, batch_size: int, device: torch.device | str = "cpu") -> None:
        self.examples, self.batch_size = examples, batch_size
        self._images = examples._image_loader(batch_size, device)

    def epoch(
        self, *, shuffle_seed: int | None = None, number: int = 0, start: int = 0
    ) -> Iterator[tuple[Tensor, Inputs, Tensor]]:
        """Yields the batches of one pass from batch ``start`` on; they are the same in every pass ``number``."""
        found, device = self.examples, self._images.device
        count = len(found)
        order = np.arange(count) if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(count)
        chosen = [order[at : at + self.batch_size] for at in range(start * self.batch_size, count, self.batch_size)]
        images = self._images.images([found.pictures[indices].reshape(-1) for indices in chosen], number)
        for indices, pixels in zip(chosen, images, strict=True):
            shown, rows = found.pictures.shape[1], found.text_rows[indices]
            pixels = pixels if shown == 1 else pixels.view(len(indices), shown, *pixels.shape[1:])
            tokens = found._tokens(rows[:, 0] if rows.shape[1] == 1 else rows, device)
            inputs = Inputs({"pixel_values": pixels, **tokens})
            targets = found.labels[indices] if found.answers is None else found.answers[indices]
            yield torch.from_numpy(indices), inputs, torch.from_numpy(targets).to(device)

    def close(self) -> None:
        """Ends what the pictures' loader started."""
        self._images.close()
