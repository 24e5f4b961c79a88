"""Where labelled images come from: arrays that ship with a library; encoded images have their own file.

A source knows the labels of its ``train`` and ``test`` parts at once and decodes images when asked, so that limited
splits read only what they use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from workers.tasks import IMAGE_KINDS, TaskError, TaskInfo

REPORT_FRACTION = 0.2
"""Share of the images that becomes the test part where the data names none; always cut with seed 0."""

Labels = NDArray[np.int64]
Images = NDArray[Any]
Content = bytes | Path | Images


class Pictures(Protocol):
    """Images to decode, in parts.

    Attributes:
        digest: names the content.
        channels: of every image.
    """

    digest: str

    @property
    def channels(self) -> int: ...

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


def open_source(data: Mapping[str, Any]) -> Source:
    """Opens the source of a data section.

    Raises:
        TaskError: it is missing or broken, or its content has another digest than ``data["digest"]``.
    """
    kind, path = data["kind"], data.get("path")
    if kind not in IMAGE_KINDS:
        raise TaskError(f"data.kind must be one of {', '.join(IMAGE_KINDS)}, got {kind!r}")
    from workers.tasks.encoded_images import FolderSource, ParquetSource

    source: Source
    if kind == "digits":
        source = digits()
    elif path is None:
        raise TaskError(f"data.path must say where the {kind} data lies")
    elif kind == "imagefolder":
        source = FolderSource(Path(path))
    elif kind == "parquet":
        source = ParquetSource(Path(path))
    else:
        source = cifar(kind, str(path))
    _check_labels(source, path or kind)
    expected = data.get("digest")
    if expected and expected != source.digest:
        raise TaskError(
            f"{path or kind}: content must be the study's (digest {expected}), this node's has digest {source.digest}; "
            "copy the same data to every node, or start a new study for the new data"
        )
    return source


def task_info(source: Source, data: Mapping[str, Any]) -> TaskInfo:
    """Returns number of classes, channels and side length, from the source's first training image."""
    from workers.tasks.encoded_images import decode

    _, content, name = next(source.contents("train", np.zeros(1, dtype=np.int64)))
    image = decode(content, name, None)
    height, width, channels = image.shape
    size = data.get("image_size")
    if size is None and height != width:
        raise TaskError(
            f"{data.get('path')}: images must be square, the first one is {height}x{width}; "
            "set data.image_size to resize and crop"
        )
    return TaskInfo(len(source.class_names), channels, int(size or height), source.class_names)


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


def _check_labels(source: Source, name: object) -> None:
    """Raises TaskError unless labels are 0..C-1, each present in training."""
    classes = len(source.class_names)
    for part, labels in source.labels.items():
        if not len(labels):
            raise TaskError(f"{name}: the {part} part must hold images, it is empty")
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            raise TaskError(
                f"{name}: {part} image {wrong[0]} has label {labels[wrong[0]]}; labels must be 0 to {classes - 1}, "
                "as in training; renumber or remove such rows"
            )
    missing = np.setdiff1d(np.arange(classes), source.labels["train"])
    if len(missing):
        raise TaskError(
            f"{name}: every label from 0 to {classes - 1} must have training images, {missing[0]} has none; "
            "number the classes without gaps"
        )


# --- arrays that ship with a library ----------------------------------------------------------------------------------


class ArraySource:
    """Images already in memory: uint8 or float32 (N, H, W, C) for each part."""

    def __init__(
        self, arrays: Mapping[str, Images], labels: Mapping[str, Labels], class_names: Sequence[str], digest: str
    ) -> None:
        self.digest = digest
        self.arrays = dict(arrays)
        self.labels = dict(labels)
        self.class_names = tuple(class_names)

    def worth_storing(self, image_size: int | None) -> bool:
        """Whether the images are brought to another size and then better kept by the node than made by every trial."""
        images = self.arrays["train"]
        return images.dtype == np.uint8 and image_size not in (None, *images.shape[1:3])

    @property
    def channels(self) -> int:
        return int(self.arrays["train"].shape[-1])

    def contents(self, part: str, wanted: NDArray[np.int64]) -> Iterator[tuple[int, Content, str]]:
        for position, index in enumerate(wanted):
            yield position, self.arrays[part][index], f"{part} image {index}"


@cache
def digits() -> ArraySource:
    """scikit-learn's handwritten digits: 1,797 images of 8x8, float32 from 0 to 16 (UCI Optical Recognition, 1998)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.ascontiguousarray(found.images, dtype=np.float32)[..., None]
    labels = found.target.astype(np.int64)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
    train, test = cut(labels, REPORT_FRACTION, seed=0)
    return ArraySource(
        {"train": images[train], "test": images[test]},
        {"train": labels[train], "test": labels[test]},
        [str(n) for n in found.target_names],
        digest,
    )


def cifar(kind: str, root: str) -> ArraySource:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009) through torchvision, downloaded to ``root`` if it is not there."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise TaskError(f"data.kind {kind} needs the torchvision that matches torch: {error}") from error
    factory = datasets.CIFAR10 if kind == "cifar10" else datasets.CIFAR100
    parts = {}
    for part in ("train", "test"):
        try:
            parts[part] = factory(root, train=part == "train", download=False)
        except RuntimeError:
            try:
                parts[part] = factory(root, train=part == "train", download=True)
            except (OSError, RuntimeError) as error:
                raise TaskError(
                    f"{root}: {kind} must lie there or be downloadable: {error}; "
                    f"unpack {factory.filename} into this folder"
                ) from error
    return ArraySource(
        {part: found.data for part, found in parts.items()},
        {part: np.asarray(found.targets, dtype=np.int64) for part, found in parts.items()},
        parts["train"].classes,
        hashlib.sha256(f"{kind} {factory.tgz_md5}".encode()).hexdigest()[:16],
    )
