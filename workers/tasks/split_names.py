"""Which part of a data set a file belongs to, as the Hugging Face ``datasets`` library tells it; and what parts are called.

The rules, of which the first that fits any file counts for all of them (``datasets`` 5.2, ``data_files.py``):

0. ``dataset_dict.json`` or ``state.json``, which its ``save_to_disk`` writes.
1. ``configs`` in the header of ``README.md`` or in ``.huggingface.yaml``: its patterns.
2. ``data/<part>-00000-of-00001.<ending>``: any name of a part.
3. A folder's name is, or holds as a word, one of :data:`WORDS`. Words end at ``-._``, blanks and digits; case counts.
4. A file's name does.
5. All files are the training part.

To these come folders ``split=<part>``, as partitioned tables have them. Where the library would read a file twice or leave it
out, or where a name is nearly a word of another part, the data is refused here: test images would be trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from workers.tasks.dataset_card import matches, patterns
from workers.tasks.task_info import TaskError

WORDS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Part to the words that mean it."""

TRAIN, VALIDATION, TEST = WORDS

HIDDEN = ("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""Folders that machines leave behind, besides names that begin with ``.`` or ``__``."""

_ENDS = "[-._ 0-9]"
_SHARD = re.compile(r"data/([^/]*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_FOLDER = {part: re.compile(f"(|.*{_ENDS})({'|'.join(words)})(|{_ENDS}.*)", re.DOTALL) for part, words in WORDS.items()}
_FILE = {part: re.compile(f"(|.*{_ENDS})({'|'.join(words)}){_ENDS}.*", re.DOTALL) for part, words in WORDS.items()}
_PARTITION = re.compile(r"split=(.*)", re.DOTALL)
_PART_NAME = re.compile(r"\w+(\.\w+)*")

Names = Sequence[tuple[Path, str]]
"""Files and their paths below the root, with slashes."""


@dataclass(frozen=True)
class Parts:
    """Files by part, and how they were told apart.

    Attributes:
        files: part to its files; the one part ``""`` where nothing says which part a file is of.
        rule: how, in words.
        left_out: files that the card names in no part.
    """

    files: Mapping[str, list[Path]]
    rule: str
    left_out: Sequence[Path] = ()


def is_hidden(name: str) -> bool:
    """Returns whether a folder of this name is not part of the data; of files only a dot hides."""
    return name.startswith((".", "__")) or name in HIDDEN


def part_of_word(name: str) -> str | None:
    """Returns the part that a word of :data:`WORDS` means."""
    return next((part for part, words in WORDS.items() if name in words), None)


def parts_of_files(root: Path, files: Iterable[Path]) -> Parts:
    """Returns which part each of the files below ``root`` is of.

    Raises:
        TaskError: a file is of two parts or of none, or its name is nearly that of a part.
    """
    named = [(file, file.relative_to(root).as_posix()) for file in files]
    found = _saved(root, named) or _by_card(root, named) or _by_shards(named) or _by_partitions(named)
    found = found or _by_words(_FOLDER, named, "names of folders") or _by_words(_FILE, named, "names of files")
    if found is None or set(found.files) == {TRAIN}:
        _check_near(root, named)
    if found is None or len(named) == 1:
        return Parts({"": [file for file, _ in named]}, "no name of a part")
    _check_once(root, named, found)
    return found


# --- the rules --------------------------------------------------------------------------------------------------------


def _saved(root: Path, named: Names) -> Parts | None:
    """Tells parts of what ``save_to_disk`` wrote; other files in the folders are none of it."""
    try:
        if (root / "dataset_dict.json").is_file():
            folders = {part: f"{part}/" for part in _json(root / "dataset_dict.json")["splits"]}
        elif (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
            folders = {"": ""}
        else:
            return None
        listed = {
            part: {folder + one["filename"] for one in _json(root / folder / "state.json")["_data_files"]}
            for part, folder in folders.items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise TaskError(
            f"{root}: must be what save_to_disk wrote, as dataset_dict.json or state.json say: {error!r}; save it again"
        ) from error
    there = {name: file for file, name in named}
    missing = next((name for names in listed.values() for name in sorted(names) if name not in there), None)
    if missing is not None:
        raise TaskError(
            f"{root}: {missing} must be there, state.json names it; copy the whole folder, or save it again"
        )
    found = {part_of_word(part) or part: [there[name] for name in sorted(names)] for part, names in listed.items()}
    read = {file for files in found.values() for file in files}
    return Parts(found, "dataset_dict.json", [file for file, _ in named if file not in read])


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _by_card(root: Path, named: Names) -> Parts | None:
    known = patterns(root)
    if known is None:
        return None
    found = {
        part: [file for file, name in named if any(matches(one, name) for one in given)]
        for part, given in known.items()
    }
    empty = next((part for part, files in found.items() if not files), None)
    if empty is not None:
        raise TaskError(
            f"{root}: the patterns of its configs for the part {empty!r} ({', '.join(known[empty])}) must fit a file, fit "
            "none; complete the folder, or correct README.md"
        )
    read = {file for files in found.values() for file in files}
    return Parts(found, "configs in README.md", [file for file, _ in named if file not in read])


def _by_shards(named: Names) -> Parts | None:
    found: dict[str, list[Path]] = {}
    for file, name in named:
        if match := _SHARD.fullmatch(name):
            found.setdefault(match[1], []).append(file)
    wrong = next((part for part in found if not _PART_NAME.fullmatch(part)), None)
    if wrong is not None:
        raise TaskError(
            f"{found[wrong][0]}: a part's name must be letters, digits and _, is {wrong!r}; rename the file"
        )
    return Parts(found, "names of shards") if found else None


def _by_partitions(named: Names) -> Parts | None:
    """Tells parts by folders like ``split=train``."""
    found: dict[str, list[Path]] = {}
    for file, name in named:
        said = [match[1] for folder in name.split("/")[:-1] if (match := _PARTITION.fullmatch(folder))]
        if said:
            found.setdefault(part_of_word(said[-1]) or said[-1], []).append(file)
    return Parts(found, "folders split=...") if found else None


def _by_words(rules: Mapping[str, re.Pattern[str]], named: Names, rule: str) -> Parts | None:
    def said(name: str) -> list[str]:
        *folders, last = name.split("/")
        return folders if rules is _FOLDER else [last]

    found = {
        part: [file for file, name in named if any(pattern.fullmatch(one) for one in said(name))]
        for part, pattern in rules.items()
    }
    found = {part: files for part, files in found.items() if files}
    return Parts(found, rule) if found else None


# --- what would be read twice, left out or taken for training ---------------------------------------------------------


def _check_once(root: Path, named: Names, found: Parts) -> None:
    seen: dict[Path, list[str]] = {}
    for part, files in found.files.items():
        for file in files:
            seen.setdefault(file, []).append(part)
    for file, name in named:
        parts = seen.get(file, [])
        if len(parts) > 1:
            raise TaskError(
                f"{root}: {name} must be of one part, is of {' and '.join(parts)} by {found.rule}; rename it or its folder"
            )
        if not parts and file not in found.left_out:
            others = ", ".join(f"{part} {len(files)} files" for part, files in found.files.items())
            raise TaskError(
                f"{root}: {name} must be of a part, as other files are by {found.rule} ({others}); name it or its folder after "
                "its part, or move it away"
            )


def _check_near(root: Path, named: Names) -> None:
    """Refuses files of no part some of which are called after training and some after another part: ``trainA``, ``testA``."""
    near: dict[bool, str] = {}
    for _, name in named if len(named) > 1 else ():
        text = name.lower()
        other = any(word in text for word in _NEAR) or not {"dev", "val"}.isdisjoint(re.split(r"[^a-z]+", text))
        if (TRAIN in text) != other:
            near.setdefault(other, name)
    if len(near) > 1:
        raise TaskError(
            f"{root}: names of files must tell the parts of the data apart or say nothing of them, {near[False]} and {near[True]} do "
            "neither; write train, validation and test as words of their own and in small letters: train-0.parquet, or "
            "train/0.parquet"
        )


_NEAR = ("test", "valid", "eval", "holdout")


# --- what the parts are for -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """What names of parts are for.

    Attributes:
        train, report: names whose images are trained on (a search split is cut from them), and reported on; of those two none
            where nothing tells parts apart: a report split is cut then.
        unused: names whose images are not used.
    """

    train: frozenset[str]
    report: frozenset[str]
    unused: frozenset[str] = frozenset()


def use_of_parts(where: object, names: Mapping[str, object], told_by: str, more: Sequence[str] = ()) -> Use:
    """Returns what each name of a part is for; the empty name is that of what has none.

    Args:
        where: the data, for messages.
        names: each name, and where the first image of it stands.
        told_by: what holds the names, for messages.
        more: further names of a test part.

    Raises:
        TaskError: there is no training part or no test part, or a name means nothing and looks like one that does.
    """
    found = set(names)
    if found <= {"", *WORDS[TRAIN]}:
        return Use(frozenset(), frozenset())
    meant = {name: TEST if name in more else part_of_word(name) for name in found}
    for name in sorted(found):
        near = get_close_matches(name.strip().lower(), [word for words in WORDS.values() for word in words], 1, 0.8)
        numbered = part_of_word(name.rstrip("0123456789")) is not None
        if name and meant[name] is None and near and not numbered:
            raise TaskError(
                f"{names[name]}: the part {name!r} must be written {near[0]!r}, or less like it where it is another; correct "
                f"{told_by}"
            )
    by_part = {part: frozenset(name for name in found if meant[name] == part) for part in WORDS}
    report = by_part[TEST] or by_part[VALIDATION]
    if not by_part[TRAIN] or not report:
        raise TaskError(
            f"{where}: {told_by} must hold 'train' and one of {', '.join((*WORDS[TEST], *WORDS[VALIDATION]))}; it holds "
            f"{', '.join(sorted(name or 'nothing' for name in found))}"
        )
    if "" in found:
        raise TaskError(
            f"{names['']}: {told_by} must say of every image which part it is of, says nothing of this; fill it, or remove such "
            "images"
        )
    return Use(by_part[TRAIN], report, frozenset(found) - by_part[TRAIN] - report)
