"""From texts to token ids: a word tokeniser that needs no file, or a published one through transformers.

An id list has the class token first and the separator last, as BERT and RoBERTa have them. Padding goes to the right.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from workers.tasks.task_info import TaskError

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
"""The first words of every vocabulary of words: ids 0 to 3."""

PAD, CLS, SEP, UNK = range(4)
_WORD = re.compile(r"\w+|[^\w\s]")
_MANIFEST = "manifest.json"
"""Of an artefact: see :mod:`workers.artefact`."""

_UNLIMITED = 1_000_000
"""A ``model_max_length`` above this is transformers' way to say that the tokeniser knows none."""


class Tokeniser(Protocol):
    """What encodes texts.

    Attributes:
        vocab_size: ids are below it.
        pad_id: of padding.
        limit: most tokens that its model takes, None where it does not say.
    """

    vocab_size: int
    pad_id: int
    limit: int | None

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
        """Returns the ids of each text with its special tokens, cut to ``max_tokens`` where given."""
        ...

    def description(self) -> dict[str, Any]:
        """Returns the plain values from which :func:`read` makes it again."""
        ...


def words(text: str) -> list[str]:
    """Returns the lower-case words and punctuation marks of a text."""
    return _WORD.findall(text.lower())


class WordTokeniser:
    """Words and punctuation marks in lower case, one id each; a word outside the vocabulary becomes ``[UNK]``."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = tuple(vocabulary)
        if self.vocabulary[: len(SPECIAL)] != SPECIAL:
            raise TaskError(f"vocabulary: must begin with {', '.join(SPECIAL)}, got {self.vocabulary[: len(SPECIAL)]}")
        self._ids = {word: row for row, word in enumerate(self.vocabulary)}
        self.vocab_size, self.pad_id = len(self.vocabulary), PAD
        self.limit: int | None = None

    @classmethod
    def of(cls, texts: Iterable[str]) -> WordTokeniser:
        """Takes every word of ``texts``: most frequent first, equals alphabetically."""
        counts = Counter(word for text in texts for word in words(text))
        return cls((*SPECIAL, *sorted(counts, key=lambda word: (-counts[word], word))))

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
        """See :class:`Tokeniser`."""
        inner = None if max_tokens is None else max_tokens - 2
        return [[CLS, *[self._ids.get(word, UNK) for word in words(text)[:inner]], SEP] for text in texts]

    def description(self) -> dict[str, Any]:
        """See :class:`Tokeniser`."""
        return {"kind": "words", "pattern": _WORD.pattern, "lower": True, "vocabulary": list(self.vocabulary)}


class PublishedTokeniser:
    """One of transformers' tokenisers, by name or from a local folder; code from the hub is never run."""

    def __init__(self, name: str, fingerprint: str | None = None) -> None:
        self.name = name
        self._tokenizer: Any = _published(name)
        if self._tokenizer.pad_token_id is None:
            raise TaskError(f"data.tokenizer {name!r}: must have a padding token; set one in its tokenizer_config.json")
        self.vocab_size, self.pad_id = len(self._tokenizer), int(self._tokenizer.pad_token_id)
        limit = int(self._tokenizer.model_max_length)
        self.limit: int | None = limit if limit < _UNLIMITED else None
        self.fingerprint = folder_fingerprint(name) if fingerprint is None else fingerprint

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
        """See :class:`Tokeniser`."""
        cut = {} if max_tokens is None else {"truncation": True, "max_length": max_tokens}
        found = self._tokenizer(list(texts), padding=False, verbose=False, return_attention_mask=False, **cut)
        return [[int(one) for one in ids] for ids in found["input_ids"]]

    def description(self) -> dict[str, Any]:
        """See :class:`Tokeniser`. Of a folder the name and what is in it, not where it lies."""
        named = Path(self.name).name if self.fingerprint else self.name
        return {"kind": "transformers", "name": named, "fingerprint": self.fingerprint or None}


def _published(name: str) -> Any:
    """Loads by name or folder; what was downloaded before is taken without asking the network."""
    from transformers import AutoTokenizer  # takes seconds

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # the hub's client, the file formats and the parsers raise all kinds
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise TaskError(
                f"data.tokenizer {name!r}: must be a tokeniser's folder or a name that can be downloaded: {reason}; "
                "copy its files to every node and give their folder, or leave it out for a vocabulary of words"
            ) from error


def folder_fingerprint(name: str) -> str:
    """Returns 16 digits that name the files of a local tokeniser folder, of an artefact its manifest; empty for a name of the hub."""
    folder = Path(name)
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    manifest = folder / _MANIFEST
    files = [manifest] if manifest.is_file() else folder.iterdir()
    for file in sorted(f for f in files if f.suffix in (".json", ".txt", ".model")):
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def open_tokeniser(given: str | Mapping[str, str] | None, training_texts: Iterable[str]) -> Tokeniser:
    """Returns the tokeniser of ``data.tokenizer``.

    Args:
        given: None makes one of the training texts' words; a folder that is an artefact gives the one that it was trained
            with; any other folder, or a name, is for transformers. With ``path`` and ``digest`` a folder with that content.

    Raises:
        TaskError: it is neither a folder nor can be downloaded, or has another content.
    """
    if given is None:
        return WordTokeniser.of(training_texts)
    name, expected = (given, None) if isinstance(given, str) else (given["path"], given["digest"])
    if expected is not None and (found := folder_fingerprint(name)) != expected:
        raise TaskError(
            f"data.tokenizer {name}: content must be the study's (digest {expected}), this node's has {found or 'no file'}; "
            "copy the study's folder here, or give another name to a study with a new one"
        )
    manifest = Path(name) / _MANIFEST
    return _of_artefact(manifest) if manifest.is_file() else PublishedTokeniser(name)


def _of_artefact(manifest: Path) -> Tokeniser:
    try:
        description = json.loads(manifest.read_text())["extra"]["preprocessing"]["text"]["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TaskError(
            f"data.tokenizer {manifest.parent}: must be the artefact of a model of images with texts, its {manifest.name} says "
            f"of no tokenizer ({error!r}); give the folder of one, or of a tokeniser"
        ) from error
    return read(description)


def read(description: Mapping[str, Any], folder: str | None = None) -> Tokeniser:
    """Returns the tokeniser of an artefact's preprocessing.

    Args:
        folder: where the files of a published one lie; None takes them by its name.

    Raises:
        TaskError: it cannot be loaded, or has other files than the one that the model was trained with.
    """
    if description["kind"] == "words":
        return WordTokeniser(description["vocabulary"])
    found = PublishedTokeniser(folder or description["name"])
    expected = description.get("fingerprint")
    if expected and found.fingerprint != expected:
        raise TaskError(
            f"{folder or description['name']}: must be the tokeniser that the model was trained with "
            f"(fingerprint {expected}), has {found.fingerprint or 'none'}; give the folder that the study used"
        )
    return found


def padded(ids: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Returns id lists as one array (N, length), padded at the right, and where it holds tokens."""
    lengths = np.fromiter((len(one) for one in ids), dtype=np.int64, count=len(ids))
    mask = np.arange(length) < lengths[:, None]
    out = np.full((len(ids), length), pad_id, dtype=np.int64)
    out[mask] = np.fromiter((token for one in ids for token in one), dtype=np.int64, count=int(lengths.sum()))
    return out, mask
