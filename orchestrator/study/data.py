"""The data section of a study; the other sections: :mod:`orchestrator.study.schema`."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from orchestrator.study.scalars import Positive, Seed, broken
from workers.tasks import KINDS, TEXT_DEFAULTS, DataKind


class Section(BaseModel):
    """A part of a study: unknown keys are faults, and text is not taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _known_kind(value: object) -> object:
    """Passes the name of a kind of data."""
    if isinstance(value, str) and value in KINDS:
        return value
    *names, last = map(repr, KINDS)
    near = get_close_matches(value, KINDS, n=1, cutoff=0.5) if isinstance(value, str) else ()
    raise broken(f"must be {', '.join(names)} or {last}", f"did you mean {near[0]}?" if near else "")


def _answers(value: object) -> object:
    """Passes the number of a vocabulary's answers, or the path of a file that lists them."""
    counted = isinstance(value, int) and not isinstance(value, bool) and value >= 2
    if counted or (isinstance(value, str) and value):
        return value
    raise broken("must be a whole number from 2, or the path of a file of answers", "for example 3129")


class DataSection(Section):
    """Which images, with their texts where a task has some.

    ``search_fraction`` of the training ones becomes the search split, unless the data has a validation part for it.
    """

    kind: Annotated[str, BeforeValidator(_known_kind)]
    path: str | None = None
    image_size: Positive | None = None
    channels: Literal[1, 3] | None = None
    search_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    split_seed: Seed = 0
    train_limit: Positive | None = None
    search_limit: Positive | None = None
    report_limit: Positive | None = None
    mean: list[float] | None = None
    std: list[Annotated[float, Field(gt=0)]] | None = None
    max_text_tokens: Annotated[int, Field(ge=3)] | None = TEXT_DEFAULTS["max_text_tokens"]
    truncation: bool = TEXT_DEFAULTS["truncation"]
    tokenizer: str | None = TEXT_DEFAULTS["tokenizer"]
    answers: Annotated[int | str, BeforeValidator(_answers)] = TEXT_DEFAULTS["answers"]
    candidates: Annotated[int, Field(ge=2)] = TEXT_DEFAULTS["candidates"]

    def unsaid(self) -> set[str]:
        """Returns keys that are newer than the first studies and count only where they are said: ids of trials stay."""
        return {"channels"} if self.channels is None else set()


VISION_LANGUAGE_KEYS = tuple(TEXT_DEFAULTS)
"""Keys of the data section that images alone have no use for."""


def kind_of(data: object) -> DataKind | None:
    """Returns the kind of a data section as it stands in the file; None where it names no known one."""
    name = data.get("kind") if isinstance(data, Mapping) else None
    return KINDS.get(name) if isinstance(name, str) else None
