"""What is told of images by their headers and bytes, without decoding them: sizes, modes, and what will be done to them.

A node looks once and remembers. From these facts come the number of channels, which images are copies of each other, and
whether images are read otherwise than a plain conversion to eight bits would: then the digest of the data says so, since
trials of the same files that were run before their pixels were read this way are other trials.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from workers.tasks.node_cache import cache_folder, in_threads, locked, write_atomic
from workers.tasks.pictures import Content, Pictures
from workers.tasks.pixels import GREY, SIXTEEN_BITS

VERSION = 1
"""Raised when the same bytes would give other facts. The version of Pillow counts too."""

TURNED, DEEP, FLOAT, FRAMES, ALPHA, BROKEN = 1, 2, 4, 8, 16, 32
"""Flags of an image: its orientation is not upright; 16 bits a pixel, grey; floating-point; several frames; transparency; it
cannot be opened."""

READ_OTHERWISE = TURNED | DEEP | FLOAT
"""Flags of images that a conversion by Pillow's ``convert`` alone would make something else of."""

ORIENTATION = 0x0112
"""Of EXIF."""

_SAYS_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""One of these is in every PNG with EXIF; asking Pillow for it would decode the image."""


@dataclass(frozen=True)
class Facts:
    """Facts about N images.

    Attributes:
        digests: (N, 16) uint8, of the encoded bytes; equal ones are the same image.
        sides: (N, 2) int32, height and width upright; zeros where it cannot be opened.
        modes: (N,) Pillow's names; empty where it cannot be opened.
        flags: (N,) uint8.
    """

    digests: NDArray[np.uint8]
    sides: NDArray[np.int32]
    modes: NDArray[np.str_]
    flags: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.flags)

    def __getitem__(self, rows: NDArray[np.int64]) -> Self:
        """Returns those of these images."""
        return type(self)(self.digests[rows], self.sides[rows], self.modes[rows], self.flags[rows])

    @property
    def grey(self) -> NDArray[np.bool_]:
        """(N,), whether an image has one channel."""
        return np.isin(self.modes, GREY)

    def has(self, flags: int) -> NDArray[np.bool_]:
        """(N,), whether an image has one of the flags."""
        return np.asarray(self.flags & flags, dtype=np.bool_)


def facts_of(source: Pictures, part: str, count: int, digest: str) -> Facts:
    """Returns the facts of the ``count`` images of a part.

    Args:
        digest: names content, order and parts of the images.
    """
    key = hashlib.sha256(f"facts {VERSION} {version('pillow')} {digest} {part} {count}".encode()).hexdigest()[:32]
    note = cache_folder() / f"{key}.facts.npz"

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **vars(look(source, part, count)))

    with locked(key):
        if not note.is_file():
            write_atomic(note, write)
    with np.load(note) as known:
        return Facts(**known)


def look(source: Pictures, part: str, count: int) -> Facts:
    """Returns the facts of a part's images without remembering them: those in memory are known at once."""
    digests = np.zeros((count, 16), dtype=np.uint8)
    sides = np.zeros((count, 2), dtype=np.int32)
    flags = np.zeros(count, dtype=np.uint8)
    modes = [""] * count

    def one(position: int, content: Content, name: str) -> None:
        encoded = content.tobytes() if isinstance(content, np.ndarray) else content
        encoded = encoded.read_bytes() if isinstance(encoded, Path) else encoded
        digests[position] = np.frombuffer(hashlib.sha256(encoded).digest()[:16], dtype=np.uint8)
        if isinstance(content, np.ndarray):
            sides[position], modes[position] = content.shape[:2], "L" if content.shape[-1] == 1 else "RGB"
        else:
            sides[position], modes[position], flags[position] = header(encoded)

    for _ in in_threads(one, source.contents(part, np.arange(count))):
        pass
    return Facts(digests, sides, np.asarray(modes, dtype=np.str_), flags)


def header(encoded: bytes) -> tuple[tuple[int, int], str, int]:
    """Returns (height, width), mode and flags of an encoded image; decodes nothing but a PNG that has EXIF."""
    try:
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            flags, (width, height) = 0, image.size
            if orientation := _orientation(image, encoded):
                flags |= TURNED
            flags |= DEEP * (image.mode in (*SIXTEEN_BITS, "I")) | FLOAT * (image.mode == "F")
            flags |= FRAMES * bool(getattr(image, "is_animated", False))
            flags |= ALPHA * (image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info)
            return ((width, height) if orientation >= 5 else (height, width)), image.mode, flags
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - a damaged file raises anything
        return (0, 0), "", BROKEN


def _orientation(image: PIL.Image.Image, encoded: bytes) -> int:
    """Returns the number of EXIF's orientation where it is not upright, else 0; from 5 on both sides change places.

    TIFF is turned by Pillow itself, whose size is that of the turned image.
    """
    if image.format == "TIFF":
        return 0
    if image.format == "PNG" and not any(mark in encoded for mark in _SAYS_ORIENTATION):
        return 0
    found: Any = image.getexif().get(ORIENTATION, 1)
    return found if isinstance(found, int) and 2 <= found <= 8 else 0


def known_digest(content: str, facts: Sequence[Facts], *, channels_changed: bool = False) -> str:
    """Returns the digest of data: that of its files, unless some of its images are now read as they were not before."""
    if not channels_changed and not any(one.has(READ_OTHERWISE).any() for one in facts):
        return content
    return hashlib.sha256(f"{content} upright, by bit depth, channels of all".encode()).hexdigest()[:16]


def copies(one: Facts, other: Facts) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns rows of ``other`` that are copies of images of ``one``, and a row of ``one`` for each."""

    def keys(facts: Facts) -> NDArray[Any]:
        return np.ascontiguousarray(facts.digests).view("V16").reshape(-1)

    first, second = keys(one).tolist(), keys(other).tolist()
    place = {digest: row for row, digest in reversed(list(enumerate(first)))}
    found = [(row, place[digest]) for row, digest in enumerate(second) if digest in place]
    rows = np.asarray(found, dtype=np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]
