"""What a study will be trained and judged on, told before anything is: splits, classes, sizes, copies, a decoded sample.

What could not be carried out is a fault here, and not in the middle of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks.corpus import Corpus
from workers.tasks.encoded_images import EncodedSource
from workers.tasks.image_facts import ALPHA, BROKEN, DEEP, FLOAT, FRAMES, TURNED, Facts, copies, look
from workers.tasks.opening import given
from workers.tasks.pictures import Pictures, Source, split_rows
from workers.tasks.pixels import decode
from workers.tasks.task_info import TaskError, TaskInfo, writable

SAMPLE, OF_A_KIND = 24, 4
"""Images that are decoded at random, and of each mode and treatment."""

DARK = 65535 // 8
"""A brightest pixel of 16 bits below which a sample's images are hardly meant to be that dark."""


@dataclass(frozen=True)
class SplitDescription:
    """One split.

    Attributes:
        images: their number; of vision-language data distinct pictures.
        examples: their number; of images alone that of the images.
        classes: name to number of examples, of all classes; none where the task has no classes.
    """

    name: str
    images: int
    examples: int
    classes: Mapping[str, int]


@dataclass(frozen=True)
class DataDescription:
    """What was found out about the data.

    Attributes:
        sizes: (height, width) to number of images, most first.
        modes: Pillow's names of kinds of pixels to number of images, most first.
        notes: what is done to images, and what of the data is not used.
        warnings: what makes results worth less than they seem.
        sample: images that were decoded.
        values: smallest, mean and largest value of the sample's pixels as the model sees them before normalisation.
    """

    splits: tuple[SplitDescription, ...]
    info: TaskInfo
    sizes: Mapping[tuple[int, int], int]
    modes: Mapping[str, int]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    sample: int
    values: tuple[float, float, float]


@dataclass(frozen=True)
class _Split:
    """A split's images: part of the source, rows there, and what is known of them."""

    name: str
    part: str
    rows: NDArray[np.int64]
    facts: Facts


def describe_images(source: Source, data: Mapping[str, Any], info: TaskInfo) -> DataDescription:
    """Describes labelled images.

    Raises:
        TaskError: they cannot be used, or not with these settings.
    """
    known = {
        part: source.facts[part] if isinstance(source, EncodedSource) else look(source, part, len(labels))
        for part, labels in source.labels.items()
    }
    splits = [_Split(name, part, rows, known[part][rows]) for name, (part, rows) in split_rows(source, data).items()]
    described = [
        SplitDescription(one.name, len(one.rows), len(one.rows), _counted(source.labels[one.part][one.rows], info))
        for one in splits
    ]
    notes = getattr(source, "notes", ())
    return _described(source, splits, described, data, info, notes)


def describe_corpus(
    corpus: Corpus,
    facts: Facts | None,
    rows: Mapping[str, tuple[str, NDArray[np.int64]]],
    data: Mapping[str, Any],
    info: TaskInfo,
) -> DataDescription:
    """Describes images with texts.

    Args:
        facts: about all pictures; None where they are in memory.
        rows: split to its part and examples there.

    Raises:
        TaskError: they cannot be used, or not with these settings.
    """
    known = look(corpus.pictures, "", len(corpus.pictures)) if facts is None else facts
    splits, described = [], []
    for name, (part_name, chosen) in rows.items():
        part = corpus.parts[part_name]
        pictures = np.unique(part.pictures[chosen])
        splits.append(_Split(name, "", pictures, known[pictures]))
        classes = _counted(part.labels[chosen], info) if len(corpus.class_names) > 1 else {}
        described.append(SplitDescription(name, len(pictures), len(chosen), classes))
    return _described(corpus.pictures, splits, described, data, info, corpus.notes)


def _described(
    source: Pictures,
    splits: list[_Split],
    described: list[SplitDescription],
    data: Mapping[str, Any],
    info: TaskInfo,
    notes: Iterable[str],
) -> DataDescription:
    for name in ("mean", "std"):
        given(data, name, info.in_chans)
    _check_readable(source, splits)
    if data.get("image_size") is None:
        _check_sizes(source, splits, info.image_size)
    whole = [one.facts for one in splits]
    sides = Counter(tuple(pair) for facts in whole for pair in facts.sides.tolist())
    modes = Counter(mode for facts in whole for mode in facts.modes.tolist())
    decoded, values, dark = _sample(source, splits, info)
    return DataDescription(
        tuple(described),
        info,
        dict(sides.most_common()),
        dict(modes.most_common()),
        tuple(map(writable, (*_treatments(whole, info.in_chans), *notes))),
        tuple(map(writable, (*_copies(source, splits), *_missing(described), *dark))),
        decoded,
        values,
    )


def _counted(labels: NDArray[np.int64], info: TaskInfo) -> dict[str, int]:
    counts = np.bincount(labels, minlength=len(info.class_names)).tolist()
    return dict(zip(info.class_names, counts, strict=True))


# --- what cannot work -------------------------------------------------------------------------------------------------


def _check_readable(source: Pictures, splits: list[_Split]) -> None:
    for one in splits:
        broken = one.rows[one.facts.has(BROKEN)]
        if len(broken):
            name, content = _image(source, one.part, int(broken[0]))
            decode(content, name, None)  # which says what is wrong with it
            raise TaskError(f"{name}: must be a PNG or JPEG image that can be opened; replace or remove it")


def _check_sizes(source: Pictures, splits: list[_Split], size: int) -> None:
    for one in splits:
        other = np.flatnonzero((one.facts.sides != size).any(axis=1))
        if len(other):
            name, _ = _image(source, one.part, int(one.rows[other[0]]))
            height, width = one.facts.sides[other[0]].tolist()
            raise TaskError(
                f"{name}: images must have one size, this is {height}x{width}, the first was {size}x{size}, as "
                f"{len(other):,} of the {one.name} split are not; set data.image_size to resize and crop"
            )


# --- what is said -----------------------------------------------------------------------------------------------------


def _treatments(facts: list[Facts], channels: int) -> Iterator[str]:
    def count(flag: int) -> int:
        return int(sum(one.has(flag).sum() for one in facts))

    grey, images = int(sum(one.grey.sum() for one in facts)), sum(map(len, facts))
    if channels == 3 and grey:
        yield f"{_images(grey, images)} grey: the one channel is repeated"
    if channels == 1 and grey < images:
        yield f"{_images(images - grey, images)} coloured: made grey (ITU-R 601-2 luma), as data.channels or training images are"
    said = {
        TURNED: "turned upright by their EXIF orientation",
        DEEP: "of 16 bits a grey pixel: divided by 257 to 8 bits",
        FLOAT: "of floating-point pixels: multiplied by 255, 1 is white",
        ALPHA: "partly transparent: colours are taken as they are stored",
        FRAMES: "of several frames: the first is taken",
    }
    for flag, treatment in said.items():
        if found := count(flag):
            yield f"{_images(found, images)} {treatment}"


def _images(count: int, of: int) -> str:
    every = "all" if count == of else f"{count:,}"
    return f"{every} image{'s' if of > 1 and count != 1 else ''} {'is' if count == 1 else 'are'}"


def _missing(described: list[SplitDescription]) -> Iterator[str]:
    for one in described:
        without = [name for name, count in one.classes.items() if not count]
        if without:
            some = ", ".join(map(repr, without[:3])) + (" ..." if len(without) > 3 else "")
            yield f"the {one.name} split has no image of {len(without):,} of {len(one.classes):,} classes: {some}"


def _copies(source: Pictures, splits: list[_Split]) -> Iterator[str]:
    for one, other in combinations(splits, 2):
        second, first = copies(one.facts, other.facts)
        if not len(second):
            continue
        kept, _ = _image(source, one.part, int(one.rows[first[0]]))
        double, _ = _image(source, other.part, int(other.rows[second[0]]))
        yield (
            f"{len(second):,} of {len(other.rows):,} images of the {other.name} split are in the {one.name} split too, byte for "
            f"byte: {double} is {kept}"
        )


def _sample(
    source: Pictures, splits: list[_Split], info: TaskInfo
) -> tuple[int, tuple[float, float, float], tuple[str, ...]]:
    """Decodes some images of every sort; returns how many, their values, and what is odd about those of 16 bits."""
    low, high, total, pixels, decoded = np.inf, -np.inf, 0.0, 0, 0
    brightest, deep = 0, 0
    for part in dict.fromkeys(one.part for one in splits):
        for content, name, flags in _chosen(source, part, splits):
            image = decode(content, name, info.in_chans)
            low, high = min(low, float(image.min())), max(high, float(image.max()))
            total, pixels, decoded = total + float(image.sum(dtype=np.float64)), pixels + image.size, decoded + 1
            if flags & DEEP:
                deep, brightest = deep + 1, max(brightest, int(image.max()))
    dark: tuple[str, ...] = ()
    if deep and brightest * 257 < DARK:
        dark = (
            f"16-bit pixels of the {deep} decoded images reach {brightest * 257:,} of 65,535, so that images are nearly black: scale "
            "them to the whole range if that is what is white",
        )
    return decoded, (low, total / pixels, high), dark


def _chosen(source: Pictures, part: str, splits: list[_Split]) -> Iterator[tuple[Any, str, int]]:
    """Yields (content, name, flags) of images of a part: some at random, and some of each mode and treatment."""
    rows = np.concatenate([one.rows for one in splits if one.part == part])
    facts = [one.facts for one in splits if one.part == part]
    flags = np.concatenate([one.flags for one in facts])
    sorts = [*zip(np.concatenate([one.modes for one in facts]).tolist(), flags.tolist(), strict=True)]
    taken: Counter[tuple[str, int]] = Counter()
    chosen = set(np.random.default_rng(0).permutation(len(rows))[:SAMPLE].tolist())
    for position, sort in enumerate(sorts):
        taken[sort] += 1
        if taken[sort] <= OF_A_KIND:
            chosen.add(position)
    positions = sorted(chosen, key=lambda position: rows[position])
    for at, content, name in source.contents(part, rows[positions]):
        yield content, name, int(flags[positions[at]])


def _image(source: Pictures, part: str, row: int) -> tuple[str, Any]:
    _, content, name = next(iter(source.contents(part, np.asarray([row], dtype=np.int64))))
    return name, content
