"""What sources of encoded images have in common: facts about them, how many channels they become, and their digest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks.image_facts import Facts, facts_of, known_digest
from workers.tasks.pictures import Content, Labels
from workers.tasks.task_info import TaskError


class EncodedSource(ABC):
    """See :class:`workers.tasks.pictures.Source`.

    Attributes:
        content: names the files, their order and their parts.
        notes: what of the data is not read, a sentence each.
    """

    content: str
    labels: dict[str, Labels]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @abstractmethod
    def contents(self, part: str, wanted: NDArray[np.int64]) -> Iterator[tuple[int, Content, str]]:
        """Yields (position in ``wanted``, an encoded image or its file, name for messages) in any order."""

    @cached_property
    def facts(self) -> Mapping[str, Facts]:
        """Facts about the images of each part."""
        return {part: facts_of(self, part, len(labels), self.content) for part, labels in self.labels.items()}

    @property
    def channels(self) -> int:
        """1 where all training images are grey, else 3."""
        facts = self.facts["train"]
        return 1 if facts.grey.all() else 3

    @cached_property
    def digest(self) -> str:
        """Names the content and, where that changed, how its pixels are read."""
        by_the_first = 1 if str(self.facts["train"].modes[0]) in ("1", "L") else 3  # as it was decided
        return known_digest(self.content, list(self.facts.values()), channels_changed=by_the_first != self.channels)


def image_bytes(value: object, name: str) -> bytes:
    """Returns the encoded image of a cell: bytes, or ``{bytes, path}``."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise TaskError(
            f"{name}: an image column must hold the bytes of a PNG or JPEG file, found {type(value).__name__}; "
            "embed the files (Hugging Face datasets: save_to_disk does)"
        )
    return value


def check_classes(labels: Mapping[str, Labels], place: Any) -> None:
    """Checks numbers of classes that could never be without a gap, before anything is made a class each.

    Raises:
        TaskError: the largest label leaves one out for certain.
    """
    count = sum(map(len, labels.values()))
    for part, found in labels.items():
        if len(found) and found.max() >= count:
            row = int(found.argmax())
            raise TaskError(
                f"{place}: {part} image {row} has label {found[row]}, the largest; labels must be numbers of classes from 0 "
                f"without gaps, of which {count} images have {count} at most; correct or remove it"
            )
