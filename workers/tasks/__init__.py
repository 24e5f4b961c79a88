"""Tasks: which data a study uses, loaded by the ``kind`` of its data section. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from workers.tasks.kinds import IMAGES, KINDS, TEXT_DEFAULTS, DataKind

if TYPE_CHECKING:
    from workers.tasks.batches import TaskData

__all__ = [
    "IMAGES",
    "KINDS",
    "TEXT_DEFAULTS",
    "DataKind",
    "TaskError",
    "TaskInfo",
    "TextInfo",
    "data_digest",
    "info",
    "kind_of",
    "load",
]


class TaskError(ValueError):
    """The data cannot be used; the message names the file, the row, the rule and the remedy."""


@dataclass(frozen=True)
class TextInfo:
    """What a model needs to know of texts: ids below ``vocab_size``, at most ``max_tokens`` of them, ``pad_id`` after the end."""

    vocab_size: int
    max_tokens: int
    pad_id: int


@dataclass(frozen=True)
class TaskInfo:
    """What a model needs to know of the data.

    Attributes:
        num_classes: logits of an example: classes, answers of the vocabulary; 1 for retrieval, the score of a pair.
        image_size: side length in pixels of the square images.
        task: ``image_classification``, or a vision-language one: a key of ``workers.models.vision_language.TASKS``.
        text: of the texts, None where examples are images alone.
    """

    num_classes: int
    in_chans: int
    image_size: int
    class_names: tuple[str, ...]
    task: str = IMAGES
    text: TextInfo | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads what ``dataclasses.asdict`` and JSON made of it."""
        text = values["text"]
        return cls(
            **{
                **values,
                "class_names": tuple(values["class_names"]),
                "text": None if text is None else TextInfo(**text),
            }
        )


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
        from workers.tasks import vision_language  # these import torch

        return vision_language.load(data)
    from workers.tasks import image_classification

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


def kind_of(data: Mapping[str, Any]) -> DataKind:
    """Returns the kind of a data section.

    Raises:
        TaskError: there is none of that name.
    """
    if data["kind"] not in KINDS:
        raise TaskError(f"data.kind must be one of {', '.join(KINDS)}, got {data['kind']!r}")
    return KINDS[data["kind"]]
