"""What a model needs to know of the data, and the error of data that cannot be used. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

IMAGES = "image_classification"
"""The task of images alone."""


class TaskError(ValueError):
    """The data cannot be used; the message names the file, the row, the rule and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(writable(message))


def writable(text: str) -> str:
    """Returns text that can be written: bytes of file names that are no UTF-8 are spelt out, as ``\\xe9``."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


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
