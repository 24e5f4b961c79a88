"""Tasks: which data a study uses, loaded by the ``kind`` of its data section. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from workers.tasks.batches import TaskData

IMAGE_KINDS = ("digits", "cifar10", "cifar100", "imagefolder", "parquet")
"""Values of ``data.kind`` that are image classification."""

DIGIT_KINDS = ("digit_vqa", "digit_entailment", "digit_nlvr", "digit_retrieval")
"""Vision-language tasks made of scikit-learn's digits; no path."""

TEXT_KINDS = ("vqa", "entailment", "nlvr2", "nlvr1", "retrieval")
"""Vision-language tasks read from files."""

TEXT_DEFAULTS: Mapping[str, Any] = {
    "max_text_tokens": None,
    "truncation": False,
    "tokenizer": None,
    "answers": 3129,
    "candidates": 4,
}
"""Keys that the data sections of vision-language tasks have besides; 3,129 answers is what models of VQAv2 have.

``answers`` may also be the path of a file of answers, or ``{path, digest}``; see :mod:`workers.tasks.answers`.
"""

KINDS = (*IMAGE_KINDS, *DIGIT_KINDS, *TEXT_KINDS)
"""Values of ``data.kind``."""


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
    task: str = "image_classification"
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
    if _has_texts(data):
        from workers.tasks import vision_language

        return vision_language.load(data)
    from workers.tasks import image_classification

    return image_classification.load(data)


def info(data: Mapping[str, Any]) -> TaskInfo:
    """Returns the facts about the data without decoding more than one image.

    Raises:
        TaskError: the data is missing or broken.
    """
    if _has_texts(data):
        from workers.tasks import vision_language

        return vision_language.info(data)
    from workers.tasks import image_sources

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
    if _has_texts(data):
        from workers.tasks import vision_language

        return vision_language.data_digest(data)
    from workers.tasks import image_sources

    return image_sources.open_source(data).digest


def _has_texts(data: Mapping[str, Any]) -> bool:
    if data["kind"] not in KINDS:
        raise TaskError(f"data.kind must be one of {', '.join(KINDS)}, got {data['kind']!r}")
    return data["kind"] not in IMAGE_KINDS
