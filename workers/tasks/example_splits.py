"""Three splits of examples from a corpus: what each holds, its classes, its pictures in the task's size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks import answers, decoded
from workers.tasks.corpus import ArrayPictures, Corpus, cut_groups, limited
from workers.tasks.encoded_texts import EncodedTexts
from workers.tasks.examples import Examples
from workers.tasks.pixels import decode, squash
from workers.tasks.task_info import TaskError, TaskInfo

CHANNELS = 3
"""Of every picture; grey ones are converted."""

LEAST_COVERAGE = 0.5
"""Share of a part's questions with an answer of the vocabulary below which it is taken for that of other data."""

FEW_TEXTS, MOST_DRAWS = 500, 1000
"""Up to how many texts others are counted, not tried; and how often they are tried."""


@dataclass(frozen=True)
class Splits:
    """A corpus, cut.

    Attributes:
        examples: ``train``, ``search``, ``report``, with mean and deviation of the training pictures.
        keys: of each split's pictures in the node's store; empty where they are in memory.
        text: how texts became ids; see :meth:`EncodedTexts.description`.
    """

    info: TaskInfo
    examples: Mapping[str, Examples]
    keys: Mapping[str, str]
    text: Mapping[str, Any]


def cut(corpus: Corpus, data: Mapping[str, Any]) -> Splits:
    """Cuts the splits of a data section with all defaults in it; decodes the pictures that they show.

    Limits count examples, in retrieval pictures with all their texts. The search split is the corpus's validation part, or
    cut from the training part where it has none.
    """
    texts, classes = EncodedTexts(corpus, data), _Classes(corpus, data)
    info = _info(corpus, data, texts, classes)
    seed = int(data["split_seed"])
    examples: dict[str, Examples] = {}
    keys = {}
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    for name, (part_name, chosen) in _chosen(corpus, data, classes).items():
        part = corpus.parts[part_name]
        used, pictures = np.unique(part.pictures[chosen], return_inverse=True)
        images, moments, keys[name] = _images(corpus, used, info, data)
        if name == "train":
            mean, std = moments.mean_and_std()
        pictures = pictures.reshape(len(chosen), -1)
        candidates = int(data["candidates"]) if name == "train" else 1
        examples[name] = Examples(
            info.task,
            images,
            pictures,
            **_texts(corpus.task, texts, texts.rows[part_name][chosen], pictures[:, 0], candidates, seed),
            **classes.targets(part_name, chosen),
            mean=mean,
            std=std,
        )
    return Splits(info, examples, keys, texts.description())


def split_rows(corpus: Corpus, data: Mapping[str, Any]) -> dict[str, tuple[str, NDArray[np.int64]]]:
    """Returns split to the part of the corpus that it is of, and its examples there; training first."""
    return _chosen(corpus, data, _Classes(corpus, data))


def _chosen(corpus: Corpus, data: Mapping[str, Any], classes: _Classes) -> dict[str, tuple[str, NDArray[np.int64]]]:
    seed, found = int(data["split_seed"]), {}
    for name, (part_name, rows) in _rows(corpus, float(data["search_fraction"]), seed).items():
        part = corpus.parts[part_name]
        rows = classes.answerable(rows) if name == "train" else rows
        counted = part.pictures[:, 0] if corpus.task == "retrieval" else np.arange(len(part))
        found[name] = (part_name, limited(rows, counted, data.get(f"{name}_limit"), seed))
    return found


def _rows(corpus: Corpus, fraction: float, seed: int) -> dict[str, tuple[str, NDArray[np.int64]]]:
    """Returns split to the part of the corpus that it is of, and its rows there; training first."""
    whole = {name: np.arange(len(part)) for name, part in corpus.parts.items()}
    if "validation" in whole:
        train, search = ("train", whole["train"]), ("validation", whole["validation"])
    else:
        kept, off = cut_groups(corpus.parts["train"].groups, fraction, seed)
        train, search = ("train", kept), ("train", off)
    return {"train": train, "search": search, "report": ("test", whole["test"])}


def task_info(corpus: Corpus, data: Mapping[str, Any]) -> TaskInfo:
    """Returns the facts about a corpus; decodes one picture at most."""
    return _info(corpus, data, EncodedTexts(corpus, data), _Classes(corpus, data))


def _info(corpus: Corpus, data: Mapping[str, Any], texts: EncodedTexts, classes: _Classes) -> TaskInfo:
    size = data.get("image_size")
    if size is None:
        _, content, name = next(corpus.pictures.contents("", np.zeros(1, dtype=np.int64)))
        height, width, _ = decode(content, name, CHANNELS).shape
        if height != width:
            raise TaskError(
                f"{name}: pictures must be square, this is {height}x{width}; set data.image_size, which resizes both sides"
            )
        size = height
    return TaskInfo(len(classes.names), CHANNELS, int(size), classes.names, corpus.task, texts.info)


# --- classes ----------------------------------------------------------------------------------------------------------


class _Classes:
    """The classes of a corpus; of VQA the most frequent answers of its whole training part, or those of a file."""

    def __init__(self, corpus: Corpus, data: Mapping[str, Any]) -> None:
        self.parts = corpus.parts
        self.names = corpus.class_names
        self.agreements: dict[str, list[Counter[str]]] = {}
        for name, part in corpus.parts.items():
            if part.answers is not None:
                self.agreements[name] = [answers.agreement(given) for given in part.answers]
        if self.agreements:
            self._read_vocabulary(data["answers"])

    def _read_vocabulary(self, given: int | Mapping[str, str]) -> None:
        if isinstance(given, int):
            self.names, source = answers.vocabulary(self.agreements["train"], given), "the training answers"
        else:
            self.names, source = answers.read_vocabulary(Path(given["path"]), given["digest"]), given["path"]
        for name, found in self.agreements.items():
            missing = self._without(found)
            if len(missing) > (1 - LEAST_COVERAGE) * len(found):
                example = ", ".join(map(repr, found[missing[0]])) or "it has none"
                raise TaskError(
                    f"{self.parts[name].names[missing[0]]}: no answer of it ({example}) is in the answer vocabulary of {source} "
                    f"({len(self.names)}: {', '.join(self.names[:3])} ...), which has answers to "
                    f"{100 - 100 * len(missing) / len(found):.1f} % of the {name} part's {len(found)} questions; at least "
                    f"{100 * LEAST_COVERAGE:.0f} % must have one: set data.answers to the vocabulary of this data, or to a higher number"
                )

    def _without(self, found: Sequence[Counter[str]]) -> list[int]:
        """Returns the rows of questions none of whose answers is in the vocabulary."""
        known = set(self.names)
        return [row for row, one in enumerate(found) if known.isdisjoint(one)]

    def answerable(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns those of the training examples from which a class can be learnt: with an answer of the vocabulary."""
        if not self.agreements:
            return rows
        return rows[~np.isin(rows, self._without(self.agreements["train"]))]

    def targets(self, part: str, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Returns ``labels`` and ``answers`` of :class:`Examples`."""
        if not self.agreements:
            return {"labels": self.parts[part].labels[rows], "answers": None}
        scores = answers.SoftScores.of([self.agreements[part][row] for row in rows.tolist()], self.names)
        return {"labels": scores.classes[:, 0].astype(np.int64), "answers": scores}


# --- pictures and texts -----------------------------------------------------------------------------------------------


def _images(
    corpus: Corpus, rows: NDArray[np.int64], info: TaskInfo, data: Mapping[str, Any]
) -> tuple[NDArray[np.uint8], decoded.Moments, str]:
    """Returns the pictures of ``rows``, their moments, and their key in the node's store."""
    if not isinstance(corpus.pictures, ArrayPictures):
        fit: decoded.Fit = "exact" if data.get("image_size") is None else "squash"
        stored = decoded.store(corpus.pictures, "", rows, info, fit, corpus.digest)
        return stored.images, stored.moments, stored.key
    images = np.stack([squash(image, info.image_size) for image in corpus.pictures.images[rows]])
    wide = images.reshape(-1, CHANNELS).astype(np.int64)
    total, squares = wide.sum(axis=0), np.square(wide).sum(axis=0)
    return images, decoded.Moments(len(wide), tuple(total.tolist()), tuple(squares.tolist())), ""


def _texts(
    task: str,
    texts: EncodedTexts,
    rows: NDArray[np.int64],
    pictures: NDArray[np.int64],
    candidates: int,
    seed: int,
) -> dict[str, Any]:
    """Returns the fields of :class:`Examples` that are about texts.

    Args:
        rows: (N,), each example's text among the corpus's distinct ones.
        pictures: (N,), each example's first picture among the split's.
    """
    if task != "retrieval":
        used, own = np.unique(rows, return_inverse=True)
        ids, mask = texts.padded(used)
        return {"texts": ids, "text_mask": mask, "text_rows": own.reshape(-1, 1), "picture_of_text": None}
    ids, mask = texts.padded(rows)
    drawn = draw_candidates(rows, pictures, candidates, seed)
    return {"texts": ids, "text_mask": mask, "text_rows": drawn, "picture_of_text": pictures}


def draw_candidates(texts: NDArray[np.int64], pictures: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Returns rows (N, count) of texts to score against each text's picture: the own one first, others at random.

    The others are of other pictures, read differently from the own one, and differ from each other. There are fewer where
    some picture's others are fewer.

    Args:
        texts, pictures: (N,); equal numbers read the same, are of the same picture.

    Raises:
        TaskError: too many texts read the same.
    """
    generator = np.random.default_rng(seed)
    if len(texts) <= FEW_TEXTS:
        return _drawn_from_few(texts, pictures, count, generator)
    drawn = np.arange(len(texts))[:, None]
    for _ in range(1, count):
        new = generator.integers(len(texts), size=len(texts))
        for _ in range(MOST_DRAWS):
            same = (texts[drawn] == texts[new][:, None]).any(axis=1) | (pictures[new] == pictures)
            again = np.flatnonzero(same)
            if not len(again):
                break
            new[again] = generator.integers(len(texts), size=len(again))
        else:
            raise TaskError(f"data.candidates {count}: too many training texts read the same; remove such texts")
        drawn = np.concatenate([drawn, new[:, None]], axis=1)
    return drawn


def _drawn_from_few(
    texts: NDArray[np.int64], pictures: NDArray[np.int64], count: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    drawn = []
    for row in range(len(texts)):
        others = generator.permutation(np.flatnonzero((pictures != pictures[row]) & (texts != texts[row])))
        first = np.unique(texts[others], return_index=True)[1]
        drawn.append([row, *others[np.sort(first)][: count - 1].tolist()])
    width = min(map(len, drawn))
    return np.asarray([rows[:width] for rows in drawn], dtype=np.int64)
