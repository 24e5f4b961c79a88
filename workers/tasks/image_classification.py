"""Image classification: three splits of labelled images and batches of them, normalised, on a device."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.tasks import TaskError, TaskInfo
from workers.tasks.encoded_images import cache_folder, resize, write_atomic
from workers.tasks.image_sources import Source, cut, open_source, task_info

CHUNK = 4096
"""Images at once while means are taken."""


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    Attributes:
        images: (N, H, W, C) uint8, or float32 in the data's own range; may be memory-mapped.
        labels: (N,) int64.
        mean, std: of the training split, one a channel; in units of 0..1 for uint8 images, of the data for float32.
    """

    images: NDArray[Any]
    labels: NDArray[np.int64]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, batch_size: int, *, shuffle_seed: int | None = None, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields all images once.

        Args:
            batch_size: the last batch may be smaller.
            shuffle_seed: decides the order; None keeps the split's own.

        Yields:
            indices (B,) int64 on the CPU; images (B, C, H, W) float32 normalised and labels (B,) int64 on ``device``.
        """
        count = len(self)
        order = np.arange(count) if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(count)
        scale = 255.0 if self.images.dtype == np.uint8 else 1.0
        mean = torch.tensor(self.mean, device=device).view(1, -1, 1, 1) * scale
        factor = 1 / (torch.tensor(self.std, device=device).view(1, -1, 1, 1) * scale)
        for start in range(0, count, batch_size):
            chosen = order[start : start + batch_size]
            pixels = torch.from_numpy(self.images[chosen]).to(device, non_blocking=True)
            images = pixels.permute(0, 3, 1, 2).float().sub(mean).mul_(factor).contiguous()
            yield torch.from_numpy(chosen), images, torch.from_numpy(self.labels[chosen]).to(device)


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
    source = open_source(data)
    info = task_info(source, data)
    seed = int(data.get("split_seed") or 0)
    fraction = float(data.get("search_fraction", 0.2))
    if not 0 < fraction < 1:
        raise TaskError(f"data.search_fraction must lie between 0 and 1, got {fraction}")
    kept, off = cut(source.labels["train"], fraction, seed)
    chosen = {
        "train": ("train", _limit(kept, data.get("train_limit"), seed)),
        "search": ("train", _limit(off, data.get("search_limit"), seed)),
        "report": ("test", _limit(np.arange(len(source.labels["test"])), data.get("report_limit"), seed)),
    }
    resizes = data.get("image_size") is not None
    arrays = {name: _images(source, part, rows, info, resizes) for name, (part, rows) in chosen.items()}
    mean, std = _moments(arrays["train"])
    mean, std = (_given(data, name, found, info.in_chans) for name, found in (("mean", mean), ("std", std)))
    splits = {name: Split(arrays[name], source.labels[part][rows], mean, std) for name, (part, rows) in chosen.items()}
    return Task(info, splits["train"], splits["search"], splits["report"])


def _limit(rows: NDArray[np.int64], limit: int | None, seed: int) -> NDArray[np.int64]:
    """Returns ``limit`` of the rows at random; a larger limit keeps those of a smaller one."""
    if limit is None or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).permutation(rows)[:limit])


def _given(data: Mapping[str, Any], name: str, found: tuple[float, ...], channels: int) -> tuple[float, ...]:
    values = data.get(name)
    if values is None:
        return found
    if len(values) != channels or (name == "std" and min(values) <= 0):
        raise TaskError(f"data.{name} must have one value for each of {channels} channels (std above 0), got {values}")
    return tuple(float(v) for v in values)


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


def _images(source: Source, part: str, rows: NDArray[np.int64], info: TaskInfo, resizes: bool) -> NDArray[Any]:
    """Returns (N, S, S, C): decoded into memory, or through a memory-mapped file that the trials of a node share."""
    shape = (len(rows), info.image_size, info.image_size, info.in_chans)
    if not source.encoded:
        first = next(source.images(part, rows[:1]))[1]
        out = np.empty(shape, dtype=first.dtype)
        _fill(out, source, part, rows, info, resizes)
        return out
    key = hashlib.sha256(f"{source.digest} {part} {shape} {resizes}".encode() + rows.tobytes()).hexdigest()[:32]
    path = cache_folder() / f"{key}.npy"
    with (cache_folder() / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process decodes, the others wait for its file
        if not path.is_file():
            _check_space(path.parent, int(np.prod(shape)))

            def write(temporary: Path) -> None:
                out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
                _fill(out, source, part, rows, info, resizes)
                out.flush()

            write_atomic(path, write)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _fill(out: NDArray[Any], source: Source, part: str, rows: NDArray[np.int64], info: TaskInfo, resizes: bool) -> None:
    for position, image, name in source.images(part, rows):
        if not resizes and image.shape != out.shape[1:]:
            raise TaskError(
                f"{name}: images must have one size, this is {image.shape[0]}x{image.shape[1]}, the first was "
                f"{out.shape[1]}x{out.shape[2]}; set data.image_size to resize and crop"
            )
        out[position] = resize(image, info.image_size)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TaskError(
            f"{folder}: decoded images need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            f"set VITPARETO_CACHE to a larger folder, or data.train_limit"
        )
