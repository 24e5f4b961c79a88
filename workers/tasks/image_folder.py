"""Images in folders of their classes, the layout of torchvision's ``ImageFolder`` in a folder for each part."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks.encoded_images import EncodedSource
from workers.tasks.node_cache import folder_digest
from workers.tasks.pictures import CUT, REPORT_FRACTION, Content, Labels, cut
from workers.tasks.pixels import IMAGE_SUFFIXES
from workers.tasks.split_names import TEST, TRAIN, VALIDATION, WORDS, is_hidden, part_of_word
from workers.tasks.task_info import TaskError


def open_folder(data: Mapping[str, Any]) -> FolderSource:
    """Opens the folder that a section names."""
    return FolderSource(Path(data["path"]))


class FolderSource(EncodedSource):
    """``train/`` and ``test/`` or ``val/`` with a subfolder a class; without a test folder one is cut from train.

    Hidden files and folders (see :func:`workers.tasks.split_names.is_hidden`) are none of it, at any depth.
    """

    def __init__(self, root: Path) -> None:
        train, test, unused = _part_folders(root)
        seen = Seen(root)
        folders = {folder.name: folder for folder in seen.folders(train)}
        self.class_names = _texts(train, list(folders))
        self.files: dict[str, list[Path]] = {}
        self.labels: dict[str, Labels] = {}
        self._read("train", list(folders.items()), list(folders), seen)
        if test is not None:
            self._read("test", [(folder.name, folder) for folder in seen.folders(test)], list(folders), seen)
        else:
            kept, off = cut(self.labels["train"], REPORT_FRACTION, seed=0)
            files, labels = self.files["train"], self.labels["train"]
            self.files = {"train": [files[i] for i in kept], "test": [files[i] for i in off]}
            self.labels = {"train": labels[kept], "test": labels[off]}
        self.content = folder_digest(root, [f for part in sorted(self.files) for f in sorted(self.files[part])])
        told_by = () if test is not None else (CUT,)
        self.notes = (*told_by, *(f"folder {folder.name}/ is not used" for folder in unused), *seen.notes())

    def _read(self, part: str, folders: list[tuple[str, Path]], names: list[str], seen: Seen) -> None:
        files: list[Path] = []
        labels: list[int] = []
        for name, folder in folders:
            if name not in names:
                raise TaskError(
                    f"{folder}: every class must have a folder in train/ too; add it there or remove this one"
                )
            before = seen.skipped.copy()
            found = seen.images(folder)
            if not found and part == TRAIN:
                others = listed(seen.skipped - before)
                raise TaskError(
                    f"{folder}: a class must have training images, it has none{f'; not read are {others}' if others else ''}; "
                    f"{'convert them to PNG or JPEG' if others else 'add some'}, or remove the folder"
                )
            files += found
            labels += [names.index(name)] * len(found)
        self.files[part], self.labels[part] = files, np.asarray(labels, dtype=np.int64)

    def contents(self, part: str, wanted: NDArray[np.int64]) -> Iterator[tuple[int, Content, str]]:
        for position, index in enumerate(wanted.tolist()):
            file = self.files[part][index]
            yield position, file, str(file)


class Seen:
    """What a walk through folders found besides images.

    Attributes:
        skipped: ending to number of files that are not read.
        hidden: paths below the root that are ignored.
        loose: folder to number of images in it that are in no class's folder.
        nested: folders below that of a class that hold images of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.skipped: Counter[str] = Counter()
        self.hidden: list[str] = []
        self.loose: Counter[str] = Counter()
        self.nested: set[str] = set()

    def folders(self, folder: Path) -> list[Path]:
        """Returns the folders in a folder, by name."""
        found = []
        for entry in sorted(folder.iterdir()):
            folder_there = entry.is_dir()
            if entry.name.startswith(".") or (folder_there and is_hidden(entry.name)):
                self._hide(entry)
            elif folder_there:
                found.append(entry)
            elif entry.suffix.lower() in IMAGE_SUFFIXES:
                self.loose[str(folder.relative_to(self.root))] += 1
            else:
                self.skipped[entry.suffix.lower()] += 1
        return found

    def images(self, folder: Path) -> list[Path]:
        """Returns the images below a folder, in order of their paths."""
        found = []
        for place, below, files in os.walk(folder):
            hidden = [*filter(is_hidden, below), *(name for name in files if name.startswith("."))]
            for name in hidden:
                self._hide(Path(place, name))
            below[:] = [name for name in below if name not in hidden]
            mine = [Path(place, name) for name in files if name not in hidden]
            images = [file for file in mine if file.suffix.lower() in IMAGE_SUFFIXES]
            self.skipped.update(file.suffix.lower() for file in mine if file.suffix.lower() not in IMAGE_SUFFIXES)
            if images and Path(place) != folder:
                self.nested.add(str(Path(place).relative_to(self.root)))
            found += images
        return sorted(found)

    def notes(self) -> Iterator[str]:
        """Yields a sentence for each kind of file that is not read as someone may think."""
        if self.skipped:
            yield f"not read, their endings are not those of images: {listed(self.skipped)}"
        for folder, count in self.loose.items():
            yield f"not read: {count:,} images in {folder}/ that are in no class's folder"
        if self.hidden:
            yield f"ignored as hidden: {len(self.hidden):,}, {_some(sorted(self.hidden))}"
        if self.nested:
            yield f"folders below those of classes count for the class above them: {_some(sorted(self.nested))}"

    def _hide(self, path: Path) -> None:
        self.hidden.append(str(path.relative_to(self.root)))


def listed(skipped: Counter[str]) -> str:
    """Returns endings of files with their numbers, the most first."""
    return ", ".join(f"{count:,} {ending or 'without an ending'}" for ending, count in skipped.most_common())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _part_folders(root: Path) -> tuple[Path, Path | None, list[Path]]:
    """Returns the folders of the training part, of the test part, and those that are not used."""
    inside = sorted(root.iterdir()) if root.is_dir() else []
    found = [entry for entry in inside if entry.is_dir() and not is_hidden(entry.name)]
    by_part = {part: [one for one in found if part_of_word(one.name) == part] for part in WORDS}
    for part, folders in by_part.items():
        if len(folders) > 1:
            raise TaskError(
                f"{root}: must hold one folder of the part {part}, holds {' and '.join(one.name for one in folders)}; join or "
                "remove one"
            )
    if not by_part[TRAIN]:
        has = ", ".join(f"{one.name}/" for one in found[:5]) or "no folder"
        raise TaskError(
            f"{root}: must hold a folder train/ with a subfolder for every class, holds {has}; move or rename it"
        )
    test = next((folders[0] for part in (TEST, VALIDATION) if (folders := by_part[part])), None)
    other = next((one for one in found if part_of_word(one.name) is None and part_of_word(one.name.lower())), None)
    if test is None and other is not None:
        raise TaskError(f"{root}: the folder {other.name}/ must be written {other.name.lower()}/; rename it")
    used = (by_part[TRAIN][0], test)
    return used[0], test, [one for one in found if one not in used]


def _texts(train: Path, folders: list[str]) -> tuple[str, ...]:
    """Returns names of folders as texts: those whose bytes are no UTF-8 are taken for Latin-1.

    Raises:
        TaskError: two folders would be one class then.
    """
    found: dict[str, str] = {}
    for name in folders:
        text = name_as_text(name)
        if text in found:
            raise TaskError(
                f"{train}: two folders must not have one name, {text!r} is there in two encodings; rename one"
            )
        found[text] = name
    return tuple(found)


def name_as_text(name: str) -> str:
    """Returns a file's name as text that can be written: bytes that are no UTF-8 as Latin-1."""
    try:
        return os.fsencode(name).decode()
    except UnicodeDecodeError:
        return os.fsencode(name).decode("latin-1")
