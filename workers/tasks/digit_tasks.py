"""Four vision-language tasks from real digit images: they need no network, no files, and half a second.

A picture is a grid of 4 x 4 cells of 8 x 8 pixels over a noisy ground; some cells show one of scikit-learn's handwritten
digits in one of four colours. No colour and no digit is twice in a picture. The handwriting of the test pictures is in no
training picture; that of the training pictures comes in groups which share none either, so that the search split, cut by
groups, sees new handwriting too.

What is true of a picture is balanced against what is not, picture by picture and text by text: neither the text alone
nor the picture alone tells more than chance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks.corpus import CLASSES, ENTAILMENT, ArrayPictures, Corpus, Part
from workers.tasks.image_sources import digits
from workers.tasks.kinds import kind_of

CELL, GRID = 8, 4
SIDE = CELL * GRID
COLOURS = {"red": (255, 60, 60), "green": (60, 230, 60), "blue": (80, 120, 255), "yellow": (240, 230, 50)}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GROUND = 12
"""Largest value of the noise behind the digits."""

GROUPS = 20
"""Groups of handwriting among the training digits."""

SCENES = {"train": 1600, "test": 300}
"""Pictures of a part; retrieval's test has fewer, since every text is scored against every picture."""

RETRIEVAL_SCENES = {"train": 800, "test": 100}
_PARTS = {"train": 0, "test": 1}


@dataclass(frozen=True)
class Scene:
    """What a picture shows: the digit of each colour, those that are covered by a block of their colour, and its cells."""

    digit_of: dict[str, int]
    covered: frozenset[str]
    cells: tuple[int, ...]
    group: int

    @property
    def colour_of(self) -> dict[int, str]:
        return {digit: colour for colour, digit in self.digit_of.items() if colour not in self.covered}


@dataclass
class _Writer:
    """Draws scenes and collects examples of one part."""

    part: str
    random: np.random.Generator
    names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    pictures: list[list[int]] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    answers: list[list[str]] = field(default_factory=list)
    scenes: list[Scene] = field(default_factory=list)

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.random.integers(len(options)))]

    def other(self, digit: int) -> int:
        """Draws one of the other nine digits."""
        return (digit + int(self.random.integers(1, 10))) % 10

    def scene(self, count: int, *, group: int, covered: int = 0, colours: Sequence[str] | None = None) -> int:
        """Draws a scene of ``count`` digits in these colours, or any, and returns its row."""
        colours = colours or self.random.permutation(list(COLOURS))[:count].tolist()
        chosen = self.random.permutation(10)[:count].tolist()
        cells = self.random.permutation(GRID * GRID)[:count].tolist()
        hidden = frozenset(colours[:covered])
        self.scenes.append(Scene(dict(zip(colours, chosen, strict=True)), hidden, tuple(cells), group))
        return len(self.scenes) - 1

    def example(self, rows: list[int], text: str, label: int = 0, answers: list[str] | None = None) -> None:
        self.names.append(f"{self.part} example {len(self.names)}")
        self.texts.append(text)
        self.labels.append(label)
        self.pictures.append(rows)
        self.groups.append(self.scenes[rows[0]].group)
        if answers is not None:
            self.answers.append(answers)

    def draw(self) -> NDArray[np.uint8]:
        """Returns the pictures (M, 32, 32, 3); the root of the ink makes thin strokes as coloured as thick ones."""
        source = digits()
        images, labels = np.sqrt(source.arrays[self.part][..., 0] / 16.0), source.labels[self.part]
        of_digit = [np.flatnonzero(labels == digit) for digit in range(10)]
        out = self.random.integers(0, GROUND, (len(self.scenes), SIDE, SIDE, 3), dtype=np.uint8)
        for picture, scene in zip(out, self.scenes, strict=True):
            for cell, (colour, digit) in zip(scene.cells, scene.digit_of.items(), strict=True):
                known = of_digit[digit][scene.group :: GROUPS] if self.part == "train" else of_digit[digit]
                glyph = images[known[int(self.random.integers(len(known)))]]
                top, left = CELL * (cell // GRID), CELL * (cell % GRID)
                patch = picture[top : top + CELL, left : left + CELL]
                ink = np.full_like(glyph, 0.6) if colour in scene.covered else glyph
                patch[:] = np.maximum(patch, ink[..., None] * np.array(COLOURS[colour]))
        return out

    def groups_of(self, scenes: int) -> Iterator[int]:
        """Yields a group for each of ``scenes`` rounds, all equally often."""
        yield from (at % GROUPS for at in range(scenes))


# --- questions --------------------------------------------------------------------------------------------------------


def _vqa(writer: _Writer) -> None:
    for group in writer.groups_of(SCENES[writer.part]):
        count = int(writer.random.integers(2, 5))
        row = writer.scene(count, group=group)
        scene = writer.scenes[row]
        colour = writer.pick(list(scene.digit_of))
        other = writer.pick(list(scene.digit_of))
        present = bool(writer.random.integers(2))
        absent = [digit for digit in range(10) if digit not in scene.colour_of]
        asked = scene.digit_of[colour] if present else absent[int(writer.random.integers(len(absent)))]
        number = str(scene.digit_of[other])
        questions = [
            (f"what digit is {other} ?", number, [str(digit) for digit in range(10)]),
            (f"is there {_a(asked)} ?", "yes" if present else "no", ["yes", "no"]),
            (f"what color is the {DIGITS[scene.digit_of[colour]]} ?", colour, list(COLOURS)),
            ("how many digits are there ?", str(count), ["2", "3", "4"]),
        ]
        for text, truth, options in [questions[0], questions[1], questions[int(writer.random.integers(2, 4))]]:
            writer.example([row], text, answers=_annotators(writer, truth, options))


def _annotators(writer: _Writer, truth: str, options: list[str]) -> list[str]:
    """Returns ten answers; some annotators disagree, never as many of them on one answer as give the true one.

    As in VQA the same answer comes in several spellings, which are one when normalised.
    """
    wrong = [option for option in options if option != truth]
    most = min(7, 2 * len(wrong))
    unsure = int(writer.random.integers(0, most + 1)) if writer.random.random() < 0.4 else 0
    given = [wrong[at % len(wrong)] for at in range(unsure)] + [truth] * (10 - unsure)
    return [_spelt(writer, answer) for answer in given]


def _spelt(writer: _Writer, answer: str) -> str:
    if writer.random.random() < 0.8:
        return answer
    return DIGITS[int(answer)] if answer.isdigit() else f"{answer.capitalize()}."


# --- sentences --------------------------------------------------------------------------------------------------------


def _entailment(writer: _Writer) -> None:
    """A covered digit, two that can be seen, a colour that is not there; one sentence of each class about one of them."""
    for group in writer.groups_of(SCENES[writer.part]):
        row = writer.scene(3, group=group, covered=1)
        scene = writer.scenes[row]
        seen = [colour for colour in scene.digit_of if colour not in scene.covered]
        (absent,) = (colour for colour in COLOURS if colour not in scene.digit_of)
        for label, name in enumerate(ENTAILMENT):
            colour = next(iter(scene.covered)) if name == "neutral" else writer.pick(seen)
            if writer.random.random() < 0.5:
                colour = absent if name == "contradiction" else colour
                text = writer.pick([f"there is a {colour} digit .", f"a digit is {colour} ."])
            else:
                digit = scene.digit_of[colour] if name == "entailment" else writer.other(scene.digit_of[colour])
                text = writer.pick([f"the {colour} digit is {_a(digit)} .", f"the digit in {colour} is {_a(digit)} ."])
            writer.example([row], text, label)


def _nlvr(writer: _Writer) -> None:
    """Pictures of two digits each that have one colour in common; of two kinds of statements a true and a false one."""
    for group in writer.groups_of(SCENES[writer.part]):
        both, left, right, absent = writer.random.permutation(list(COLOURS)).tolist()
        rows = [writer.scene(2, group=group, colours=[both, own]) for own in (left, right)]
        in_one = [left, right]
        writer.example(rows, f"both pictures show a {both} digit .", 1)
        writer.example(rows, f"both pictures show a {writer.pick(in_one)} digit .", 0)
        if writer.random.random() < 0.75:
            writer.example(rows, f"one picture shows a {writer.pick(in_one)} digit .", 1)
            writer.example(rows, f"one picture shows a {absent} digit .", 0)
        else:
            side = int(writer.random.integers(2))
            digit = writer.scenes[rows[side]].digit_of[in_one[side]]
            writer.example(rows, f"one picture shows a {in_one[side]} {DIGITS[digit]} .", 1)
            writer.example(rows, f"one picture shows a {in_one[side]} {DIGITS[writer.other(digit)]} .", 0)


def _a(digit: int) -> str:
    return f"{'an' if digit == 8 else 'a'} {DIGITS[digit]}"


def _retrieval(writer: _Writer) -> None:
    """Two digits and a block a picture, no two pictures alike, and three captions that name all in some order."""
    drawn: set[frozenset[str]] = set()
    for group in writer.groups_of(RETRIEVAL_SCENES[writer.part]):
        row = writer.scene(3, group=group, covered=1)
        while (shown := frozenset(_named(writer.scenes[row]))) in drawn:
            writer.scenes.pop()
            row = writer.scene(3, group=group, covered=1)
        drawn.add(shown)
        for joint in (",", "and", "with"):
            first, second, third = writer.random.permutation(_named(writer.scenes[row])).tolist()
            writer.example([row], f"{first} , {second} {joint} {third}")


def _named(scene: Scene) -> list[str]:
    return [
        f"{colour} {'block' if colour in scene.covered else DIGITS[digit]}" for colour, digit in scene.digit_of.items()
    ]


# --- all four ---------------------------------------------------------------------------------------------------------


def _open(write: Callable[[_Writer], None], data: Mapping[str, Any]) -> Corpus:
    """Opens the data of a section whose examples ``write`` writes."""
    kind = kind_of(data)
    return digit_corpus(kind.name, kind.task, write)


open_vqa = partial(_open, _vqa)
open_entailment = partial(_open, _entailment)
open_nlvr = partial(_open, _nlvr)
open_retrieval = partial(_open, _retrieval)


@cache
def digit_corpus(kind: str, task: str, write: Callable[[_Writer], None]) -> Corpus:
    """Returns the data of a kind; always the same."""
    writers = {part: _Writer(part, np.random.default_rng([seed, *kind.encode()])) for part, seed in _PARTS.items()}
    drawn = []
    for writer in writers.values():
        write(writer)
        drawn.append(writer.draw())
    images = np.concatenate(drawn)
    facts = [[w.texts, w.labels, w.pictures, w.answers] for w in writers.values()]
    digest = hashlib.sha256(images.tobytes() + json.dumps([task, facts]).encode()).hexdigest()[:16]
    starts = dict(zip(writers, (0, len(drawn[0])), strict=True))
    parts = {part: _part(writer, starts[part]) for part, writer in writers.items()}
    return Corpus(task, CLASSES[task], digest, parts, ArrayPictures(images, digest))


def _part(writer: _Writer, start: int) -> Part:
    return Part(
        writer.names,
        np.asarray(writer.pictures, dtype=np.int64) + start,
        writer.texts,
        np.asarray(writer.labels, dtype=np.int64),
        np.asarray(writer.groups, dtype=np.int64),
        writer.answers or None,
    )
