"""The node's memory of tokenised and cut splits, so that a trial of a known study neither reads nor tokenises its texts.

Arrays lie in ``<key>.<split>.<field>.npy``. They are mapped privately: whoever writes into one changes no file.
``<key>.examples.json`` comes last and names the stored pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks import decoded
from workers.tasks.answers import SoftScores
from workers.tasks.example_splits import Splits
from workers.tasks.examples import Examples
from workers.tasks.kinds import TEXT_DEFAULTS
from workers.tasks.node_cache import cache_folder, write_atomic
from workers.tasks.task_info import TaskInfo
from workers.tasks.tokenisers import folder_fingerprint

VERSION = 2
"""Raised when the same data would become other examples."""

_ARRAYS = ("pictures", "texts", "text_mask", "text_rows", "labels", "picture_of_text")
_SCORES = ("classes", "agreeing")


def key(data: Mapping[str, Any], digest: str) -> str:
    """Returns the key under which the splits of a data section with all defaults in it are remembered."""
    settings = {name: data[name] for name in TEXT_DEFAULTS}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            settings[name] = value["digest"]
    parts = [VERSION, decoded.index_key(data, digest), *settings.values()]
    if isinstance(data["tokenizer"], str):
        parts.append(folder_fingerprint(data["tokenizer"]))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def remember(key: str, splits: Splits) -> None:
    """Writes splits whose pictures are in the node's store."""
    folder = cache_folder()
    index: dict[str, Any] = {"info": asdict(splits.info), "text": dict(splits.text), "splits": {}}
    for name, found in splits.examples.items():
        arrays = {field: getattr(found, field) for field in _ARRAYS}
        if found.answers is not None:
            arrays |= {field: getattr(found.answers, field) for field in _SCORES}
        for field, array in arrays.items():
            if array is not None:
                _write(folder / f"{key}.{name}.{field}.npy", array)
        index["splits"][name] = {
            "fields": [field for field, array in arrays.items() if array is not None],
            "key": splits.keys[name],
            "mean": found.mean,
            "std": found.std,
        }
    write_atomic(folder / f"{key}.examples.json", lambda temporary: temporary.write_text(json.dumps(index)))


def _write(path: Path, array: NDArray[Any]) -> None:
    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, array)

    write_atomic(path, save)


def recall(key: str) -> Splits | None:
    """Returns what :func:`remember` wrote, or None where a part of it is gone."""
    folder = cache_folder()
    try:
        index = json.loads((folder / f"{key}.examples.json").read_text())
        info = TaskInfo.from_dict(index["info"])
        examples = {name: _examples(f"{key}.{name}", found, info) for name, found in index["splits"].items()}
    except FileNotFoundError:
        return None
    return Splits(info, examples, {name: found["key"] for name, found in index["splits"].items()}, index["text"])


def _examples(stem: str, found: Mapping[str, Any], info: TaskInfo) -> Examples:
    folder = cache_folder()
    arrays: dict[str, Any] = {
        field: np.load(folder / f"{stem}.{field}.npy", mmap_mode="c") for field in found["fields"]
    }
    scores = {field: arrays.pop(field) for field in _SCORES if field in arrays}
    fields: dict[str, Any] = {field: arrays.get(field) for field in _ARRAYS}
    return Examples(
        info.task,
        decoded.stored(found["key"]).images,
        **fields,
        answers=SoftScores(**scores, size=info.num_classes) if scores else None,
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
    )
