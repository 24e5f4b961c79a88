"""Encoded images in folders and Parquet files: their labels, their bytes, and how one is decoded."""

from __future__ import annotations

import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from workers.node.private_folder import private_folder
from workers.tasks.pictures import REPORT_FRACTION, Content, Images, Labels, cut
from workers.tasks.task_info import TaskError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

TEST_NAMES = ("test", "validation", "valid", "val", "dev")
"""Names of a test part, the first present wins: a data set with both keeps its test part for the report."""


def decode(content: Content, name: str, channels: int | None) -> Images:
    """Decodes an image to (H, W, C) uint8; ``channels`` 1 or 3, None takes 1 for grey images and 3 for all others.

    An array is an image already and returned as it is.

    Raises:
        TaskError: it cannot be decoded.
    """
    if isinstance(content, np.ndarray):
        return content
    try:
        with PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            grey = channels == 1 or (channels is None and image.mode in ("1", "L"))
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise TaskError(f"{name}: must be a PNG or JPEG image: {error}; replace or remove it") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def resize(image: Images, size: int) -> Images:
    """Resizes the shorter side to ``size`` (bilinear) and crops the middle: (H, W, C) to (size, size, C)."""
    height, width, _ = image.shape
    scale = size / min(height, width)
    return _scaled(image, (max(size, round(width * scale)), max(size, round(height * scale))), size)


def squash(image: Images, size: int) -> Images:
    """Resizes both sides to ``size`` (bilinear), whatever the aspect was: (H, W, C) to (size, size, C)."""
    return _scaled(image, (size, size), size)


def _scaled(image: Images, to: tuple[int, int], size: int) -> Images:
    """Resizes to (width, height) and crops the middle."""
    height, width, channels = image.shape
    if height == width == size:
        return image
    left, top = (to[0] - size) // 2, (to[1] - size) // 2

    def one(pixels: PIL.Image.Image) -> Images:
        return np.asarray(pixels.resize(to, PIL.Image.Resampling.BILINEAR).crop((left, top, left + size, top + size)))

    if image.dtype == np.uint8 and channels == 3:
        return one(PIL.Image.fromarray(image))
    return np.stack([one(PIL.Image.fromarray(image[..., c])) for c in range(channels)], axis=-1)


def threads() -> int:
    """Returns how many threads read and decode files at once: as many as this process has cores, at most 32."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(32, cores)


class EncodedSource(ABC):
    """What folders and Parquet files have in common: see :class:`workers.tasks.pictures.Source`."""

    digest: str
    labels: dict[str, Labels]
    class_names: tuple[str, ...]
    _channels: int | None = None

    @abstractmethod
    def contents(self, part: str, wanted: NDArray[np.int64]) -> Iterator[tuple[int, Content, str]]:
        """Yields (position in ``wanted``, an encoded image or its file, name for messages) in any order."""

    @property
    def channels(self) -> int:
        """1 where the first training image is grey, else 3; all others are converted to that."""
        if self._channels is None:
            _, content, name = next(self.contents("train", np.zeros(1, dtype=np.int64)))
            self._channels = decode(content, name, None).shape[-1]
        return self._channels


def open_folder(data: Mapping[str, Any]) -> FolderSource:
    """Opens the folder that a section names."""
    return FolderSource(Path(data["path"]))


def open_parquet(data: Mapping[str, Any]) -> ParquetSource:
    """Opens the Parquet file, or the folder of them, that a section names."""
    return ParquetSource(Path(data["path"]))


class FolderSource(EncodedSource):
    """``train/`` and ``test/`` or ``val/`` with a subfolder a class; without a test folder one is cut from train."""

    def __init__(self, root: Path) -> None:
        train = root / "train"
        if not train.is_dir():
            raise TaskError(f"{root}: must hold a folder train/ with a subfolder for every class")
        self.class_names = tuple(sorted(e.name for e in train.iterdir() if e.is_dir()))
        self.files: dict[str, list[Path]] = {}
        self.labels: dict[str, Labels] = {}
        self._read("train", train)
        test = next((root / name for name in TEST_NAMES if (root / name).is_dir()), None)
        if test is not None:
            self._read("test", test)
        else:
            kept, off = cut(self.labels["train"], REPORT_FRACTION, seed=0)
            files, labels = self.files["train"], self.labels["train"]
            self.files = {"train": [files[i] for i in kept], "test": [files[i] for i in off]}
            self.labels = {"train": labels[kept], "test": labels[off]}
        self.digest = folder_digest(root, [f for part in sorted(self.files) for f in sorted(self.files[part])])

    def _read(self, part: str, folder: Path) -> None:
        files: list[Path] = []
        labels: list[int] = []
        for sub in sorted(e for e in folder.iterdir() if e.is_dir()):
            if sub.name not in self.class_names:
                raise TaskError(f"{sub}: every class must have a folder in train/ too; add it there or remove this one")
            found = sorted(f for f in sub.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
            files += found
            labels += [self.class_names.index(sub.name)] * len(found)
        self.files[part], self.labels[part] = files, np.asarray(labels, dtype=np.int64)

    def contents(self, part: str, wanted: NDArray[np.int64]) -> Iterator[tuple[int, Content, str]]:
        for position, index in enumerate(wanted.tolist()):
            file = self.files[part][index]
            yield position, file, str(file)


class ParquetSource(EncodedSource):
    """A Parquet file or a folder of them.

    Columns: ``image`` (bytes, or ``{bytes, path}``), ``label``, optional ``split`` and ``label_name``. Without ``split``
    file names tell the part (``train-00000.parquet``, ``test-...``); where they do not, a test part is cut.
    """

    def __init__(self, path: Path) -> None:
        self.files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not self.files or not self.files[0].is_file():
            raise TaskError(f"{path}: must be a Parquet file or a folder that holds some")
        labels, names, parts = zip(*(self._columns(f) for f in self.files), strict=True)
        self._first_row = np.cumsum([0, *(len(one) for one in labels)])
        every = np.concatenate(labels)
        self.rows = _parts(every, np.concatenate(parts), path)
        self.labels = {part: every[rows] for part, rows in self.rows.items()}
        self.class_names = _class_names(every, np.concatenate(names), int(self.labels["train"].max(initial=-1)) + 1)
        self.digest = hashlib.sha256("".join(file_digest(f) for f in self.files).encode()).hexdigest()[:16]

    def _columns(self, file: Path) -> tuple[Labels, NDArray[np.str_], NDArray[np.str_]]:
        """Returns (labels, label names, part names) of one file's rows; empty texts where a column is missing."""
        import pyarrow as pa  # a tenth of a second, which other data need not wait for
        import pyarrow.parquet as pq

        try:
            schema = pq.read_schema(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise TaskError(f"{file}: must be a Parquet file: {error}") from error
        for column in ("image", "label"):
            if column not in schema.names:
                raise TaskError(
                    f"{file}: must have the column {column!r}, has {', '.join(schema.names)}; rename or add it"
                )
        kind = schema.field("label").type
        if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
            raise TaskError(f"{file}: column 'label' must hold integers from 0, it holds {kind}; number the classes")
        table = pq.read_table(file, columns=[c for c in ("label", "label_name", "split") if c in schema.names])
        column = table["label"].to_pylist()
        if None in column:
            raise TaskError(f"{file}: row {column.index(None)} has no label; fill or remove it")
        by_file = next((n for n in ("train", *TEST_NAMES) if file.name.startswith(n)), "")

        def texts(name: str, missing: str) -> NDArray[np.str_]:
            values = table[name].to_pylist() if name in table.column_names else [missing] * len(column)
            return np.asarray([str(v) for v in values], dtype=np.str_)

        return np.asarray(column, dtype=np.int64), texts("label_name", ""), texts("split", by_file)

    def contents(self, part: str, wanted: NDArray[np.int64]) -> Iterator[tuple[int, Content, str]]:
        """Goes through the files in order, one row group in memory at a time."""
        import pyarrow.parquet as pq  # as above

        rows = self.rows[part][wanted]
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        for file, first in zip(self.files, self._first_row[:-1].tolist(), strict=True):
            start = first
            with pq.ParquetFile(file) as opened:
                for group in range(opened.num_row_groups):
                    stop = start + opened.metadata.row_group(group).num_rows
                    low, high = np.searchsorted(ordered, (start, stop))
                    if low < high:
                        column = opened.read_row_group(group, columns=["image"])["image"]
                        for at in range(low, high):
                            name = f"{file} row {ordered[at] - first}"
                            yield int(order[at]), image_bytes(column[int(ordered[at] - start)].as_py(), name), name
                    start = stop


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


def _parts(labels: Labels, names: NDArray[np.str_], path: Path) -> dict[str, NDArray[np.int64]]:
    """Returns the rows of the train and test parts."""
    found = set(np.unique(names).tolist())
    if found <= {"", "None", "train"}:
        kept, off = cut(labels, REPORT_FRACTION, seed=0)
        return {"train": kept, "test": off}
    test = next((n for n in TEST_NAMES if n in found), None)
    if "train" not in found or test is None:
        raise TaskError(
            f"{path}: column 'split' must hold 'train' and one of {', '.join(TEST_NAMES)}; "
            f"it holds {', '.join(sorted(found))}"
        )
    return {"train": np.flatnonzero(names == "train"), "test": np.flatnonzero(names == test)}


def _class_names(labels: Labels, names: NDArray[np.str_], classes: int) -> tuple[str, ...]:
    first = dict(zip(labels[::-1].tolist(), names[::-1].tolist(), strict=True))
    return tuple(first.get(label) or str(label) for label in range(classes))


def file_digest(file: Path) -> str:
    """Returns the SHA-256 of a file, remembered in the node's cache by path, size and modification time."""
    return _remembered([_stamp(file, file.resolve())], lambda: _sha256(file))


def folder_digest(root: Path, files: list[Path]) -> str:
    """Returns 16 digits that name the files' content and places below ``root``; read once as long as none is touched."""

    def read() -> str:
        with ThreadPoolExecutor(threads()) as pool:
            content = pool.map(_sha256, files)
            listing = [[str(f.relative_to(root)), digest] for f, digest in zip(files, content, strict=True)]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]

    return _remembered([str(root.resolve()), *(_stamp(f, f.relative_to(root)) for f in files)], read)


def _stamp(file: Path, name: Path) -> str:
    found = file.stat()
    return f"{name} {found.st_size} {found.st_mtime_ns}"


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise TaskError(f"{file}: must be readable: {error.strerror or error}") from error


def _remembered(stamps: Iterable[str], calculate: Callable[[], str]) -> str:
    """Returns what was calculated for these stamps before, on this node, or calculates it."""
    key = hashlib.sha256()
    for stamp in stamps:
        key.update(f"{stamp}\n".encode())
    note = cache_folder() / f"{key.hexdigest()[:32]}.sha256"
    if note.is_file():
        return note.read_text()
    value = calculate()
    write_atomic(note, lambda temporary: temporary.write_text(value))
    return value


def cache_folder() -> Path:
    """The node-local folder of decoded images: ``VITPARETO_CACHE``, or a private one in the temporary folder."""
    return private_folder("cache", "VITPARETO_CACHE")


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
