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
part        ``split``; else names of files and folders, see :mod:`workers.tasks.split_names`
==========  ==========================================================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks.corpus import (
    CLASSES,
    NO_CONSENSUS,
    REPORT_NAMES,
    Collected,
    Corpus,
    Part,
    checked_label,
    cut_groups,
    ten_answers,
)
from workers.tasks.encoded_images import image_bytes
from workers.tasks.node_cache import file_digest
from workers.tasks.pictures import REPORT_FRACTION, Content
from workers.tasks.split_names import TEST, VALIDATION, Parts, part_of_word, parts_of_files, use_of_parts
from workers.tasks.tables import blocks, encoded, features, rows_of, schema
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


def read_tables(task: str, path: Path, files: list[Path]) -> Corpus:
    """Reads the data of a task from ``files``, which ``path`` is or holds.

    Raises:
        TaskError: a column is missing, or an example is broken.
    """
    told = [file for file in files if "split" not in schema(file).names]
    named = parts_of_files(path, told) if told and path.is_dir() else Parts({"": told}, "no name of a part")
    part_of = {file: part for part, some in named.files.items() for file in some}
    files = [file for file in files if file in part_of or file not in told]
    pictures = TablePictures(files, _columns(task, files[0]))
    found: dict[str, Collected] = {}
    for number, file in enumerate(files):
        _read(task, part_of.get(file, ""), number, file, pictures, found)
    labelled = {name: one for name, one in found.items() if one.texts}
    rule = named.rule if told else "column 'split'"
    parts, notes = _parts(task, path, labelled, rule, found.keys() - labelled.keys())
    digests = [*map(file_digest, files), *(name for name in parts if name == "validation")]  # which was not read once
    if any(part and part != _beginning(file, path) for file, part in part_of.items()):
        digests += [part_of.get(file, "") for file in files]
    pictures.digest = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    if named.left_out:
        notes = (*notes, f"not read: {len(named.left_out):,} files of other configurations than the card's default")
    return Corpus(task, CLASSES[task], pictures.digest, parts, pictures, notes)


class TablePictures:
    """Pictures in cells of tables."""

    def __init__(self, files: list[Path], columns: Mapping[str, str]) -> None:
        self.files, self.digest = files, ""
        self.columns = [columns[name] for name in ("picture", "second") if name in columns]
        self.cells: list[tuple[int, int, int]] = []  # file, row, column
        self._rows: dict[object, int] = {}

    def __len__(self) -> int:
        return len(self.cells)

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
            for first, block in blocks(file, self.columns, rows):
                low, high = np.searchsorted(rows, (first, first + len(block)))
                for position in mine[low:high]:
                    _, row, column = self.cells[wanted[position]]
                    name = f"{file} row {row}"
                    cell = encoded(block[self.columns[column]])[row - first].as_py()
                    yield position, image_bytes(cell, name), name


# --- examples ---------------------------------------------------------------------------------------------------------


def _columns(task: str, file: Path) -> dict[str, str]:
    """Returns which column of the tables holds what."""
    names = schema(file).names
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


def _read(
    task: str, by_file: str, number: int, file: Path, pictures: TablePictures, found: dict[str, Collected]
) -> None:
    """Adds the examples of a file to the collections of their parts."""
    columns = _columns(task, file)
    names = _class_label_names(file, columns.get("label"))
    hashed = "same" not in columns
    wanted = [one for what, one in columns.items() if hashed or what not in ("picture", "second")]
    shown = [columns[what] for what in ("picture", "second") if what in columns]
    unlabelled: dict[str, str] = {}
    for first, block in blocks(file, wanted):
        for offset, values in enumerate(rows_of(file, first, block)):
            row = first + offset
            name = f"{file} row {row}"
            said = values[columns["split"]] if "split" in columns else by_file
            part = "" if said is None else str(said)
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
    names = features(schema(file)).get(column or "", {}).get("names")
    lower = [str(one).lower() for one in names] if isinstance(names, list) else []
    return lower if any(set(lower) == set(classes) for classes in CLASSES.values()) else []


def _beginning(file: Path, root: Path) -> str:
    """Returns the part that the name of a file, or of a folder of it below the root, begins with: how parts were told at first."""
    below = file.relative_to(root).parts[::-1] if file != root else (file.name,)
    word = next((one for name in below for one in ("train", *REPORT_NAMES) if name.lower().startswith(one)), "")
    return part_of_word(word) or word


def _parts(
    task: str, path: Path, found: Mapping[str, Collected], rule: str, unlabelled: Iterable[str]
) -> tuple[dict[str, Part], tuple[str, ...]]:
    """Returns the parts, and what is said of others; a test part is cut from the training examples where the data names none."""
    if not found:
        raise TaskError(f"{path}: must hold examples with labels, it has none")
    tests = () if any(part_of_word(name) == TEST for name in found) else ("test1",)
    use = use_of_parts(path, {name: one.names[0] for name, one in found.items()}, rule, tests)
    notes = [
        f"parts are told by {rule}"
        if use.train
        else "nothing tells a test part: a fifth of the groups is the report split"
    ]
    notes += [f"the part {name!r} has no labels and is not used" for name in sorted(unlabelled)]
    if not use.train:
        part = _joined(found, found)
        kept = zip(("train", "test"), (part[rows] for rows in cut_groups(part.groups, REPORT_FRACTION, 0)), strict=True)
        return dict(kept), tuple(notes)
    parts = {"train": _joined(found, use.train), "test": _joined(found, use.report)}
    own = {name for name in use.unused if part_of_word(name) == VALIDATION}
    if own and task == "retrieval":
        parts["validation"] = _joined(found, own)
    unused = use.unused - (own if "validation" in parts else set())
    notes += [f"the part {name!r} is not used: {len(found[name].texts):,} examples" for name in sorted(unused)]
    return parts, tuple(notes)


def _joined(found: Mapping[str, Collected], names: Iterable[str]) -> Part:
    whole = Collected()
    for name in [name for name in found if name in set(names)]:
        for mine, others in zip(vars(whole).values(), vars(found[name]).values(), strict=True):
            mine += others
    return whole.part()
