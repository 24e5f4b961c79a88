"""Opens labelled images and judges their labels; the sources that are arrays. Encoded images have their own file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks.encoded_images import EncodedSource
from workers.tasks.opening import check_digest, opened, place
from workers.tasks.pictures import REPORT_FRACTION, Content, Images, Labels, Source, cut
from workers.tasks.pixels import decode
from workers.tasks.task_info import TaskError, TaskInfo


def open_source(data: Mapping[str, Any]) -> Source:
    """Opens the source of a data section.

    Raises:
        TaskError: it is missing or broken, or its content has another digest than ``data["digest"]``.
    """
    source: Source = opened(data)
    _check_labels(source, place(data))
    check_digest(data, source.digest)
    return source


def task_info(source: Source, data: Mapping[str, Any]) -> TaskInfo:
    """Returns number of classes, channels and side length, by the source's first training image.

    Raises:
        TaskError: images of no one size, or too few for a search split.
    """
    if np.unique(source.labels["train"], return_counts=True)[1].max() < 2:
        raise TaskError(
            f"{place(data)}: the search split would be empty: some class must have 2 training images or more, each has 1; "
            "add images"
        )
    height, width, name = _first_sides(source)
    size = data.get("image_size")
    if size is None and height != width:
        raise TaskError(
            f"{name}: images must be square, the first one is {height}x{width}; set data.image_size to resize and crop"
        )
    channels = int(data.get("channels") or source.channels)
    return TaskInfo(len(source.class_names), channels, int(size or height), source.class_names)


def _first_sides(source: Source) -> tuple[int, int, str]:
    """Returns height, width and name of the first training image."""
    _, content, name = next(source.contents("train", np.zeros(1, dtype=np.int64)))
    if isinstance(source, EncodedSource) and (sides := source.facts["train"].sides[0]).any():
        return int(sides[0]), int(sides[1]), name
    height, width, _ = decode(content, name, None).shape
    return height, width, name


def _check_labels(source: Source, name: str) -> None:
    """Raises TaskError unless labels are 0..C-1, each present in training."""
    classes = len(source.class_names)
    for part, labels in source.labels.items():
        if not len(labels):
            raise TaskError(
                f"{name}: the {part} part must hold images, it is empty"
                + ("; some class must have 2 images or more, from which it could be cut" if part == "test" else "")
            )
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
    if classes < 2:
        raise TaskError(
            f"{name}: must have images of two classes or more, has {source.class_names[0]!r} alone; add others, or put the "
            "classes' folders or numbers where they belong"
        )


# --- arrays -----------------------------------------------------------------------------------------------------------


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


def open_digits(data: Mapping[str, Any]) -> ArraySource:
    """Opens the digits, whatever the section says."""
    return digits()


@cache
def digits() -> ArraySource:
    """scikit-learn's handwritten digits: 1,797 images of 8x8, float32 from 0 to 16 (UCI Optical Recognition, 1998)."""
    spec = find_spec("sklearn")
    assert spec is not None  # a requirement
    assert spec.origin is not None
    # The file that `sklearn.datasets.load_digits` reads: importing scikit-learn for it takes every process a second.
    table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = np.ascontiguousarray(table[:, :-1].reshape(-1, 8, 8, 1), dtype=np.float32)
    labels = table[:, -1].astype(np.int64)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
    train, test = cut(labels, REPORT_FRACTION, seed=0)
    return ArraySource(
        {"train": images[train], "test": images[test]},
        {"train": labels[train], "test": labels[test]},
        [str(n) for n in range(10)],
        digest,
    )


def _open_cifar(name: str, data: Mapping[str, Any]) -> ArraySource:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009) through torchvision, downloaded to the path if it is not there.

    Args:
        name: of torchvision's class.
    """
    kind, root = data["kind"], str(data["path"])
    try:
        from torchvision import datasets  # imports torch, and other data does without a torchvision that fits it
    except (ImportError, RuntimeError) as error:
        raise TaskError(f"data.kind {kind} needs the torchvision that matches torch: {error}") from error
    factory = getattr(datasets, name)
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


open_cifar10 = partial(_open_cifar, "CIFAR10")
open_cifar100 = partial(_open_cifar, "CIFAR100")
