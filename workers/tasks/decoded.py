"""The node's store of decoded or resized images: each image is worked on once, whoever asks, and mapped into memory.

An array (N, S, S, C) uint8 lies in ``<key>.npy``, its key being all that decides its pixels: content, rows, size, version of
the decoder. One process decodes, in threads, while the others wait for the lock of the key; a process that is killed
leaves what it decoded, and the next one goes on. A split data set has an index, so that a trial of a known study opens
neither the folder nor the Parquet file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import psutil
from numpy.typing import NDArray

from workers.tasks.node_cache import cache_folder, in_threads, locked, write_atomic
from workers.tasks.pictures import Content, Images, Pictures
from workers.tasks.pixels import decode, resize, squash
from workers.tasks.task_info import TaskError, TaskInfo

DECODER = 2
"""Raised when the same bytes would give other pixels. The version of Pillow counts too."""

_SELECTION = ("image_size", "search_fraction", "split_seed", "train_limit", "search_limit", "report_limit", "channels")
"""Keys of a data section that decide which images its splits hold, and their size."""


Fit = Literal["exact", "crop", "squash"]
"""How an image gets the task's size: it must have it; shorter side resized and the middle cropped; both sides resized."""


@dataclass(frozen=True)
class Moments:
    """Sums over an array's pixels, one a channel, exact: of the values 0 to 255 and of their squares."""

    pixels: int
    total: tuple[int, ...]
    squares: tuple[int, ...]

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns both in units of 0..1; images of one colour get the deviation 1."""
        mean = np.array(self.total) / (255 * self.pixels)
        std = np.sqrt(np.maximum(np.array(self.squares) / (255**2 * self.pixels) - mean**2, 0))
        return tuple(mean.tolist()), tuple(np.where(std > 1e-6, std, 1.0).tolist())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads what was written beside an array."""
        found = json.loads(path.read_text())
        return cls(found["pixels"], tuple(found["total"]), tuple(found["squares"]))


@dataclass(frozen=True)
class Stored:
    """A decoded array: its key, its mapped images and their moments."""

    key: str
    images: NDArray[np.uint8]
    moments: Moments


def _key(*parts: object) -> str:
    text = json.dumps([DECODER, version("pillow"), *parts])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# --- index of a split data set ----------------------------------------------------------------------------------------


def index_key(data: Mapping[str, Any], digest: str) -> str:
    """Returns the key under which the splits of a data section are remembered."""
    chosen = [data.get(name) for name in _SELECTION]
    return _key("splits", data["kind"], digest, *chosen[: None if chosen[-1] else -1])


def remember(key: str, info: TaskInfo, splits: Mapping[str, tuple[str, NDArray[np.int64]]]) -> None:
    """Writes the index: name of a split to (key of its array, labels)."""
    folder = cache_folder()
    labels = {name: found for name, (_, found) in splits.items()}

    def write_labels(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **labels)  # type: ignore[arg-type]

    write_atomic(folder / f"{key}.labels.npz", write_labels)
    index = {"info": asdict(info), "arrays": {name: array for name, (array, _) in splits.items()}}
    write_atomic(folder / f"{key}.index.json", lambda temporary: temporary.write_text(json.dumps(index)))


def recall(key: str) -> tuple[TaskInfo, dict[str, tuple[Stored, NDArray[np.int64]]]] | None:
    """Returns what :func:`remember` wrote, or None where a part of it is gone."""
    folder = cache_folder()
    try:
        index = json.loads((folder / f"{key}.index.json").read_text())
        with np.load(folder / f"{key}.labels.npz") as labels:
            found = {name: (stored(array), labels[name]) for name, array in index["arrays"].items()}
    except FileNotFoundError:
        return None
    info = index["info"]
    return TaskInfo(**{**info, "class_names": tuple(info["class_names"])}), found


def stored(key: str) -> Stored:
    """Returns what :func:`store` decoded before.

    Raises:
        FileNotFoundError: it is gone.
    """
    folder = cache_folder()
    moments = Moments.read(folder / f"{key}.moments.json")
    return Stored(key, np.load(folder / f"{key}.npy", mmap_mode="r"), moments)


# --- arrays -----------------------------------------------------------------------------------------------------------


def store(source: Pictures, part: str, rows: NDArray[np.int64], info: TaskInfo, fit: Fit, digest: str) -> Stored:
    """Returns the decoded images of ``rows``, decoding those that no process of this node decoded before.

    Args:
        digest: names content of the source and how its pixels are read.
        fit: how images of another size are brought to the task's; with "exact" they are a fault.

    Raises:
        TaskError: an image cannot be decoded or has another size, or the disk is too small.
    """
    shape = (len(rows), info.image_size, info.image_size, info.in_chans)
    key = _key(digest, part, shape, fit, hashlib.sha256(rows.tobytes()).hexdigest())
    folder = cache_folder()
    with locked(key):
        if not (folder / f"{key}.npy").is_file():
            _decode(folder, key, source, part, rows, shape, fit)
    return stored(key)


def _decode(
    folder: Path,
    key: str,
    source: Pictures,
    part: str,
    rows: NDArray[np.int64],
    shape: tuple[int, ...],
    fit: Fit,
) -> None:
    """Decodes into ``<key>.npy``; what is done is marked row by row, for the next process if this one is killed.

    Marks of an earlier boot are not trusted: the kernel wrote pixels and marks to the disk in any order.
    """
    stem = f"{key}.{psutil.boot_time():.0f}"
    partial, sums_file = folder / f"{stem}.partial", folder / f"{stem}.sums"
    for old in folder.glob(f"{key}.*"):
        if old.suffix in (".partial", ".sums") and old not in (partial, sums_file):
            old.unlink()
    channels = shape[-1]
    out = _open_array(partial, shape, np.uint8)
    sums = _open_array(sums_file, (len(rows), 2 * channels + 1), np.int64)  # totals, squares, 1 where decoded
    _fill(out, sums, source, part, rows, fit)
    total = np.asarray(sums.sum(axis=0))
    moments = Moments(
        shape[0] * shape[1] * shape[2], tuple(total[:channels].tolist()), tuple(total[channels:-1].tolist())
    )
    write_atomic(folder / f"{key}.moments.json", lambda temporary: temporary.write_text(json.dumps(asdict(moments))))
    out.flush()
    os.replace(partial, folder / f"{key}.npy")
    sums_file.unlink()


def _open_array(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap[Any, Any]:
    """Opens a mapped array, of zeros where there is none of that shape yet; its space on the disk is reserved."""
    try:
        found: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="r+")
        if found.shape == shape and found.dtype == dtype:
            return found
    except (OSError, ValueError):
        pass
    made: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    try:
        if hasattr(os, "posix_fallocate"):  # else a full disk ends the process with a signal in the middle of a write
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink()
        raise TaskError(
            f"{path.parent}: decoded images need {made.nbytes / 1e9:.1f} GB: {error.strerror or error}; "
            f"set VITPARETO_CACHE to a larger folder, or data.train_limit"
        ) from error
    return made


def _fill(
    out: NDArray[np.uint8],
    sums: NDArray[np.int64],
    source: Pictures,
    part: str,
    rows: NDArray[np.int64],
    fit: Fit,
) -> None:
    """Decodes what is not marked yet, a bounded number of images at a time; Pillow works outside Python's lock."""
    channels = out.shape[-1]

    def one(position: int, content: Content, name: str) -> None:
        image = _fitted(decode(content, name, channels), out.shape[1:], name, fit)
        out[position] = image
        wide = image.reshape(-1, channels).astype(np.int64)
        sums[position, :-1] = np.concatenate([wide.sum(axis=0), np.square(wide).sum(axis=0)])
        sums[position, -1] = 1

    missing = np.flatnonzero(sums[:, -1] != 1)
    found = source.contents(part, rows[missing])
    for _ in in_threads(one, ((int(missing[position]), content, name) for position, content, name in found)):
        pass


def _fitted(image: Images, shape: tuple[int, ...], name: str, fit: Fit) -> Images:
    if fit == "exact" and image.shape != shape:
        raise TaskError(
            f"{name}: images must have one size, this is {image.shape[0]}x{image.shape[1]}, the first was "
            f"{shape[0]}x{shape[1]}; set data.image_size to resize and crop"
        )
    return squash(image, shape[0]) if fit == "squash" else resize(image, shape[0])
