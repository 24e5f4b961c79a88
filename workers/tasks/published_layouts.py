"""Vision-language data in the files that its authors published: VQAv2, SNLI-VE, NLVR2, NLVR1, Flickr30k.

Annotations and pictures may lie anywhere below the folder: both are found by their file names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks.corpus import CLASSES, NO_CONSENSUS, Collected, Corpus, checked_label, ten_answers
from workers.tasks.example_tables import read_tables
from workers.tasks.kinds import kind_of
from workers.tasks.node_cache import folder_digest
from workers.tasks.pictures import Content
from workers.tasks.pixels import IMAGE_SUFFIXES
from workers.tasks.split_names import is_hidden
from workers.tasks.tables import table_files
from workers.tasks.task_info import TaskError


class FilePictures:
    """Pictures in files below a folder, found by name."""

    def __init__(self, root: Path) -> None:
        self.root, self.digest = root, ""
        self._found: dict[str, list[Path]] = {}
        for file in sorted(root.rglob("*")):
            if file.suffix.lower() in IMAGE_SUFFIXES and not _hidden(file, root):
                self._found.setdefault(file.name, []).append(file)
        self._rows: dict[str, int] = {}
        self.files: list[Path] = []
        self._shown_by: list[str] = []

    def __len__(self) -> int:
        return len(self.files)

    def row(self, name: str, example: str) -> int:
        """Returns the row of the picture in the file ``name``.

        Raises:
            TaskError: it is not there, or there are several of that name.
        """
        if name not in self._rows:
            found = self._found.get(name, [])
            if not found:
                raise TaskError(
                    f"{example}: its picture {name} must lie below {self.root}; unpack the pictures there, or remove the "
                    "example"
                )
            if len(found) > 1:
                places = ", ".join(str(file.relative_to(self.root)) for file in found)
                raise TaskError(
                    f"{example}: its picture {name} must lie once below {self.root}, lies there as {places}; keep one of them"
                )
            self._rows[name] = len(self.files)
            self.files += found
            self._shown_by.append(example)
        return self._rows[name]

    def contents(self, part: str, wanted: NDArray[np.int64]) -> Iterator[tuple[int, Content, str]]:
        """See :class:`workers.tasks.pictures.Pictures`."""
        for position, row in enumerate(wanted.tolist()):
            yield position, self.files[row], f"{self.files[row]} (picture of {self._shown_by[row]})"


KARPATHY = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
"""Words of Karpathy's split to parts; restval are COCO's validation images that are for training."""

Read = tuple[dict[str, Collected], list[Path]]
"""Examples of each part, and the files of annotations that they were read from."""

Layout = Callable[[str, Path, FilePictures], Read]
"""Reads the annotations of a task below a folder."""


def _open(layout: Layout, data: Mapping[str, Any]) -> Corpus:
    """Opens the data of a section: tables where its path is or holds some, else published files.

    Raises:
        TaskError: files are missing, or an example is broken.
    """
    task, path = kind_of(data).task, Path(data["path"])
    tables = table_files(path)
    return read_tables(task, path, tables) if tables else _read_published(layout, task, path)


def _read_published(layout: Layout, task: str, root: Path) -> Corpus:
    if not root.is_dir():
        raise TaskError(f"{root}: must be a folder with the published files, or a Parquet file")
    pictures = FilePictures(root)
    found, annotations = layout(task, root, pictures)
    for part, examples in found.items():
        if not examples.texts:
            raise TaskError(f"{root}: the {part} part must hold examples, it is empty")
    pictures.digest = folder_digest(root, sorted({*annotations, *pictures.files}))
    parts = {part: examples.part() for part, examples in found.items()}
    return Corpus(task, CLASSES[task], pictures.digest, parts, pictures)


# --- one layout each --------------------------------------------------------------------------------------------------


def _vqa(task: str, root: Path, pictures: FilePictures) -> Read:
    """``*train2014_questions.json`` and ``*train2014_annotations.json``, the same of ``val2014``: the report part."""
    found: dict[str, Collected] = {}
    used: list[Path] = []
    for part, year in (("train", "train2014"), ("test", "val2014")):
        questions, annotations = (_one(root, f"*{year}_{what}.json") for what in ("questions", "annotations"))
        used += [questions, annotations]
        answered = dict(_numbered(annotations, "annotations"))
        found[part] = Collected()
        for number, one in _numbered(questions, "questions"):
            name = f"{questions.name} question {number}"
            if number not in answered:
                raise TaskError(f"{name}: must have its answers in {annotations.name}; use files of one release")
            file = f"COCO_{year}_{_number(one, 'image_id', name):012d}.jpg"
            answers = ten_answers(answered[number].get("answers") or [], name)
            found[part].add(name, (pictures.row(file, name),), one.get("question"), answers=answers)
    return found, used


def _numbered(file: Path, key: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields (``question_id``, object) of each entry of a list; no number may come twice."""
    seen: dict[int, str] = {}
    for name, one in _list(file, key):
        number = _number(one, "question_id", name)
        if number in seen:
            raise TaskError(
                f"{name}: question_id must occur once, {number} is that of {seen[number]} too; use the published file"
            )
        seen[number] = name
        yield number, one


def _snli_ve(task: str, root: Path, pictures: FilePictures) -> Read:
    """``snli_ve_train.jsonl`` and ``snli_ve_test.jsonl``, else ``snli_ve_dev.jsonl``; pictures of Flickr30k."""
    files = {"train": _one(root, "snli_ve_train.jsonl"), "test": _one(root, "snli_ve_test.jsonl", "snli_ve_dev.jsonl")}
    found = {part: Collected() for part in files}
    for part, file in files.items():
        for name, one in _lines(file):
            if one.get("gold_label") in NO_CONSENSUS:
                continue
            picture = pictures.row(f"{_key(one, 'Flickr30K_ID', name)}.jpg", name)
            label = checked_label(CLASSES[task], one.get("gold_label"), name)
            found[part].add(name, (picture,), one.get("sentence2"), label=label)
    return found, list(files.values())


def _nlvr(task: str, root: Path, pictures: FilePictures) -> Read:
    """``train.json`` and ``test1.json``, ``test.json`` or ``dev.json``, a JSON object a line.

    Pictures of NLVR2 are ``<identifier without its last number>-img0.png`` and ``-img1.png``; of NLVR1 the first of six
    arrangements, ``<part>-<identifier>-0.png``.
    """
    tests = ("test1.json", "test.json", "dev.json")
    files = {"train": _one(root, "train.json"), "test": _one(root, *tests)}
    found = {part: Collected() for part in files}
    for part, file in files.items():
        for name, one in _lines(file):
            identifier = str(_key(one, "identifier", name))
            pair = identifier.rsplit("-", 1)[0]
            one_picture = (f"{file.stem}-{identifier}-0.png",)
            shown = (f"{pair}-img0.png", f"{pair}-img1.png") if task == "nlvr2" else one_picture
            label = checked_label(CLASSES[task], one.get("label"), name)
            rows = tuple(pictures.row(picture, name) for picture in shown)
            found[part].add(name, rows, one.get("sentence"), label=label, group=one.get("directory"))
    return found, list(files.values())


def _captions(task: str, root: Path, pictures: FilePictures) -> Read:
    """Karpathy's ``dataset_flickr30k.json``, or that of another data set: ``split`` and ``sentences`` of every image."""
    file = _one(root, "dataset_flickr30k.json", "dataset_*.json")
    found = {"train": Collected(), "test": Collected(), "validation": Collected()}
    for place, one in _list(file, "images"):
        picture = str(_key(one, "filename", place))
        name = f"{file.name} image {picture}"
        split = one.get("split")
        if not isinstance(split, str) or split not in KARPATHY:
            raise TaskError(
                f"{name}: split must be one of {', '.join(KARPATHY)}, got {split!r}; correct or remove the image"
            )
        sentences = one.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            raise TaskError(
                f"{name}: must have a list of sentences with its picture, has none; add it or remove the image"
            )
        row = pictures.row(picture, name)
        for number, sentence in enumerate(sentences):
            said = f"{name} sentence {number}"
            found[KARPATHY[split]].add(said, (row,), _object(sentence, said).get("raw"))
    return {part: one for part, one in found.items() if one.texts or part != "validation"}, [file]


open_vqa = partial(_open, _vqa)
open_snli_ve = partial(_open, _snli_ve)
open_nlvr = partial(_open, _nlvr)
open_captions = partial(_open, _captions)

# --- files ------------------------------------------------------------------------------------------------------------


def _hidden(file: Path, root: Path) -> bool:
    *folders, name = file.relative_to(root).parts
    return name.startswith(".") or any(map(is_hidden, folders))


def _one(root: Path, *patterns: str) -> Path:
    """Returns the file of the first pattern that fits any, the one nearest to the root."""
    for pattern in patterns:
        there = (file for file in root.rglob(pattern) if not _hidden(file, root))
        found = sorted(there, key=lambda file: (len(file.parts), str(file)))
        if found:
            return found[0]
    raise TaskError(f"{root}: must hold {' or '.join(patterns)} in some folder; unpack the published files there")


def _list(file: Path, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (name for messages, object) of each entry of a list."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))[key]
        if not isinstance(found, list):
            raise TypeError(f"it is {type(found).__name__}")
    except (ValueError, KeyError, TypeError) as error:
        raise TaskError(
            f"{file}: must be a JSON object with a list {key!r}: {error}; use the published file"
        ) from error
    for index, one in enumerate(found):
        name = f"{file.name} {key}[{index}]"
        yield name, _object(one, name)


def _lines(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (name for messages, object) of each line that is not blank."""
    with file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            if not line.strip():
                continue
            name = f"{file} line {number}"
            try:
                found = json.loads(line)
            except ValueError as error:
                raise TaskError(f"{name}: must be a JSON object: {error}; correct or remove the line") from error
            yield name, _object(found, name)


def _object(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TaskError(f"{name}: must be a JSON object, is {type(value).__name__}; correct or remove it")
    return value


def _key(values: Mapping[str, Any], key: str, name: object) -> Any:
    if values.get(key) is None:
        raise TaskError(f"{name}: must have the key {key!r}, has {', '.join(values) or 'none'}; complete or remove it")
    return values[key]


def _number(values: Mapping[str, Any], key: str, name: str) -> int:
    found = _key(values, key, name)
    if isinstance(found, int) and not isinstance(found, bool):
        return found
    if isinstance(found, str) and found.isdecimal():
        return int(found)
    raise TaskError(f"{name}: {key} must be a whole number, got {found!r}; correct or remove it")
