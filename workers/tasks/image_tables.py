"""Labelled images in tables: Parquet files, or Arrow files that Hugging Face ``datasets`` wrote."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from workers.tasks.encoded_images import EncodedSource, check_classes, image_bytes
from workers.tasks.node_cache import file_digest
from workers.tasks.pictures import CUT, REPORT_FRACTION, Content, Labels, cut
from workers.tasks.split_names import (
    TEST,
    TRAIN,
    VALIDATION,
    WORDS,
    Parts,
    Use,
    part_of_word,
    parts_of_files,
    use_of_parts,
)
from workers.tasks.tables import blocks, encoded, features, schema, table_files, texts_of
from workers.tasks.task_info import TaskError

UNLABELLED = -1
"""Label of the images of a test part whose labels nobody published."""

IMAGE, LABEL, LABEL_NAME, SPLIT = "image", "label", "label_name", "split"


def open_parquet(data: Mapping[str, Any]) -> TableSource:
    """Opens the Parquet file, or the folder of them, that a section names."""
    path = Path(data["path"])
    files = [path] if path.is_file() else table_files(path)
    if not files or not files[0].is_file():
        raise TaskError(f"{path}: must be a Parquet file or a folder that holds some")
    return TableSource(path, files)


class Rows(NamedTuple):
    """What a table says of its images.

    Attributes:
        names, parts: of each label and of the part of each image; empty where the table has no such column.
        classes: names of all classes by number, where Hugging Face datasets wrote them.
    """

    labels: Labels
    names: list[str]
    parts: list[str]
    classes: list[str]


class TableSource(EncodedSource):
    """Tables with the columns ``image`` (bytes, or ``{bytes, path}``), ``label``, optional ``split`` and ``label_name``.

    Where ``image`` or ``label`` is missing, the one column counts of which Hugging Face datasets say that it holds images or
    classes. Without ``split``, folders and names of files tell the part, see :mod:`workers.tasks.split_names`; where they say
    nothing, a test part is cut.
    """

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        """Reads labels and parts of ``files``, which ``path`` is or holds."""
        schemas = {file: schema(file) for file in files}
        by_file = _parts_of(path, [file for file in files if SPLIT not in schemas[file].names])
        part_of = {file: part for part, some in by_file.files.items() for file in some}
        self.files = [file for file in files if file in part_of or SPLIT in schemas[file].names]
        self.columns = [_column(file, schemas[file], IMAGE, "Image") for file in self.files]
        found = [_read(file, schemas[file]) for file in self.files]
        self._first_row = np.cumsum([0, *(len(one.labels) for one in found)])
        every = np.concatenate([one.labels for one in found])
        told = [one.parts or [part_of[file]] * len(one.labels) for file, one in zip(self.files, found, strict=True)]
        names = np.asarray([name for some in told for name in some], dtype=object)
        counted = Counter(names.tolist())
        unlabelled = [
            name for name in sorted(counted) if len(counted) > 1 and (every[names == name] == UNLABELLED).all()
        ]
        for name in unlabelled:
            del counted[name]
        rule = "column 'split'" if all(one.parts for one in found) else by_file.rule
        use = use_of_parts(path, {name: self._place(int(np.argmax(names == name))) for name in counted}, rule)
        self.rows = _rows(every, names, use)
        self.labels = {part: every[rows] for part, rows in self.rows.items()}
        check_classes(self.labels, path)
        self.class_names = _class_names(every, found, self.labels["train"])
        told_by = f"parts are told by {rule}" if use.train else CUT
        without = (f"the part {name!r} has no labels and is not used" for name in unlabelled)
        self.notes = (told_by, *without, *_notes(counted, use, len(by_file.left_out)))
        digests = "".join(file_digest(file) for file in self.files)
        self.content = hashlib.sha256((digests + self._told_otherwise(part_of, use)).encode()).hexdigest()[:16]

    def _told_otherwise(self, part_of: Mapping[Path, str], use: Use) -> str:
        """Returns what names the parts beside the content of the files; nothing where their first word does.

        That was all that counted at first, so that results on such data stay those of the same data.
        """
        if not use.train:
            return ""
        beginnings = {TRAIN: (TRAIN,), TEST: (TEST,), VALIDATION: WORDS[VALIDATION]}
        plain = all(file.name.startswith(beginnings.get(part, ())) for file, part in part_of.items())
        if plain and use.train == {TRAIN} and len(use.report) == 1 and use.report <= {TEST, *WORDS[VALIDATION]}:
            return ""
        places = [[index, part_of.get(file, "")] for index, file in enumerate(self.files)]
        return json.dumps([places, sorted(use.train), sorted(use.report)])

    def _place(self, row: int) -> str:
        """Returns how messages name a row of all files."""
        number = int(np.searchsorted(self._first_row, row, side="right")) - 1
        return f"{self.files[number]} row {row - self._first_row[number]}"

    def contents(self, part: str, wanted: NDArray[np.int64]) -> Iterator[tuple[int, Content, str]]:
        """Goes through the files in order, one block in memory at a time."""
        rows = self.rows[part][wanted]
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        for file, column, first, last in zip(
            self.files, self.columns, self._first_row[:-1].tolist(), self._first_row[1:].tolist(), strict=True
        ):
            low, high = np.searchsorted(ordered, (first, last))
            mine = ordered[low:high] - first
            for start, block in blocks(file, [column], mine):
                cells = encoded(block[column])
                for at in range(*np.searchsorted(mine, (start, start + len(block)))):
                    name = f"{file} row {mine[at]}"
                    cell = cells[int(mine[at] - start)].as_py()
                    yield int(order[low + at]), image_bytes(cell, name), name


def _parts_of(path: Path, files: list[Path]) -> Parts:
    if not files or path.is_file():
        return Parts({"": files}, "no name of a part")
    return parts_of_files(path, files)


def _rows(labels: Labels, names: NDArray[Any], use: Use) -> dict[str, NDArray[np.int64]]:
    """Returns the rows of the train and test parts."""
    if not use.train:
        kept, off = cut(labels, REPORT_FRACTION, seed=0)
        return {"train": kept, "test": off}
    return {
        part: np.flatnonzero(np.isin(names.astype(np.str_), list(wanted)))
        for part, wanted in (("train", use.train), ("test", use.report))
    }


def _notes(counted: Mapping[str, int], use: Use, left_out: int) -> Iterator[str]:
    for name in sorted(use.unused):
        meant = part_of_word(name)
        why = " beside a test part" if meant is not None and meant not in (TRAIN, TEST) else ""
        yield f"the part {name!r} is not used{why}: {counted[name]:,} images"
    if left_out:
        yield f"not read: {left_out:,} files of other configurations than the card's default"


# --- columns ----------------------------------------------------------------------------------------------------------


def _column(file: Path, found: Any, wanted: str, feature: str) -> str:
    """Returns the name of the column ``wanted``, or of the only one that is a ``feature`` of Hugging Face datasets."""
    if wanted in found.names:
        return wanted
    others = [name for name, one in features(found).items() if one.get("_type") == feature]
    if len(others) == 1:
        return others[0]
    several = f"; {' and '.join(others)} could be it" if others else ""
    raise TaskError(f"{file}: must have the column {wanted!r}, has {', '.join(found.names)}{several}; rename or add it")


def _read(file: Path, found: Any) -> Rows:
    """Returns what a file says of its rows."""
    import pyarrow as pa  # a tenth of a second, which other data need not wait for
    import pyarrow.compute as pc

    _column(file, found, IMAGE, "Image")
    label = _column(file, found, LABEL, "ClassLabel")
    kind = found.field(label).type
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise TaskError(f"{file}: column {label!r} must hold integers from 0, it holds {kind}; number the classes")
    wanted = [label, *(name for name in (LABEL_NAME, SPLIT) if name in found.names)]
    tables = [block for _, block in blocks(file, wanted)]
    table = pa.concat_tables(tables) if tables else found.empty_table().select(wanted)
    column = table[label]
    if column.null_count == len(column):
        column = pa.chunked_array([pa.array([UNLABELLED] * len(column), pa.int64())])
    elif column.null_count:
        raise TaskError(f"{file}: row {pc.index(pc.is_null(column), True).as_py()} has no label; fill or remove it")
    column = column.cast(pa.uint8()) if pa.types.is_boolean(column.type) else column
    largest = pc.max(column).as_py()
    if largest is not None and largest >= 2**63:
        row = pc.index(column, pa.scalar(largest, column.type)).as_py()
        raise TaskError(
            f"{file}: row {row} has label {largest}; labels must be numbers of classes from 0; correct or remove it"
        )
    numbers = column.cast(pa.int64()).to_numpy()

    def texts(name: str) -> list[str]:
        return texts_of(table[name]) if name in wanted else []

    classes = features(found).get(label, {}).get("names")
    known = list(map(str, classes)) if isinstance(classes, list) else []
    return Rows(np.asarray(numbers, dtype=np.int64), texts(LABEL_NAME), texts(SPLIT), known)


def _class_names(every: Labels, found: list[Rows], training: Labels) -> tuple[str, ...]:
    """Returns names by ``label_name``, else those of Hugging Face datasets, else numbers."""
    names = [name for one in found for name in (one.names or [""] * len(one.labels))]
    named = dict(zip(every[::-1].tolist(), names[::-1], strict=True))
    classes = dict(enumerate(found[0].classes))
    return tuple(
        named.get(label) or classes.get(label) or str(label) for label in range(int(training.max(initial=-1)) + 1)
    )
