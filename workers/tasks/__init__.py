"""Tasks: which data a study uses, loaded by the ``kind`` of its data section. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workers.tasks.kinds import KINDS, TEXT_DEFAULTS, DataKind, kind_of
from workers.tasks.task_info import IMAGES, TaskError, TaskInfo, TextInfo

if TYPE_CHECKING:
    from workers.tasks.batches import TaskData
    from workers.tasks.description import DataDescription

__all__ = [
    "IMAGES",
    "KINDS",
    "TEXT_DEFAULTS",
    "DataKind",
    "TaskError",
    "TaskInfo",
    "TextInfo",
    "data_digest",
    "describe",
    "info",
    "kind_of",
    "load",
]


def load(data: Mapping[str, Any]) -> TaskData:
    """Loads the data and cuts its splits.

    Args:
        data: the context's data section: ``kind, path, image_size, search_fraction, split_seed, train_limit,
            search_limit, report_limit, digest, mean, std``; all but ``kind`` (and ``path`` where files are read) may be
            left out. For vision-language tasks also those of :data:`TEXT_DEFAULTS`.

    Raises:
        TaskError: the data is missing or broken, or is not the data of ``digest``.
    """
    if kind_of(data).task != IMAGES:
        from workers.tasks import vision_language  # imports torch

        return vision_language.load(data)
    from workers.tasks import image_classification  # imports torch

    return image_classification.load(data)


def info(data: Mapping[str, Any]) -> TaskInfo:
    """Returns the facts about the data without decoding more than one image.

    Raises:
        TaskError: the data is missing or broken.
    """
    if kind_of(data).task != IMAGES:
        from workers.tasks import vision_language  # imports torch

        return vision_language.info(data)
    from workers.tasks import image_sources  # imports numpy and Pillow

    source = image_sources.open_source(data)
    return image_sources.task_info(source, data)


def describe(data: Mapping[str, Any]) -> DataDescription:
    """Returns what a study of this data is trained and judged on: splits, classes, sizes, copies, a decoded sample.

    Raises:
        TaskError: the data cannot be used, or not with these settings.
    """
    if kind_of(data).task != IMAGES:
        from workers.tasks import vision_language  # imports torch

        return vision_language.describe(data)
    from workers.tasks import description, image_sources  # import numpy and Pillow

    source = image_sources.open_source(data)
    return description.describe_images(source, data, image_sources.task_info(source, data))


def data_digest(data: Mapping[str, Any]) -> str:
    """Returns 16 hexadecimal digits that name the content, wherever it lies.

    SHA-256 of the files for Parquet and image folders (with their names there), of the arrays for digits, of
    torchvision's archive checksum for CIFAR. Of vision-language data in files those of annotations and of every picture.
    Files are read once as long as size and time of change stay. Limits and split settings are not part of it.

    Raises:
        TaskError: the data is missing.
    """
    if kind_of(data).task != IMAGES:
        from workers.tasks import vision_language  # imports torch

        return vision_language.data_digest(data)
    from workers.tasks import image_sources  # imports numpy and Pillow

    return image_sources.open_source(data).digest
