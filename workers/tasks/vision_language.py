"""Vision-language tasks: a corpus tokenised, cut into three splits, its pictures decoded once on each node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workers.tasks import example_index
from workers.tasks.answers import vocabulary_digest
from workers.tasks.corpus import ArrayPictures, Corpus
from workers.tasks.description import DataDescription, describe_corpus
from workers.tasks.example_splits import Splits, cut, split_rows, task_info
from workers.tasks.examples import Examples
from workers.tasks.image_facts import Facts, facts_of, known_digest
from workers.tasks.kinds import TEXT_DEFAULTS
from workers.tasks.node_cache import locked
from workers.tasks.opening import check_digest, given, opened
from workers.tasks.task_info import TaskError, TaskInfo

__all__ = ["VisionLanguageTask", "data_digest", "info", "load"]

DEFAULTS: Mapping[str, Any] = {"search_fraction": 0.2, "split_seed": 0, **TEXT_DEFAULTS}
"""Keys of a data section for these tasks, where it leaves them out."""


@dataclass(frozen=True)
class VisionLanguageTask:
    """The data of a study. ``search`` is what the search sees, ``report`` (the test set) what it never sees.

    Attributes:
        text: how texts become ids: plain values for :func:`workers.tasks.tokenisers.read`, and their limits.
    """

    info: TaskInfo
    train: Examples
    search: Examples
    report: Examples
    text: Mapping[str, Any]

    def preprocessing(self) -> dict[str, Any]:
        """Plain values that a user of the artefact needs to prepare pictures and texts, and to read the logits."""
        return {
            "task": self.info.task,
            "image_size": self.info.image_size,
            "in_chans": self.info.in_chans,
            "resize": "both sides, bilinear",
            "input": "uint8 / 255",
            "mean": list(self.train.mean),
            "std": list(self.train.std),
            "text": dict(self.text),
            "answers" if self.info.task == "vqa" else "classes": list(self.info.class_names),
        }


def load(data: Mapping[str, Any]) -> VisionLanguageTask:
    """Loads the data of a study's data section; see :func:`workers.tasks.load`."""
    data = _settings(data)
    if data.get("digest") and (known := example_index.recall(example_index.key(data, data["digest"]))):
        return _task(data, known)
    corpus = open_corpus(data)
    if isinstance(corpus.pictures, ArrayPictures):
        return _task(data, cut(corpus, data))
    key = example_index.key(data, corpus.digest)
    with locked(key):
        known = example_index.recall(key)
        if known is None:
            known = cut(corpus, data)
            example_index.remember(key, known)
    return _task(data, known)


def info(data: Mapping[str, Any]) -> TaskInfo:
    """Returns the facts about the data; decodes one picture at most."""
    data = _settings(data)
    if data.get("digest") and (known := example_index.recall(example_index.key(data, data["digest"]))):
        return known.info
    return task_info(open_corpus(data), data)


def describe(data: Mapping[str, Any]) -> DataDescription:
    """Returns what a study of this data is trained and judged on; see :func:`workers.tasks.describe`."""
    data = _settings(data)
    corpus = open_corpus(data)
    facts = None if isinstance(corpus.pictures, ArrayPictures) else picture_facts(corpus)
    return describe_corpus(corpus, facts, split_rows(corpus, data), data, task_info(corpus, data))


def data_digest(data: Mapping[str, Any]) -> str:
    """Returns 16 hexadecimal digits that name the content; see :func:`workers.tasks.data_digest`."""
    return open_corpus(data).digest


def open_corpus(data: Mapping[str, Any]) -> Corpus:
    """Opens the data of a section.

    Raises:
        TaskError: it is missing or broken, or its content has another digest than ``data["digest"]``.
    """
    corpus: Corpus = opened(data)
    if not isinstance(corpus.pictures, ArrayPictures):
        corpus = replace(corpus, digest=known_digest(corpus.digest, [picture_facts(corpus)]))
    check_digest(data, corpus.digest)
    return corpus


def picture_facts(corpus: Corpus) -> Facts:
    """Returns the facts about all pictures of a corpus."""
    return facts_of(corpus.pictures, "", len(corpus.pictures), corpus.pictures.digest)


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section with every default, its values checked; a file of answers as its path and digest."""
    found = {**DEFAULTS, **{key: value for key, value in data.items() if value is not None}}
    if isinstance(found["answers"], str):
        found["answers"] = {"path": found["answers"], "digest": vocabulary_digest(Path(found["answers"]))}
    most, size = found["max_text_tokens"], found["answers"]
    rules = {
        "search_fraction": (0 < found["search_fraction"] < 1, "must lie between 0 and 1"),
        "max_text_tokens": (most is None or most > 2, "must be at least 3, two are the text's ends"),
        "answers": (isinstance(size, Mapping) or size > 0, "must be at least 1, or name a file of answers"),
        "candidates": (found["candidates"] > 1, "must be at least 2, the own text and another"),
    }
    broken = [f"data.{name} {rule}, got {found[name]!r}" for name, (holds, rule) in rules.items() if not holds]
    if broken:
        raise TaskError("; ".join(broken))
    return found


def _task(data: Mapping[str, Any], splits: Splits) -> VisionLanguageTask:
    """Puts the section's own mean and deviation in the place of the training pictures' where it gives some."""
    known = {name: given(data, name, splits.info.in_chans) for name in ("mean", "std")}
    values: dict[str, Any] = {name: found for name, found in known.items() if found is not None}
    train, search, report = (replace(splits.examples[name], **values) for name in ("train", "search", "report"))
    return VisionLanguageTask(splits.info, train, search, report, splits.text)
