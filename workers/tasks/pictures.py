"""What every source of images is: parts, labels, content to decode; and how a part is cut off another.

A source knows the labels of its ``train`` and ``test`` parts at once and decodes images when asked, so that limited
splits read only what they use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

REPORT_FRACTION = 0.2
"""Share of the images that becomes the test part where the data names none; always cut with seed 0."""

CUT = f"nothing tells a test part: {REPORT_FRACTION:.0%} of each class are the report split"
"""Said of labelled images where that is so."""

Labels = NDArray[np.int64]
Images = NDArray[Any]
Content = bytes | Path | Images


class Pictures(Protocol):
    """Images to decode, in parts."""

    @property
    def digest(self) -> str:
        """Names the content."""
        ...

    def contents(self, part: str, wanted: NDArray[np.int64]) -> Iterator[tuple[int, Content, str]]:
        """Yields (position in ``wanted``, image, name for messages) in any order.

        An image is (H, W, C) uint8 or float32, or the bytes or the path of a file to decode.
        """
        ...


class Source(Pictures, Protocol):
    """Labelled images in two parts.

    Attributes:
        labels: part (``train``, ``test``) to (N,) int64.
    """

    labels: dict[str, Labels]
    class_names: tuple[str, ...]

    @property
    def channels(self) -> int:
        """That images have unless the study says another number: 1 or 3."""
        ...


def cut(labels: Labels, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cuts ``fraction`` off every class at random. Returns (indices kept, indices cut), both ascending.

    A class keeps at least one image, so every class of two images or more can be trained and tested.
    """
    generator = np.random.default_rng(seed)
    held = [np.zeros(0, dtype=np.int64)]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held.append(members[: min(max(round(fraction * len(members)), int(fraction > 0)), len(members) - 1)])
    off = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), off, assume_unique=True), off


def split_rows(source: Source, data: Mapping[str, Any]) -> dict[str, tuple[str, NDArray[np.int64]]]:
    """Cuts the splits of a data section: name to (part of the source, rows of that part), training first."""
    seed = int(data.get("split_seed") or 0)
    kept, off = cut(source.labels["train"], float(data.get("search_fraction", 0.2)), seed)
    return {
        "train": ("train", _limited(kept, data.get("train_limit"), seed)),
        "search": ("train", _limited(off, data.get("search_limit"), seed)),
        "report": ("test", _limited(np.arange(len(source.labels["test"])), data.get("report_limit"), seed)),
    }


def _limited(rows: NDArray[np.int64], limit: int | None, seed: int) -> NDArray[np.int64]:
    """Returns ``limit`` of the rows at random; a larger limit keeps those of a smaller one."""
    if limit is None or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).permutation(rows)[:limit])
