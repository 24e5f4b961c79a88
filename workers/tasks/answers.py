"""What an answer, a ranking is worth: soft scores of ten annotators, VQA accuracy, recall@k of retrieval.

Sources: Goyal et al., "Making the V in VQA Matter", CVPR 2017, and the evaluation described at visualqa.org/evaluation for
answers; Karpathy, Fei-Fei, "Deep Visual-Semantic Alignments", CVPR 2015, section 4.2, for recall.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks.task_info import TaskError

ANNOTATORS = 10
"""Answers that a question has."""

ENOUGH = 3
"""Agreeing annotators with which an answer counts in full."""

CAP = ENOUGH + 1
"""Agreeing annotators from which the score is 1 whichever annotator is left out."""

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_CONTRACTION_LIST = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he's how's i'm isn't i've it'd it'll
let's ma'am mightn't might've mustn't must've needn't o'clock oughtn't she's should've shouldn't somebody's
someone's something's that's there'd there're there's they'd they'll they're they've wasn't we've weren't what'll
what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've
wouldn't y'all you'd you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTION_LIST.split()}
"""Without its apostrophe to the contraction; those that would be another word, such as "were", are left out."""

_COMMA = re.compile(r"(?<=\d),(?=\d)")
_PERIOD = re.compile(r"(?<!\d)\.|\.(?!\d)")
_PUNCTUATION = re.compile(r"[^\w\s':.]|_")


# --- VQA --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 16)
def normalise(answer: str) -> str:
    """Returns the form in which answers are compared.

    As the evaluation describes: lower case; no comma between digits; no period but a decimal one; other punctuation
    besides apostrophe and colon is a space; number words to ten are digits; articles go; contractions get their apostrophe.
    """
    text = _PUNCTUATION.sub(" ", _PERIOD.sub("", _COMMA.sub("", answer.lower())))
    words = (_NUMBERS.get(word, _CONTRACTIONS.get(word, word)) for word in text.split() if word not in _ARTICLES)
    return " ".join(words)


def soft_score(agreeing: int, annotators: int = ANNOTATORS) -> float:
    """Returns min(1, n / 3) averaged over the sets of all annotators but one, n being how many there gave the answer."""
    without, with_all = min(1.0, (agreeing - 1) / ENOUGH), min(1.0, agreeing / ENOUGH)
    return (agreeing * without + (annotators - agreeing) * with_all) / annotators if agreeing else 0.0


SCORES = np.array([soft_score(agreeing) for agreeing in range(CAP + 1)], dtype=np.float32)
"""Score of an answer that 0, 1, 2, 3, and 4 or more of ten annotators gave: 0, .3, .6, .9, 1."""


def agreement(answers: Iterable[str]) -> Counter[str]:
    """Returns how many annotators gave each normalised answer; one that is empty once normalised is no answer."""
    found = Counter(map(normalise, answers))
    found.pop("", None)
    return found


def consensus(found: Counter[str]) -> str | None:
    """Returns the answer of most annotators, the alphabetically first of equals; None without any answer."""
    return min(found, key=lambda answer: (-found[answer], answer), default=None)


def vocabulary(questions: Iterable[Counter[str]], size: int) -> tuple[str, ...]:
    """Returns the ``size`` answers that are most questions' consensus, most frequent first, equals alphabetically."""
    counts = Counter(answer for found in questions if (answer := consensus(found)) is not None)
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer))[:size])


def vocabulary_digest(path: Path) -> str:
    """Returns 16 hexadecimal digits that name the content of a vocabulary's file.

    Raises:
        TaskError: it cannot be read.
    """
    return _digest(_content(path))


def read_vocabulary(path: Path, digest: str | None = None) -> tuple[str, ...]:
    """Returns the answers that a file lists in the order of a model's classes, normalised as annotators' answers are.

    A ``.json`` file holds a list of answers, an object of answers to class numbers, as published VQA code writes it, or
    one of class numbers to answers, as in a model's ``id2label``; any other file is a text with one answer a line. An
    answer that is empty once normalised, which the published list of 3,129 has, is a class that nobody's answer is.

    Args:
        digest: what :func:`vocabulary_digest` must say of it; None takes any.

    Raises:
        TaskError: it is missing, no such list, another file than that of ``digest``, or two of its answers are the same.
    """
    content = _content(path)
    if digest is not None and digest != (found := _digest(content)):
        raise TaskError(
            f"data.answers {path}: content must be the study's (digest {digest}), this node's has digest {found}; copy "
            "the same file to every node, or start a new study for the new answers"
        )
    given = _listed(path, content)
    what, first = ("class", 0) if path.suffix == ".json" else ("line", 1)
    names: dict[str, int] = {}
    for row, answer in enumerate(given):
        earlier = names.setdefault(normalise(answer), row)
        if earlier != row:
            raise TaskError(
                f"data.answers {path}: must name each answer once, {what} {first + earlier} {given[earlier]!r} and {what} "
                f"{first + row} {answer!r} are the same ({normalise(answer)!r}) as answers are compared; remove one"
            )
    return tuple(names)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TaskError(
            f"data.answers {path}: must be a readable file of answers: {error.strerror or error}; name one, or the "
            "number of the most frequent answers"
        ) from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _listed(path: Path, content: bytes) -> list[str]:
    """Returns the answers as they stand in a vocabulary's file, by class."""
    try:
        text = content.decode()
        found = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except ValueError as error:
        raise TaskError(
            f"data.answers {path}: must be a JSON list of answers, or a text with one a line: {error}; write it so"
        ) from error
    if isinstance(found, Mapping):
        found = _by_class(path, found)
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise TaskError(f"data.answers {path}: must be a list of texts that is not empty; see the model's id2label")
    if path.suffix != ".json" and (blank := [row for row, one in enumerate(found, start=1) if not one.strip()]):
        raise TaskError(f"data.answers {path}: line {blank[0]} must hold an answer, is blank; remove the line")
    return found


def _by_class(path: Path, found: Mapping[str, Any]) -> list[Any]:
    """Returns the answers of an object from answers to class numbers, or from those to answers, in the classes' order."""
    pairs = list(found.items())
    if all(isinstance(value, str) for value in found.values()):
        pairs = [(answer, int(number) if number.isdecimal() else number) for number, answer in pairs]
    by_class = {number: answer for answer, number in pairs if isinstance(number, int)}
    if sorted(by_class) != list(range(len(pairs))):
        raise TaskError(
            f"data.answers {path}: an object must give the {len(pairs)} answers the classes 0 to {len(pairs) - 1}, each once; "
            "see the model's label2id or id2label"
        )
    return [by_class[number] for number in range(len(pairs))]


@dataclass(frozen=True)
class SoftScores:
    """A matrix (N, A) float32 of what each answer of a vocabulary is worth for each question, kept sparsely.

    Dense, the 443,757 training questions of VQAv2 with 3,129 answers would take 5.6 GB. ``scores[rows]`` gives dense rows,
    ``scores[rows, classes]`` single values, ``np.asarray(scores)`` the whole.

    Attributes:
        classes: (N, 10), the answers of the vocabulary that some annotator gave, most given first; -1 elsewhere.
        agreeing: (N, 10) uint8, how many gave it.
        size: A.
    """

    classes: NDArray[np.int32]
    agreeing: NDArray[np.uint8]
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.classes), self.size

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        if isinstance(key, tuple):
            return SCORES[self.levels(*key)]
        classes, agreeing = self.classes[key], self.agreeing[key]
        out = np.zeros((*classes.shape[:-1], self.size + 1), dtype=np.float32)
        np.put_along_axis(out, classes.astype(np.int64), SCORES[np.minimum(agreeing, CAP)], axis=-1)  # -1: the last one
        return out[..., :-1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        found = self[:]
        return found if dtype is None else found.astype(dtype)

    def levels(self, rows: Any, classes: Any) -> NDArray[np.int64]:
        """Returns how many annotators gave the answers ``classes`` to the questions ``rows``, capped at 4."""
        same = self.classes[rows] == np.asarray(classes)[..., None]
        agreeing = np.where(same, self.agreeing[rows], 0).sum(axis=-1)
        return np.asarray(np.minimum(agreeing, CAP), dtype=np.int64)

    @classmethod
    def of(cls, questions: Sequence[Counter[str]], names: Sequence[str]) -> SoftScores:
        """Scores the answers to ``questions`` by the vocabulary ``names``."""
        index = {name: row for row, name in enumerate(names)}
        classes = np.full((len(questions), ANNOTATORS), -1, dtype=np.int32)
        agreeing = np.zeros((len(questions), ANNOTATORS), dtype=np.uint8)
        for row, found in enumerate(questions):
            known = sorted((-count, answer) for answer, count in found.items() if answer in index)
            for column, (count, answer) in enumerate(known):
                classes[row, column], agreeing[row, column] = index[answer], -count
        return cls(classes, agreeing, len(names))


def vqa_levels(logits: NDArray[Any], scores: SoftScores, first: int = 0) -> NDArray[np.int64]:
    """Returns how many of ten annotators gave the best-scored answer, capped at 4: (N,).

    Args:
        logits: (N, A) of the questions from ``first`` on.
    """
    return scores.levels(np.arange(first, first + len(logits)), np.argmax(logits, axis=1))


def vqa_accuracy(logits: NDArray[Any], scores: SoftScores) -> float:
    """Returns the VQA accuracy from 0 to 1: the mean soft score of the answers that have the highest logits (N, A)."""
    return float(SCORES[vqa_levels(logits, scores)].mean(dtype=np.float64))


# --- retrieval --------------------------------------------------------------------------------------------------------


def text_ranks(scores: NDArray[Any], picture_of_text: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns for every image how many texts of other images are before its best own one: (M,), 0 is the top.

    Args:
        scores: (M, Q), higher is better; every image has a text.
        picture_of_text: (Q,) rows of ``scores``. Equal scores count against the own text, so that a model that cannot
            tell pairs apart finds nothing.
    """
    own = picture_of_text == np.arange(len(scores))[:, None]
    best = np.where(own, scores, -np.inf).max(axis=1)
    return np.asarray(((scores >= best[:, None]) & ~own).sum(axis=1), dtype=np.int64)


def image_ranks(scores: NDArray[Any], picture_of_text: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns for every text how many other images are before its own: (Q,); see :func:`text_ranks`."""
    own = scores[picture_of_text, np.arange(scores.shape[1])]
    return np.asarray((scores >= own).sum(axis=0) - 1, dtype=np.int64)


def recall_at(ranks: NDArray[np.int64], k: int) -> float:
    """Returns the share, 0 to 1, of those that are among the first ``k``."""
    return float((ranks < k).mean())
