"""The texts of a corpus as token ids, each distinct text once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks.corpus import Corpus
from workers.tasks.task_info import TaskError, TextInfo
from workers.tasks.tokenisers import open_tokeniser, padded


class EncodedTexts:
    """Every text of a corpus, encoded.

    The vocabulary of words is that of the whole training part, before limits and the search split are cut: neither changes
    the model. ``data.max_text_tokens`` is the length of all texts, padded; without it the longest text's. A text that is
    longer than that, or than the tokeniser's model takes, is a fault unless ``data.truncation`` is set: as in
    transformers, nothing is cut unasked.

    Attributes:
        rows: part to the row (N,) int64 of each example's text among the distinct ones.
        ids: ids of each distinct text.
        length: of all texts, once padded.
    """

    def __init__(self, corpus: Corpus, data: Mapping[str, Any]) -> None:
        """Raises TaskError for the first text that is too long."""
        self.tokeniser = open_tokeniser(data["tokenizer"], corpus.parts["train"].texts)
        self.truncation = bool(data["truncation"])
        asked, own = data["max_text_tokens"], self.tokeniser.limit
        limit = min((most for most in (asked, own) if most is not None), default=None)
        distinct: dict[str, int] = {}
        self.rows = {
            name: np.asarray([distinct.setdefault(text, len(distinct)) for text in part.texts], dtype=np.int64)
            for name, part in corpus.parts.items()
        }
        self.ids = self.tokeniser.encode(list(distinct), limit if self.truncation else None)
        longest = max(map(len, self.ids))
        if limit is not None and longest > limit:
            self._refuse(
                corpus, limit, f"data.max_text_tokens is {limit}" if limit == asked else "its tokeniser's limit"
            )
        self.length = longest if asked is None else int(limit or asked)

    def _refuse(self, corpus: Corpus, limit: int, reason: str) -> None:
        for name, part in corpus.parts.items():
            for example, row in enumerate(self.rows[name].tolist()):
                if len(self.ids[row]) > limit:
                    raise TaskError(
                        f"{part.names[example]}: a text must have at most {limit} tokens ({reason}), this has "
                        f"{len(self.ids[row])}: {part.texts[example][:60]!r}; set data.truncation: true to cut such texts, "
                        "or raise data.max_text_tokens as far as the model takes it"
                    )

    @property
    def info(self) -> TextInfo:
        """What a model needs to know of the texts."""
        return TextInfo(self.tokeniser.vocab_size, self.length, self.tokeniser.pad_id)

    def padded(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Returns ids (Q, L) and masks of these distinct texts."""
        return padded([self.ids[row] for row in rows.tolist()], self.length, self.tokeniser.pad_id)

    def description(self) -> dict[str, Any]:
        """Returns the plain values from which a user of the artefact prepares texts."""
        return {
            "tokenizer": self.tokeniser.description(),
            "max_text_tokens": self.length,
            "truncation": self.truncation,
            "pad_id": self.tokeniser.pad_id,
            "padding": "right",
        }
