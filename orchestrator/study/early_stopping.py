"""The early_stopping section of a study: at which shares of the recovery training it is decided who goes on."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from orchestrator.study.data import Section
from orchestrator.study.scalars import broken
from workers.training.settings import whole_epochs

FEWEST_EPOCHS = 4
"""A recovery of fewer epochs is not stopped early unless the study says so: its first rung would be a third of it."""

_EXAMPLE = "for example {eta: 2, rungs: [0.125, 0.375]}, or none"

Share = Annotated[float, Field(gt=0, lt=1)]


def _ascending(rungs: list[float]) -> list[float]:
    if any(one >= other for one, other in pairwise(rungs)):
        raise broken("must be ascending shares of the recovery training", "for example [0.125, 0.375]")
    return rungs


class EarlyStoppingSection(Section):
    """``none`` is without rungs. The defaults trained 49 % of the epochs of digits' recipes and kept .994 of their hypervolume
    (decision 0032)."""

    eta: Annotated[float, Field(gt=1, le=1000)] = 2.0
    rungs: Annotated[list[Share], AfterValidator(_ascending)] = Field(default_factory=lambda: [0.125, 0.375])

    @model_validator(mode="before")
    @classmethod
    def _none(cls, values: Any) -> Any:
        if values == "none":
            return {"rungs": []}
        if not isinstance(values, Mapping | EarlyStoppingSection):
            raise broken("must be none, or a mapping of eta and rungs", _EXAMPLE)
        return values


def rungs_of(section: EarlyStoppingSection | None, epochs: int) -> tuple[float, ...]:
    """Returns the rungs of a recovery of so many epochs, as shares that are whole epochs; those that coincide are one, and one
    at the end is none.

    Args:
        section: None for a study that does not say: the defaults from :data:`FEWEST_EPOCHS` on.
    """
    if section is None and epochs < FEWEST_EPOCHS:
        return ()
    stated = (section or EarlyStoppingSection()).rungs
    whole = sorted({whole_epochs(share, epochs) for share in stated})
    return tuple(epoch / epochs for epoch in whole if epoch < epochs)
