"""Image classification: three splits of labelled images, in memory or decoded once on each node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks import decoded
from workers.tasks.batches import Split
from workers.tasks.image_sources import ArraySource, open_source, task_info
from workers.tasks.node_cache import locked
from workers.tasks.opening import given
from workers.tasks.pictures import Source, split_rows
from workers.tasks.pixels import resize, with_channels
from workers.tasks.task_info import TaskError, TaskInfo

__all__ = ["Split", "Task", "load"]

CHUNK = 4096
"""Images at once while means are taken."""


@dataclass(frozen=True)
class Task:
    """The data of a study. ``search`` is what the search sees, ``report`` (the test set) what it never sees."""

    info: TaskInfo
    train: Split
    search: Split
    report: Split

    def preprocessing(self) -> dict[str, Any]:
        """Plain values that a user of the artefact needs to prepare images the same way."""
        pixels = "uint8 / 255" if self.train.images.dtype == np.uint8 else "float32 as in the data"
        return {
            "image_size": self.info.image_size,
            "in_chans": self.info.in_chans,
            "resize": "shorter side, bilinear, centre crop",
            "input": pixels,
            "mean": list(self.train.mean),
            "std": list(self.train.std),
        }


def load(data: Mapping[str, Any]) -> Task:
    """Loads the data of a study's data section; see :func:`workers.tasks.load`."""
    fraction = float(data.get("search_fraction", 0.2))
    if not 0 < fraction < 1:
        raise TaskError(f"data.search_fraction must lie between 0 and 1, got {fraction}")
    if data.get("digest") and (known := decoded.recall(decoded.index_key(data, data["digest"]))):
        return _task(data, *known)
    source = open_source(data)
    if not isinstance(source, ArraySource) or source.worth_storing(data.get("image_size")):
        return _task(data, *_decoded(source, data))
    info = task_info(source, data)
    arrays = {name: _in_memory(source, part, rows, info) for name, (part, rows) in split_rows(source, data).items()}
    mean, std = _moments(arrays["train"][0])
    return _normalised(data, info, arrays, mean, std)


Arrays = dict[str, tuple[NDArray[Any], NDArray[np.int64]]]
"""Name of a split to its images (N, S, S, C) and labels (N,)."""


def _decoded(
    source: Source, data: Mapping[str, Any]
) -> tuple[TaskInfo, dict[str, tuple[decoded.Stored, NDArray[np.int64]]]]:
    """Returns the decoded splits; the first process of the node decodes and writes the index, the others find it."""
    key = decoded.index_key(data, source.digest)
    with locked(key):
        if known := decoded.recall(key):
            return known
        info = task_info(source, data)
        fit: decoded.Fit = "exact" if data.get("image_size") is None else "crop"
        splits = {
            name: (decoded.store(source, part, rows, info, fit, source.digest), source.labels[part][rows])
            for name, (part, rows) in split_rows(source, data).items()
        }
        decoded.remember(key, info, {name: (found.key, labels) for name, (found, labels) in splits.items()})
    return info, splits


def _task(
    data: Mapping[str, Any], info: TaskInfo, splits: Mapping[str, tuple[decoded.Stored, NDArray[np.int64]]]
) -> Task:
    mean, std = splits["train"][0].moments.mean_and_std()
    return _normalised(
        data, info, {name: (found.images, labels) for name, (found, labels) in splits.items()}, mean, std
    )


def _normalised(
    data: Mapping[str, Any], info: TaskInfo, arrays: Arrays, mean: tuple[float, ...], std: tuple[float, ...]
) -> Task:
    mean, std = (given(data, name, info.in_chans) or found for name, found in (("mean", mean), ("std", std)))
    train, search, report = (Split(*arrays[name], mean, std) for name in ("train", "search", "report"))
    return Task(info, train, search, report)


def _in_memory(
    source: ArraySource, part: str, rows: NDArray[np.int64], info: TaskInfo
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    found = source.arrays[part]
    shape = (len(rows), info.image_size, info.image_size, info.in_chans)
    if found.shape[1:] == shape[1:]:
        return found[rows], source.labels[part][rows]
    out = np.empty(shape, dtype=found.dtype)
    for position, row in enumerate(rows):
        out[position] = resize(with_channels(found[row], info.in_chans), info.image_size)
    return out, source.labels[part][rows]


def _moments(images: NDArray[Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of each channel; images of one colour get the deviation 1."""
    total = np.zeros(images.shape[-1])
    squares = np.zeros(images.shape[-1])
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        for channel in range(images.shape[-1]):
            # every value once with its count: exact, and ten times as fast as converting all pixels
            values, counts = _counts(chunk[..., channel])
            total[channel] += counts @ (values / scale)
            squares[channel] += counts @ np.square(values / scale)
    pixels = images.shape[0] * images.shape[1] * images.shape[2]
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
    return tuple(mean.tolist()), tuple(np.where(std > 1e-6, std, 1.0).tolist())


def _counts(pixels: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if pixels.dtype == np.uint8:
        return np.arange(256.0), np.bincount(pixels.reshape(-1), minlength=256)
    values, counts = np.unique(pixels, return_counts=True)
    return values.astype(np.float64), counts
