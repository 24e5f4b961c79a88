"""Vision-language data in tables: Parquet files, or the Arrow files of a Hugging Face ``save_to_disk`` folder.

Columns, the first that is there counts; others are not read:

==========  ==========================================================================================================
what        columns
==========  ==========================================================================================================
picture     ``image``; of nlvr2 ``left_image`` and ``right_image``, or ``image_0`` and ``image_1``: bytes, or {bytes, path}
text        ``sentence``, ``question``, ``hypothesis``, ``statement``, ``caption``, ``captions``, ``text``; in retrieval
            it may be a list of texts
label       ``label``, ``gold_label``: truth values, numbers (names of a Hugging Face ClassLabel count) or names
answers     ``answers`` (texts, or {answer: text}), ``answer``, ``multiple_choice_answer``
same        ``image_id``, ``img_id``, ``filename``: rows with the same value have the same picture; else equal bytes do
group       ``directory``, ``group``: rows with the same value are not divided by the search split; else the picture's
part        ``split``; else file or folder names that begin with train, test, validation ...
==========  ==========================================================================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks.corpus import (
    CLASSES,
    NO_CONSENSUS,
    REPORT_NAMES,
    VALIDATION_NAMES,
    Collected,
    Corpus,
    Part,
    checked_label,
    cut_groups,
    ten_answers,
)
from workers.tasks.encoded_images import file_digest, image_bytes
from workers.tasks.pictures import REPORT_FRACTION, Content
from workers.tasks.task_info import TaskError

TEXT = ("sentence", "question", "hypothesis", "statement", "caption", "captions", "text")
LABEL = ("label", "gold_label")
ANSWERS = ("answers", "answer", "multiple_choice_answer")
SAME = ("image_id", "img_id", "filename")
GROUP = ("directory", "group")
ONE_PICTURE = (("image",),)
TWO_PICTURES = (("left_image", "right_image"), ("image_0", "image_1"))
UNLABELLED = (None, *NO_CONSENSUS)
"""What stands for no label."""


def table_files(path: Path) -> list[Path]:
    """Returns the tables that ``path`` is or holds, Parquet before Arrow; none where it is something else."""
    if path.suffix in (".parquet", ".arrow"):
        return [path]
    for suffix in ("parquet", "arrow"):
        found = sorted(file for file in path.rglob(f"*.{suffix}") if not file.name.startswith("cache-"))
        if found:
            return found
    return []


def read_tables(task: str, path: Path, files: list[Path]) -> Corpus:
    """Reads the data of a task from ``files``, which ``path`` is or holds.

    Raises:
        TaskError: a column is missing, or an example is broken.
    """
    pictures = TablePictures(files, _columns(task, files[0]))
    found: dict[str, Collected] = {}
    for number, file in enumerate(files):
        _read(task, path, number, file, pictures, found)
    parts = _parts(task, path, {name: one for name, one in found.items() if one.texts})
    named = [*map(file_digest, files), *(name for name in parts if name == "validation")]  # which was not read once
    pictures.digest = hashlib.sha256("".join(named).encode()).hexdigest()[:16]
    return Corpus(task, CLASSES[task], pictures.digest, parts, pictures)


class TablePictures:
    """Pictures in cells of tables."""

    channels = 3

    def __init__(self, files: list[Path], columns: Mapping[str, str]) -> None:
        self.files, self.digest = files, ""
        self.columns = [columns[name] for name in ("picture", "second") if name in columns]
        self.cells: list[tuple[int, int, int]] = []  # file, row, column
        self._rows: dict[object, int] = {}

    def row(self, cell: tuple[int, int, int], same: object, value: object, name: str) -> int:
        """Returns the row of a cell's picture; cells with equal ``same``, or else equal bytes, have one."""
        if same is None:
            same = hashlib.sha256(image_bytes(value, name)).digest()
        if same not in self._rows:
            self._rows[same] = len(self.cells)
            self.cells.append(cell)
        return self._rows[same]

    def contents(self, part: str, wanted: NDArray[np.int64]) -> Iterator[tuple[int, Content, str]]:
        """Goes through the files in order, one block of rows in memory at a time."""
        order = sorted(range(len(wanted)), key=lambda position: self.cells[wanted[position]])
        at = 0
        for number, file in enumerate(self.files):
            mine = []
            while at < len(order) and self.cells[wanted[order[at]]][0] == number:
                mine.append(order[at])
                at += 1
            rows = np.asarray([self.cells[wanted[position]][1] for position in mine], dtype=np.int64)
            for first, block in _blocks(file, self.columns, rows):
                low, high = np.searchsorted(rows, (first, first + len(block)))
                for position in mine[low:high]:
                    _, row, column = self.cells[wanted[position]]
                    name = f"{file} row {row}"
                    yield position, image_bytes(block[self.columns[column]][row - first].as_py(), name), name


# --- examples ---------------------------------------------------------------------------------------------------------


def _columns(task: str, file: Path) -> dict[str, str]:
    """Returns which column of the tables holds what."""
    names = _schema(file).names
    options: dict[str, tuple[str, ...]] = {"text": TEXT}
    if task == "vqa":
        options["answers"] = ANSWERS
    elif task != "retrieval":
        options["label"] = LABEL
    found = {}
    for what, known in options.items():
        column = next((one for one in known if one in names), None)
        if column is None:
            raise TaskError(
                f"{file}: must have a column {' or '.join(known)}, has {', '.join(names)}; rename or add it"
            )
        found[what] = column
    pictures = TWO_PICTURES if task == "nlvr2" else ONE_PICTURE
    shown = next((pair for pair in pictures if all(one in names for one in pair)), None)
    if shown is None:
        wanted = " or ".join(" and ".join(pair) for pair in pictures)
        raise TaskError(f"{file}: must have {wanted} for {task}, has {', '.join(names)}; rename or add it")
    found |= dict(zip(("picture", "second"), shown, strict=False))
    extra = {"same": SAME if len(shown) == 1 else (), "group": GROUP, "split": ("split",)}
    return found | {what: one for what, known in extra.items() for one in known[::-1] if one in names}


def _read(task: str, root: Path, number: int, file: Path, pictures: TablePictures, found: dict[str, Collected]) -> None:
    """Adds the examples of a file to the collections of their parts."""
    columns = _columns(task, file)
    names = _class_label_names(file, columns.get("label"))
    hashed = "same" not in columns
    wanted = [one for what, one in columns.items() if hashed or what not in ("picture", "second")]
    by_file = _part_name(file, root)
    shown = [columns[what] for what in ("picture", "second") if what in columns]
    unlabelled: dict[str, str] = {}
    for first, block in _blocks(file, wanted):
        for offset, values in enumerate(block.to_pylist()):
            row = first + offset
            name = f"{file} row {row}"
            part = str(values[columns["split"]]) if "split" in columns else by_file
            into = found.setdefault(part, Collected())
            more = _targets(task, values, columns, names, name)
            if more is None:
                if task != "entailment" or values[columns["label"]] not in NO_CONSENSUS:
                    unlabelled.setdefault(part, name)
                continue
            same = None if hashed else values[columns["same"]]
            rows = tuple(
                pictures.row((number, row, column), same, values.get(one), name) for column, one in enumerate(shown)
            )
            texts = values[columns["text"]]
            group = values[columns["group"]] if "group" in columns else None
            for text in texts if isinstance(texts, list) and texts and task == "retrieval" else [texts]:
                into.add(name, rows, text, group=group, **more)
    for part, name in unlabelled.items():
        if found[part].texts:
            raise TaskError(
                f"{name}: must have {'answers' if task == 'vqa' else 'a label'}, has none; fill or remove it"
            )


def _targets(
    task: str, values: Mapping[str, Any], columns: Mapping[str, str], names: list[str], name: str
) -> dict[str, Any] | None:
    """Returns label or answers of a row, None where it has none."""
    if task == "retrieval":
        return {}
    if task == "vqa":
        given = values[columns["answers"]]
        if given is None or given == []:
            return None
        return {"answers": ten_answers(given if isinstance(given, list) else [given], name)}
    label = values[columns["label"]]
    if label in UNLABELLED:
        return None
    if names and isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        label = names[label]
    return {"label": checked_label(CLASSES[task], label, name)}


def _class_label_names(file: Path, column: str | None) -> list[str]:
    """Returns the names that Hugging Face datasets gave to the numbers of a column, if it did and they are classes."""
    metadata = (_schema(file).metadata or {}).get(b"huggingface")
    if column is None or metadata is None:
        return []
    feature = json.loads(metadata).get("info", {}).get("features", {}).get(column, {})
    names = [str(one).lower() for one in feature.get("names") or ()] if isinstance(feature, dict) else []
    return names if any(set(names) == set(classes) for classes in CLASSES.values()) else []


def _part_name(file: Path, root: Path) -> str:
    """Returns the part that a file's name, or that of a folder of it below the root, begins with."""
    below = file.relative_to(root).parts[::-1] if file != root else (file.name,)
    return next((part for name in below for part in ("train", *REPORT_NAMES) if name.lower().startswith(part)), "")


def _parts(task: str, path: Path, found: dict[str, Collected]) -> dict[str, Part]:
    """Returns the parts; a test part is cut from the training examples where the data names none."""
    for name in found:
        if name not in (meant := ("train", *REPORT_NAMES)) and name.strip().lower() in meant:
            raise TaskError(
                f"{found[name].names[0]}: the part {name!r} must be written {name.strip().lower()!r}; correct the column split"
            )
    if set(found) <= {"", "None", "train"}:
        if not found:
            raise TaskError(f"{path}: must hold examples with labels, it has none")
        whole = Collected()
        for one in found.values():
            for mine, others in zip(vars(whole).values(), vars(one).values(), strict=True):
                mine += others
        part = whole.part()
        return dict(
            zip(("train", "test"), (part[rows] for rows in cut_groups(part.groups, REPORT_FRACTION, 0)), strict=True)
        )
    test = next((name for name in REPORT_NAMES if name in found), None)
    if "train" not in found or test is None:
        raise TaskError(
            f"{path}: must have the part train and one of {', '.join(REPORT_NAMES)} with labels, by a column split or by "
            f"file names; has {', '.join(sorted(found))}"
        )
    parts = {"train": found["train"].part(), "test": found[test].part()}
    own = next((name for name in VALIDATION_NAMES if name in found and name != test), None)
    if own is not None and task == "retrieval":
        parts["validation"] = found[own].part()
    return parts


# --- tables -----------------------------------------------------------------------------------------------------------


def _schema(file: Path) -> Any:
    import pyarrow as pa  # a tenth of a second, which other data need not wait for; so below
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            return pq.read_schema(file)
        with _open_arrow(file) as reader:
            return reader.schema
    except (OSError, pa.ArrowInvalid) as error:
        raise TaskError(f"{file}: must be a Parquet or an Arrow file: {error}; write it again") from error


def _open_arrow(file: Path) -> Any:
    """Opens the streaming format, which ``save_to_disk`` writes, or the file format; both mapped, not read."""
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(pa.memory_map(str(file)))
    except pa.ArrowInvalid:
        return pa.ipc.open_file(pa.memory_map(str(file)))


def _blocks(file: Path, columns: list[str], rows: NDArray[np.int64] | None = None) -> Iterator[tuple[int, Any]]:
    """Yields (row of its first, table) of each block of a file that holds some of the ascending ``rows``, or of all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def asked(start: int, stop: int) -> bool:
        return rows is None or bool(np.diff(np.searchsorted(rows, (start, stop)))[0])

    start = 0
    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as opened:
            for group in range(opened.num_row_groups):
                stop = start + opened.metadata.row_group(group).num_rows
                if asked(start, stop):
                    yield start, opened.read_row_group(group, columns=columns)
                start = stop
        return
    with _open_arrow(file) as reader:
        batches = (
            reader if hasattr(reader, "read_next_batch") else map(reader.get_batch, range(reader.num_record_batches))
        )
        for batch in batches:
            stop = start + len(batch)
            if asked(start, stop):
                yield start, pa.Table.from_batches([batch]).select(columns)
            start = stop
