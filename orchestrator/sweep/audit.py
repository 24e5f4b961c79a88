"""Runs a sampler on a table of outcomes, where the exact frontier is known: how much of it is found in how many evaluations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt

from orchestrator.frontier.dominance import hypervolume, nondominated
from orchestrator.sampling.samplers import Question, make_sampler
from orchestrator.sampling.tables import OutcomeTable, TableError, TableFacts, TableSpace
from orchestrator.study.sampler import SamplerSection
from orchestrator.sweep.searcher import Proposer

Floats = npt.NDArray[np.float64]


class AuditError(Exception):
    """A sampler cannot be audited."""


@dataclass(frozen=True)
class Audit:
    """What one sampler found on one table under one seed.

    Attributes:
        evaluations: configurations whose outcome it was told, each another one.
        hypervolume_share: of the exact frontier's hypervolume, of what these dominate; see :class:`Yardstick`.
        duplicates: how often it proposed what it had been told already; answered from memory, not counted as evaluations.
        infeasible: how often it proposed what the table lacks, told as infeasible.
        ask_ms_p50: median processor time of one evaluation's ask and tell together.
        curve: number of evaluations to the share that they had found.
    """

    sampler: str
    seed: int
    evaluations: int
    hypervolume_share: float
    duplicates: int
    infeasible: int
    ask_ms_p50: float
    curve: dict[int, float]


class Yardstick:
    """The exact frontier of a table, by which shares are told.

    The reference point is the frontier's nadir: the worst value that it has of each objective. Objectives are scaled so that the frontier's best
    value is 0 and its nadir 1. What is worse than the nadir in any objective adds nothing, nor do the frontier's own ends.

    Attributes:
        reference: the nadir, in the objectives' own units.

    Raises:
        TableError: the frontier does not trade one objective for another, so that nothing lies between it and its nadir.
    """

    def __init__(self, table: OutcomeTable) -> None:
        directions = list(table.objectives.values())
        sign = np.where([direction == "maximize" for direction in directions], -1.0, 1.0)
        self._costs = table.values * sign
        frontier = self._costs[nondominated(table.values, directions)]
        self._ideal, nadir = frontier.min(axis=0), frontier.max(axis=0)
        flat = [name for name, low, high in zip(table.objectives, self._ideal, nadir, strict=True) if low == high]
        if flat:
            raise TableError(
                f"objectives: each must differ along the table's frontier, {', '.join(flat)} does not, so there is no hypervolume "
                "up to the nadir; leave it out, or take two objectives that are at odds"
            )
        self._span = nadir - self._ideal
        self.reference: list[float] = (nadir * sign).tolist()
        self._whole = self._volume(frontier)
        if self._whole <= 0:
            raise TableError(
                f"objectives: the table's frontier has {len(np.unique(frontier, axis=0))} different members, all of them at its nadir in "
                "some objective, so there is no hypervolume up to it; take a table with more configurations"
            )

    def _volume(self, costs: Floats) -> float:
        scaled = (costs - self._ideal) / self._span
        return hypervolume(scaled, ["minimize"] * scaled.shape[1], np.ones(scaled.shape[1]))

    def share(self, rows: Sequence[int]) -> float:
        """Returns the share of the exact hypervolume that these rows of the table dominate, 0 to 1."""
        return self._volume(self._costs[list(rows)]) / self._whole


def audit(
    table: OutcomeTable,
    yardstick: Yardstick,
    sampler: SamplerSection,
    evaluations: int,
    known: Sequence[str] = (),
    *,
    told_reference: bool = True,
) -> Audit:
    """Runs a sampler from nothing until ``evaluations`` different configurations of the table are told.

    Args:
        known: objectives that the sampler is told of every configuration beforehand; what it makes of that is its own affair.
        told_reference: the sampler is told the reference point of the share, as a study states one; else it must assume one.

    Raises:
        AuditError: another package's sampler cannot be made of a seed alone.
    """
    space = TableSpace(table)
    question = Question(
        space,
        list(table.objectives),
        reference=lambda: yardstick.reference if told_reference else None,
        facts=TableFacts(table, known) if known else None,
        possible=lambda recipe: space.fault(recipe) is None,
    )
    try:
        made = make_sampler(sampler, question)
    except ValueError as error:
        raise AuditError(f"sampler {sampler.name}: must be made with a seed and nothing else; {error}") from None
    proposer = Proposer(space, table.objectives, [], made, seed=sampler.seed)
    rows: list[int] = []
    times_s: list[float] = []
    duplicates = infeasible = 0
    while len(rows) < evaluations:
        start_s = time.process_time()
        proposal, answered = proposer.ask()
        duplicates += sum("duplicate" in one for one in answered)
        infeasible += sum("rejected" in one for one in answered)
        row = None if proposal is None else table.row_of(proposal.recipe)
        if proposal is None or row is None:  # every row of the table is told
            break
        proposer.tell(proposal.number, ["ok"], [table.outcome(proposal.recipe)])
        times_s.append(time.process_time() - start_s)
        rows.append(row)
    return Audit(
        sampler.name,
        sampler.seed,
        len(rows),
        yardstick.share(rows),
        duplicates,
        infeasible,
        1000 * median(times_s),
        {count: yardstick.share(rows[:count]) for count in checkpoints(len(rows))},
    )


def checkpoints(evaluations: int) -> list[int]:
    """Returns 10, 20, 50, 100, 200, 500, ... below ``evaluations``, and that itself."""
    decades = range(1, len(str(evaluations)))
    return [c for c in (m * 10**d for d in decades for m in (1, 2, 5)) if c < evaluations] + [evaluations]
