"""What an answer, a ranking is worth: soft scores of ten annotators, VQA accuracy, recall@k of retrieval.

Sources: Goyal et al., "Making the V in VQA Matter", CVPR 2017, and the evaluation described at visualqa.org/evaluation for
answers; Karpathy, Fei-Fei, "Deep Visual-Semantic Alignments", CVPR 2015, section 4.2, for recall.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks import TaskError

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


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """Returns the answers that a file lists in the order of a model's classes: a JSON list, or one a line.

    Raises:
        TaskError: it is missing, or no such list.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise TaskError(
            f"data.answers {path}: must be a JSON list of answers, or a text with one a line: {error}"
        ) from error
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise TaskError(f"data.answers {path}: must be a list of texts that is not empty; see the model's id2label")
    if len(set(found)) != len(found):
        twice = next(answer for answer, count in Counter(found).items() if count > 1)
        raise TaskError(f"data.answers {path}: must name each answer once, {twice!r} is there twice; remove one")
    return tuple(found)


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


def vqa_levels(logits: NDArray[Any], scores: SoftScores) -> NDArray[np.int64]:
    """Returns for every question how many of ten annotators gave the best-scored answer, capped at 4: (N,)."""
    return scores.levels(np.arange(len(scores)), np.argmax(logits, axis=1))


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
