"""The four vision-language tasks made of real digits: what is in a picture is what its texts say, and no prior solves them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest

from workers import tasks
from workers.tasks import KINDS, answers
from workers.tasks.corpus import Corpus
from workers.tasks.digit_tasks import COLOURS, DIGITS, digit_corpus
from workers.tasks.image_sources import digits

CHANCE = {"digit_vqa": 0.40, "digit_entailment": 1 / 3, "digit_nlvr": 1 / 2}
"""Accuracy of the best constant for each kind of question; of VQA with the soft scores of the annotators that disagree."""

NAMED = rf"({'|'.join(COLOURS)}) (\w+)"


def opened(kind: str) -> Corpus:
    return KINDS[kind].open({"kind": kind})


@pytest.fixture(scope="module", params=[kind for kind in KINDS if kind.startswith("digit_")])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def colour_at(cell: np.ndarray) -> str | None:
    """The colour of an 8 x 8 cell, None for the ground."""
    brightest = cell.reshape(-1, 3)[cell.reshape(-1, 3).sum(axis=1).argmax()].astype(float)
    if brightest.max() < 100:
        return None
    shares = {name: np.array(rgb) / np.linalg.norm(rgb) for name, rgb in COLOURS.items()}
    return max(shares, key=lambda name: float(shares[name] @ brightest))


def seen(picture: np.ndarray) -> dict[str, np.ndarray]:
    """Colour to the cell that has it."""
    cells = picture.reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, 8, 8, 3)
    return {found: cell for cell in cells if (found := colour_at(cell)) is not None}


def nearest(cell: np.ndarray) -> str:
    """The name of the most similar handwritten digit of the whole set."""
    source = digits()
    known = np.concatenate([source.arrays[part][..., 0] for part in ("train", "test")]).reshape(-1, 64)
    labels = np.concatenate([source.labels[part] for part in ("train", "test")])
    glyph = cell.max(axis=2).reshape(-1).astype(float)
    glyph, known = glyph - glyph.mean(), known - known.mean(axis=1, keepdims=True)
    likeness = known @ glyph / np.linalg.norm(known, axis=1)
    return DIGITS[labels[likeness.argmax()]]


def test_splits_are_small_balanced_and_of_their_task(kind: str) -> None:
    task = tasks.load({"kind": kind})
    assert task.info.task == {"digit_nlvr": "nlvr2"}.get(kind, kind.removeprefix("digit_"))
    assert task.info.image_size == 32
    assert task.info.in_chans == 3
    assert task.info.text is not None
    assert task.info.text.vocab_size <= 256
    assert task.info.text.max_tokens <= 20
    assert 1500 < len(task.train) < 6000
    assert 0.15 < len(task.search) / (len(task.train) + len(task.search)) < 0.25
    assert len(task.report) >= 300
    if kind in ("digit_entailment", "digit_nlvr"):
        for split in (task.train, task.search, task.report):
            assert set(np.bincount(split.labels) / len(split)) == {1 / task.info.num_classes}
    assert task.info == tasks.info({"kind": kind})


def test_the_data_is_always_the_same(kind: str) -> None:
    first = opened(kind)
    digit_corpus.cache_clear()
    again = opened(kind)
    assert again.digest == first.digest == tasks.data_digest({"kind": kind})
    assert again is not first


def test_no_handwriting_of_one_split_is_in_another(kind: str) -> None:
    """The ground is faint noise, ink is brighter: the brightest pixels of a cell name its handwriting."""
    task: Any = tasks.load({"kind": kind})
    glyphs = {}
    for name in ("train", "search", "report"):
        found = set()
        for picture in getattr(task, name).images[::2]:
            for colour, cell in seen(picture).items():
                ink = cell[..., int(np.argmax(COLOURS[colour]))] >= 100
                if ink.sum() < 64:  # a covered cell has no handwriting
                    found.add((ink.tobytes(), cell[..., int(np.argmax(COLOURS[colour]))][ink].tobytes()))
        glyphs[name] = {(pattern, values) for pattern, values in found if sum(pattern) > 12}
        assert len(glyphs[name]) > 50
    for one, other in (("train", "search"), ("train", "report"), ("search", "report")):
        assert not glyphs[one] & glyphs[other]


def test_texts_tell_what_the_pictures_show() -> None:
    part, images = opened("digit_retrieval").parts["test"], opened("digit_retrieval").pictures.images
    right = total = 0
    for row in range(0, 150, 3):
        cells = seen(images[part.pictures[row, 0]])
        named = dict(re.findall(NAMED, part.texts[row]))
        assert cells.keys() == named.keys()
        for colour, word in named.items():
            block = (cells[colour].max(axis=2) > 100).all()
            right += block if word == "block" else nearest(cells[colour]) == word
            total += 1
    assert right / total > 0.95


def test_entailment_by_eye() -> None:
    corpus = opened("digit_entailment")
    part, wrong = corpus.parts["test"], 0
    for row in range(150):
        cells = seen(corpus.pictures.images[part.pictures[row, 0]])
        (colour,) = (one for one in COLOURS if one in part.texts[row])
        word = next((digit for digit in DIGITS if digit in part.texts[row].split()), None)
        if colour not in cells:
            expected = 2
        elif (cells[colour].max(axis=2) > 100).all():
            expected = 1
        else:
            expected = 0 if word is None or nearest(cells[colour]) == word else 2
        wrong += expected != part.labels[row]
    assert wrong <= 5  # some handwriting is nearest to another digit's


def test_statements_about_two_pictures_by_eye() -> None:
    corpus = opened("digit_nlvr")
    part, wrong = corpus.parts["test"], 0
    for row in range(200):
        pictures = [seen(corpus.pictures.images[picture]) for picture in part.pictures[row]]
        ((colour, word),) = re.findall(NAMED, part.texts[row])
        shown = [colour in cells and (word == "digit" or nearest(cells[colour]) == word) for cells in pictures]
        wrong += (all(shown) if "both" in part.texts[row] else any(shown)) != bool(part.labels[row])
    assert wrong <= 5


def text_prior(task: Any) -> float:
    """Accuracy on the report split of the best answer to each text of the training split."""
    train, report = task.train, task.report
    known: dict[bytes, Any] = defaultdict(lambda: np.zeros(task.info.num_classes))
    one_hot = np.eye(task.info.num_classes)
    for row in range(len(train)):
        known[train.texts[train.text_rows[row, 0]].tobytes()] += (
            one_hot[train.labels[row]] if train.answers is None else train.answers[row]
        )
    logits = np.stack([known[report.texts[report.text_rows[row, 0]].tobytes()] for row in range(len(report))])
    if report.answers is not None:
        return answers.vqa_accuracy(logits, report.answers)
    return float((logits.argmax(axis=1) == report.labels).mean())


@pytest.mark.parametrize("kind", CHANCE)
def test_the_text_alone_is_no_better_than_chance(kind: str) -> None:
    assert text_prior(tasks.load({"kind": kind})) < CHANCE[kind] + 0.05


@pytest.mark.parametrize("kind", ["digit_entailment", "digit_nlvr"])
def test_the_pictures_alone_are_worth_chance(kind: str) -> None:
    """Every picture, or pair, has as many examples of each class: whatever is said of it alone is right as often as not."""
    part = opened(kind).parts["test"]
    of_picture = defaultdict(Counter)
    for shown, label in zip(part.pictures.tolist(), part.labels.tolist(), strict=True):
        of_picture[tuple(shown)][label] += 1
    assert all(len(set(counts.values())) == 1 and len(counts) > 1 for counts in of_picture.values())


def test_vqa_annotators_disagree_and_agree_on_the_truth() -> None:
    task: Any = tasks.load({"kind": "digit_vqa"})
    assert set(task.info.class_names) == {"yes", "no", *COLOURS, *"0123456789"}
    levels = task.train.answers.levels(np.arange(len(task.train)), task.train.labels)
    assert set(levels.tolist()) == {3, 4}
    scores = np.asarray(task.train.answers)
    assert np.unique(scores).tolist() == pytest.approx([0.0, 0.3, 0.6, 0.9, 1.0])
    assert (scores.max(axis=1) >= 0.9).all()
    raw = Counter(answer for given in opened("digit_vqa").parts["train"].answers or () for answer in given)
    assert {"seven", "7", "Yes.", "yes"} <= raw.keys()


def test_captions_name_one_picture() -> None:
    part = opened("digit_retrieval").parts["test"]
    facts = defaultdict(set)
    for text, (picture,) in zip(part.texts, part.pictures.tolist(), strict=True):
        facts[frozenset(re.findall(NAMED, text))].add(picture)
    assert len(facts) == 100
    assert all(len(pictures) == 1 for pictures in facts.values())
