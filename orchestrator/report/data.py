"""What the report shows of a study, as plain values. :mod:`orchestrator.report.read` fills them from a ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from orchestrator.study.constraints import DROPS
from workers.metrics import ACCURACIES, METRICS

_SHORT = {name: METRICS[name].title.removesuffix(" accuracy") for name in ACCURACIES}

TITLES = {
    **{name: metric.title for name, metric in METRICS.items()},
    **{drop: f"{_SHORT[name]} drop" for drop, name in DROPS.items()},
    **{f"report_{name}": f"{short} on the report split" for name, short in _SHORT.items()},
}
"""Metrics of the report, in the order in which it shows those that are no objectives. ``report_*`` is measured on examples that
the search never saw, for frontier members only."""


@dataclass(frozen=True)
class Metric:
    """A column of numbers; ``better`` is ``minimize``, ``maximize`` or None, ``objective`` says that the frontier is
    drawn over it."""

    name: str
    title: str
    unit: str
    better: str | None
    objective: bool


@dataclass
class Candidate:
    """A recipe, numbers in the order of ``Report.metrics``; a null bound says that the value is exact or not measured.

    Attributes:
        steps: technique and its whole config, in order; none for the baseline.
        ratio: over the baseline's.
        standing: ``certain``, ``possible`` or ``dominated``; ``member`` of the group that ``members`` begins with;
            ``broken`` where it breaks a constraint of the study.
        members: trial ids of the group that noise does not tell apart, its representative first.
    """

    id: str
    number: int | None
    label: str
    steps: list[tuple[str, dict[str, Any]]]
    value: list[float | None]
    low: list[float | None]
    high: list[float | None]
    ratio: list[float | None]
    standing: str
    probability: float | None
    members: list[str]
    seeds: int
    simulated: bool
    slower: bool

    @property
    def is_baseline(self) -> bool:
        """Whether it is the uncompressed model."""
        return not self.steps


@dataclass
class Report:
    """All that is shown.

    Attributes:
        status: as ``study_status`` tells it.
        began, ended: of the trials, UTC; None without a trial.
        parameters: numeric parameters that the study searches: ``technique.name`` to its values or both ends.
        history: (trials, microseconds since the epoch, hypervolume) of each snapshot of the frontier.
        techniques: ``technique``, ``recipes`` that use it, those ``certain``, ``volume`` of the frontier without them.
        volume: hypervolume of the frontier over ``objectives``, baseline-relative; None where it has no unit.
        said_of_data: what is done to images, what of the data is not used, and warnings of it.
        stopped: trials that stand at a rung of their recovery training; see :func:`orchestrator.report.overview.stopped_early`.
        failures: ``status``, ``count``, ``reasons``: ``text``, ``count`` and the ``trial`` of an example.
    """

    study: str
    config: Mapping[str, Any]
    status: Mapping[str, Any]
    objectives: list[str]
    metrics: list[Metric]
    candidates: list[Candidate]
    conditions: Mapping[str, Any]
    device_name: str
    began: datetime | None
    ended: datetime | None
    parameters: dict[str, list[float]] = field(default_factory=dict)
    history: list[tuple[int, int, float | None]] = field(default_factory=list)
    techniques: list[dict[str, Any]] = field(default_factory=list)
    volume: float | None = None
    failures: list[dict[str, Any]] = field(default_factory=list)
    stopped: list[dict[str, Any]] = field(default_factory=list)
    said_of_data: list[str] = field(default_factory=list)

    @property
    def baseline(self) -> Candidate | None:
        """The uncompressed model, None where it has not been measured."""
        return next((c for c in self.candidates if c.is_baseline), None)

    def position(self, metric: str) -> int | None:
        """Where a metric stands in a candidate's numbers, None where nobody has it."""
        return next((k for k, m in enumerate(self.metrics) if m.name == metric), None)

    def frontier(self, *standings: str) -> list[Candidate]:
        """Candidates of the given standings."""
        return [c for c in self.candidates if c.standing in standings]
