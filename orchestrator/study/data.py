"""The data section of a study; the other sections: :mod:`orchestrator.study.schema`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from orchestrator.study.scalars import Natural, Positive, broken


class Section(BaseModel):
    """A part of a study: unknown keys are faults, and text is not taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


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

    kind: Literal[
        "digits",
        "cifar10",
        "cifar100",
        "imagefolder",
        "parquet",
        "digit_vqa",
        "digit_entailment",
        "digit_nlvr",
        "digit_retrieval",
        "vqa",
        "entailment",
        "nlvr2",
        "nlvr1",
        "retrieval",
    ]
    path: str | None = None
    image_size: Positive | None = None
    search_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    split_seed: Natural = 0
    train_limit: Positive | None = None
    search_limit: Positive | None = None
    report_limit: Positive | None = None
    mean: list[float] | None = None
    std: list[Annotated[float, Field(gt=0)]] | None = None
    max_text_tokens: Annotated[int, Field(ge=3)] | None = None
    truncation: bool = False
    tokenizer: str | None = None
    answers: Annotated[int | str, BeforeValidator(_answers)] = 3129
    candidates: Annotated[int, Field(ge=2)] = 4


VISION_LANGUAGE_KEYS = ("max_text_tokens", "truncation", "tokenizer", "answers", "candidates")
"""Keys of the data section that images alone have no use for."""
