"""Tasks: which data a study uses, loaded by the ``kind`` of its data section. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.tasks.image_classification import Task

KINDS = ("digits", "cifar10", "cifar100", "imagefolder", "parquet")
"""Values of ``data.kind``; all are image classification so far."""


class TaskError(ValueError):
    """The data cannot be used; the message names the file, the row, the rule and the remedy."""


@dataclass(frozen=True)
class TaskInfo:
    """What a model needs to know of the data. ``image_size`` is the side length in pixels of the square images."""

    num_classes: int
    in_chans: int
    image_size: int
    class_names: tuple[str, ...]


def load(data: Mapping[str, Any]) -> Task:
    """Loads the data and cuts its splits.

    Args:
        data: the context's data section: ``kind, path, image_size, search_fraction, split_seed, train_limit,
            search_limit, report_limit, digest, mean, std``; all but ``kind`` (and ``path`` where files are read) may be
            left out.

    Raises:
        TaskError: the data is missing or broken, or is not the data of ``digest``.
    """
    from workers.tasks import image_classification

    return image_classification.load(data)


def info(data: Mapping[str, Any]) -> TaskInfo:
    """Returns the facts about the data without decoding more than one image.

    Raises:
        TaskError: the data is missing or broken.
    """
    from workers.tasks import image_sources

    source = image_sources.open_source(data)
    return image_sources.task_info(source, data)


def data_digest(data: Mapping[str, Any]) -> str:
    """Returns 16 hexadecimal digits that name the content, wherever it lies.

    SHA-256 of the files for Parquet and image folders (with their names there), of the arrays for digits, of
    torchvision's archive checksum for CIFAR. Files are read once as long as size and time of change stay. Limits and split settings are not part of it.

    Raises:
        TaskError: the data is missing.
    """
    from workers.tasks import image_sources

    return image_sources.open_source(data).digest
