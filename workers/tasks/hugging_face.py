"""Labelled images as Hugging Face ``datasets`` loads them: a folder of its layouts, or the name of a data set of the hub.

A folder holds Parquet files, Arrow files (also what ``save_to_disk`` wrote), or images in folders of their classes, whichever
are most. Which part a file is of: :mod:`workers.tasks.split_names`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks.encoded_images import EncodedSource
from workers.tasks.image_folder import listed, name_as_text
from workers.tasks.image_tables import TableSource
from workers.tasks.kinds import HUB_NAME
from workers.tasks.node_cache import folder_digest
from workers.tasks.pictures import CUT, REPORT_FRACTION, Content, Labels, cut
from workers.tasks.pixels import IMAGE_SUFFIXES
from workers.tasks.split_names import is_hidden, parts_of_files, use_of_parts
from workers.tasks.tables import TABLE_SUFFIXES
from workers.tasks.task_info import TaskError

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files that say of images what their folders do not."""

_BESIDE = (".json", ".md", ".gitattributes", ".gitignore", ".yaml", ".lock", "")
"""Endings of files that lie beside data and hold none."""


def open_dataset(data: Mapping[str, Any]) -> EncodedSource:
    """Opens the folder that a section names, or fetches the data set of the hub of that name.

    Raises:
        TaskError: there is none, or it holds nothing that is read.
    """
    root = _local(str(data["path"]))
    if root.is_file():
        return TableSource(root, [root])
    files = sorted(_visible(root))
    counted = Counter(_form(file) for file in files)
    form = max((*TABLE_SUFFIXES, "images"), key=lambda one: counted[one])  # the first of equal ones
    chosen = [file for file in files if _form(file) == form]
    if not chosen:
        raise TaskError(
            f"{root}: must hold Parquet, Arrow or image files, holds {_others(files, form) or 'none'}; convert them, or unpack "
            "archives"
        )
    source = ImageFiles(root, chosen) if form == "images" else TableSource(root, chosen)
    if others := _others([file for file in files if file not in set(chosen)], form):
        source.notes = (*source.notes, f"not read, most files are {form.removeprefix('.')}: {others}")
    return source


def _local(path: str) -> Path:
    if Path(path).exists() or not (name := HUB_NAME.fullmatch(path)):
        return Path(path)
    from huggingface_hub import snapshot_download  # a second, which other data need not wait for

    endings = [f"*{ending}" for ending in (*TABLE_SUFFIXES, *IMAGE_SUFFIXES)]
    wanted = [*endings, *map(str.upper, endings), "*.json", "README.md", ".huggingface.yaml"]
    try:
        return Path(snapshot_download(name[1], repo_type="dataset", revision=name[2], allow_patterns=wanted))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise TaskError(
            f"data.path {path}: must be a folder, or a data set of the hub that can be fetched: {first}; download it where there is "
            "a network, and name the folder"
        ) from error


def _visible(root: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (Path(place, name) for name in files if not name.startswith("."))


def _form(file: Path) -> str:
    suffix = file.suffix.lower()
    if file.name in _METADATA or file.name.startswith("cache-"):
        return ""
    return "images" if suffix in IMAGE_SUFFIXES else suffix if suffix in TABLE_SUFFIXES else ""


def _others(files: Sequence[Path], form: str) -> str:
    return listed(Counter(file.suffix.lower() for file in files if file.suffix.lower() not in _BESIDE))


class ImageFiles(EncodedSource):
    """Images below a root, each in the folder of its class, all as deep; parts by names of folders or files."""

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        """Reads names of files.

        Raises:
            TaskError: folders do not tell classes, or a class has no training images.
        """
        metadata = next((file for name in _METADATA for file in sorted(root.rglob(name))), None)
        if metadata is not None:
            raise TaskError(
                f"{metadata}: what images are must be said by their folders, not in a file; put each image into a folder of its class "
                "and remove this file, or convert the data to Parquet"
            )
        below = {file: file.relative_to(root).parts[:-1] for file in files}
        if len(set(map(len, below.values()))) > 1 or min(map(len, below.values())) == 0:
            shallow = min(files, key=lambda file: len(below[file]))
            raise TaskError(
                f"{shallow}: every image must lie in the folder of its class, all as deep below {root}; move it, or leave it out"
            )
        parts = parts_of_files(root, files)
        use = use_of_parts(root, {part: some[0] for part, some in parts.files.items()}, parts.rule)
        named = {part: [(file, name_as_text(below[file][-1])) for file in some] for part, some in parts.files.items()}
        chosen = {
            "train": [one for part, some in named.items() if part in use.train or not use.train for one in some],
            "test": [one for part, some in named.items() if part in use.report for one in some],
        }
        self.class_names = tuple(sorted({name for _, name in chosen["train"]}))
        number = {name: row for row, name in enumerate(self.class_names)}
        unknown = next((file for file, name in chosen["test"] if name not in number), None)
        if unknown is not None:
            raise TaskError(
                f"{unknown.parent}: every class must have training images too; add some, or remove this folder"
            )
        self.files = {part: [file for file, _ in some] for part, some in chosen.items()}
        self.labels: dict[str, Labels] = {
            part: np.asarray([number[name] for _, name in some], dtype=np.int64) for part, some in chosen.items()
        }
        if not use.train:
            kept, off = cut(self.labels["train"], REPORT_FRACTION, seed=0)
            whole, labels = self.files["train"], self.labels["train"]
            self.files = {"train": [whole[i] for i in kept], "test": [whole[i] for i in off]}
            self.labels = {"train": labels[kept], "test": labels[off]}
        self.content = folder_digest(root, [*self.files["train"], *self.files["test"]])
        unused = (f"the part {part!r} is not used: {len(named[part]):,} images" for part in sorted(use.unused))
        self.notes = (f"parts are told by {parts.rule}" if use.train else CUT, *unused)

    def contents(self, part: str, wanted: NDArray[np.int64]) -> Iterator[tuple[int, Content, str]]:
        for position, index in enumerate(wanted.tolist()):
            file = self.files[part][index]
            yield position, file, str(file)
