"""What every source of vision-language data becomes before it is tokenised: examples that name pictures and hold a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from workers.tasks.answers import ANNOTATORS
from workers.tasks.pictures import Content, Images, Pictures
from workers.tasks.task_info import TaskError

ENTAILMENT = ("entailment", "neutral", "contradiction")
"""Classes of visual entailment, in the order of SNLI's numbers."""

NO_CONSENSUS = ("-", -1)
"""SNLI's label of a pair on which its annotators did not agree; such pairs are left out, as everywhere."""

TRUTH = ("false", "true")
"""Classes of NLVR: of a statement about one or two pictures."""

MATCH = ("match",)
"""The one score of a pair in retrieval."""

CLASSES: Mapping[str, tuple[str, ...]] = {
    "vqa": (),
    "entailment": ENTAILMENT,
    "nlvr2": TRUTH,
    "nlvr1": TRUTH,
    "retrieval": MATCH,
}
"""Task to its classes; those of VQA are the data's answers."""

REPORT_NAMES = ("test", "test1", "validation", "valid", "val", "dev")
"""Names of a part that can be the report split, the first present wins."""


@dataclass(frozen=True)
class Part:
    """Examples of one part of the data, as lists of the same length.

    Attributes:
        names: where each example comes from, for messages.
        pictures: (N, K) int64, rows of the corpus's pictures.
        texts: question, sentence, statement or caption.
        labels: (N,) int64 classes; zeros where the task has none.
        answers: VQA: what the annotators answered.
        groups: (N,) int64; examples of one group stay on one side of a cut.
    """

    names: Sequence[str]
    pictures: NDArray[np.int64]
    texts: Sequence[str]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    answers: Sequence[Sequence[str]] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: NDArray[np.int64]) -> Part:
        """Returns these examples."""
        listed = rows.tolist()
        answers = None if self.answers is None else [self.answers[row] for row in listed]
        names, texts = [self.names[row] for row in listed], [self.texts[row] for row in listed]
        return Part(names, self.pictures[rows], texts, self.labels[rows], self.groups[rows], answers)


@dataclass(frozen=True)
class Corpus:
    """Pictures with texts in two parts.

    Attributes:
        task: a key of ``workers.models.vision_language.TASKS``.
        class_names: classes; of VQA none, its answers make them.
        digest: names the content.
        parts: ``train`` and ``test``; of retrieval also ``validation`` where the data has such a part beside the test part.
        pictures: of all parts, as the one part ``""``.
        notes: what of the data is not read, a sentence each.
    """

    task: str
    class_names: tuple[str, ...]
    digest: str
    parts: Mapping[str, Part]
    pictures: CorpusPictures
    notes: tuple[str, ...] = ()


class CorpusPictures(Pictures, Protocol):
    """Pictures in one part, ``""``, of a known number."""

    def __len__(self) -> int: ...


class ArrayPictures:
    """Pictures that lie in memory already: (M, S, S, C) uint8."""

    def __init__(self, images: Images, digest: str) -> None:
        self.images, self.digest = images, digest

    def __len__(self) -> int:
        return len(self.images)

    def contents(self, part: str, wanted: NDArray[np.int64]) -> Iterator[tuple[int, Content, str]]:
        """See :class:`workers.tasks.pictures.Pictures`."""
        for position, row in enumerate(wanted.tolist()):
            yield position, self.images[row], f"picture {row}"


def checked_text(value: object, name: str) -> str:
    """Returns a text that an example cannot do without.

    Raises:
        TaskError: it is missing or blank.
    """
    if not isinstance(value, str) or not value.strip():
        found = "an empty one" if isinstance(value, str) else "none" if value is None else type(value).__name__
        raise TaskError(f"{name}: must have a text with its picture, has {found}; add it or remove the example")
    return value


def checked_label(classes: Sequence[str], value: object, name: str) -> int:
    """Returns the class that a name, a number or a truth value means.

    Raises:
        TaskError: it means none.
    """
    text = str(value).strip().lower()
    if isinstance(value, bool | int) and 0 <= int(value) < len(classes):
        return int(value)
    if text in classes:
        return classes.index(text)
    numbered = ", ".join(f"{row} {known}" for row, known in enumerate(classes))
    raise TaskError(f"{name}: label must be one of {numbered}, by number or name, got {value!r}; correct or remove it")


def ten_answers(given: object, name: str) -> list[str]:
    """Returns the answers of ten annotators; where one answer is known, it is that of all of them.

    Args:
        given: a list of texts, or of objects with the text ``answer``.

    Raises:
        TaskError: it is no list, or there is another number of them.
    """
    if not isinstance(given, list):
        raise TaskError(f"{name}: must have a list of answers, has {type(given).__name__}; complete or remove it")
    texts = [one.get("answer") if isinstance(one, Mapping) else one for one in given]
    found = [one for one in texts if isinstance(one, str)]
    if len(found) == len(texts) == 1:
        found *= ANNOTATORS
    if len(found) != ANNOTATORS:
        raise TaskError(
            f"{name}: must have the answers of {ANNOTATORS} annotators, or one answer, has {len(found)}; "
            "complete or remove it"
        )
    return found


@dataclass
class Collected:
    """Examples of one part while a file is read."""

    names: list[str] = field(default_factory=list)
    pictures: list[tuple[int, ...]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    answers: list[list[str]] = field(default_factory=list)

    def add(
        self,
        name: str,
        pictures: tuple[int, ...],
        text: object,
        *,
        label: int = 0,
        answers: list[str] | None = None,
        group: object = None,
    ) -> None:
        """Adds an example; ``group`` None keeps examples of one picture together."""
        self.texts.append(checked_text(text, name))
        self.names.append(name)
        self.pictures.append(pictures)
        self.labels.append(label)
        if answers is not None:
            self.answers.append(answers)
        if group is not None:
            self.groups.append(str(group))

    def part(self) -> Part:
        """Returns what was collected."""
        pictures = np.asarray(self.pictures, dtype=np.int64).reshape(len(self.texts), -1)
        if len(self.groups) == len(self.texts) and self.groups:
            groups = np.unique(self.groups, return_inverse=True)[1].astype(np.int64)
        else:
            groups = by_picture(pictures)
        labels = np.asarray(self.labels, dtype=np.int64)
        return Part(self.names, pictures, self.texts, labels, groups, self.answers or None)


def by_picture(pictures: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns groups (N,) of examples: two that share a picture, also over others, have the same number."""
    if pictures.shape[1] == 1:
        return pictures[:, 0]
    parent = np.arange(int(pictures.max(initial=-1)) + 1)

    def root(picture: int) -> int:
        while parent[picture] != picture:
            parent[picture] = picture = int(parent[parent[picture]])
        return picture

    for first, *others in pictures.tolist():
        for other in others:
            parent[root(other)] = root(first)
    return np.asarray([root(first) for first in pictures[:, 0].tolist()], dtype=np.int64)


def cut_groups(groups: NDArray[np.int64], fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cuts whole groups off at random until about ``fraction`` of the examples is reached.

    Returns (rows kept, rows cut), both ascending.

    One group at least is cut, and one is kept.
    """
    found, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(found) < 2:
        raise TaskError(
            "the training examples all share one picture or directory; none can be kept apart for the search: "
            "add examples of other pictures"
        )
    order = np.random.default_rng(seed).permutation(len(found))
    reached = np.cumsum(sizes[order])
    count = 1 + int(np.searchsorted(reached, fraction * len(groups) - sizes[order[0]] / 2))
    chosen = np.zeros(len(found), dtype=bool)
    chosen[order[: min(count, len(found) - 1)]] = True
    off = chosen[member]
    return np.flatnonzero(~off), np.flatnonzero(off)


def limited(rows: NDArray[np.int64], of: NDArray[np.int64], limit: int | None, seed: int) -> NDArray[np.int64]:
    """Returns the rows that ``limit`` values of ``of`` have, at random; a larger limit keeps those of a smaller one.

    Args:
        rows: ascending.
        of: what is counted: (N,), the examples themselves or their pictures.
    """
    values = np.unique(of[rows])
    if limit is None or limit >= len(values):
        return rows
    return rows[np.isin(of[rows], np.random.default_rng(seed).permutation(values)[:limit])]
