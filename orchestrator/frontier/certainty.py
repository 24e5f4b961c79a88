"""The frontier of a ledger and how sure it is: from candidates with intervals to groups with probabilities.

The statistics are those of :mod:`orchestrator.frontier.membership`; :mod:`orchestrator.frontier.objective_kinds` says what the columns mean for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator.frontier.candidate_rows import describe
from orchestrator.frontier.candidates import ROW, Candidates, read_candidates
from orchestrator.frontier.dominance import nondominated
from orchestrator.frontier.estimates import measured_things
from orchestrator.frontier.membership import CERTAIN, POSSIBLE, Groups, judged
from orchestrator.frontier.objective_kinds import Axis, read_axes, source_of
from orchestrator.frontier.possible_members import MOST, contenders, front
from orchestrator.ledger.columns import equals, floats, to_arrow
from orchestrator.ledger.snapshot import Snapshot
from orchestrator.ledger.trials import feasible
from orchestrator.study.constraints import DROPS, Constraint
from workers.metrics import INTERVALS

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]

DECIDES = 0.05
"""Share of draws in which a group must dominate another one to be worth measuring again for the other's sake; and the change
of a probability from which on it rests on the noise of speeds."""

MOST_UNDECIDED = 100
"""Groups for which :func:`to_measure_again` looks for those that decide about them: more than a budget measures again at once."""


@dataclass(frozen=True)
class Condition:
    """What candidates must meet besides the constraints: the columns that it needs, and which rows of a table meet it."""

    columns: Collection[str]
    rows: Callable[[pa.Table], Mask]


@dataclass(frozen=True)
class Question:
    """What is asked of a ledger.

    Attributes:
        all_rows: also candidates that break a constraint of the study.
        columns: more numeric columns to read.
    """

    objectives: Sequence[str]
    directions: Sequence[str]
    condition: Condition | None = None
    all_rows: bool = False
    columns: Sequence[str] = ()


@dataclass(frozen=True)
class Judged:
    """The candidates of a question, n of them, and their standing.

    Attributes:
        axes: of all candidates.
        group: (n,) -1 where another candidate is better beyond doubt or an objective is unknown.
        probability: (n,) of a candidate's group.
        members: of each group, representative first.
    """

    question: Question
    candidates: Candidates
    axes: Sequence[Axis]
    group: Numbers
    probability: Floats
    members: list[list[int]]
    groups: Groups

    @property
    def frontier(self) -> Numbers:
        """Representatives of the groups that belong to the frontier, certainly or possibly.

        Where a crowd of groups leaves none a probability of :data:`POSSIBLE`, the most probable one.
        """
        first = np.array([rows[0] for rows in self.members], np.int64)
        if not len(first):
            return first
        chance = self.probability[first]
        members: Numbers = first[chance >= min(POSSIBLE, chance.max())]
        return members

    def described(self, snapshot: Snapshot, rows: Numbers) -> pa.Table:
        """Returns ``rows`` with names, numbers, intervals and standing: certain ones first, then the best by the objectives."""
        rows = np.sort(rows)
        number = zip(self.group[rows].tolist(), rows.tolist(), strict=True)
        groups = [self.members[group] if group >= 0 else [row] for group, row in number]
        shown = [*self.question.objectives, *self.question.columns]
        columns = describe(snapshot, self.candidates, rows, groups, shown)
        columns |= {n: to_arrow(a.value[rows]) for n, a in zip(self.question.objectives, self.axes, strict=True)}
        certain = self.probability[rows] >= CERTAIN
        columns |= {"probability": to_arrow(self.probability[rows]), "certain": to_arrow(certain)}
        centres = [axis.centre[rows] for axis in self.axes]
        order = np.lexsort((np.array(columns["trial_id"].to_pylist(), np.str_), *reversed(centres), ~certain))
        return pa.table(columns).take(to_arrow(order))


def judge(snapshot: Snapshot, context: str | None, constraints: Sequence[Constraint], question: Question) -> Judged:
    """Finds the standing of every candidate that meets the condition and, unless all are asked for, the constraints."""
    condition = question.condition
    used = set() if condition is None else set(condition.columns)
    sources = {source_of(name)[0] for name in question.objectives} & set(INTERVALS)
    bounds = [f"{name}_{end}" for name in sources for end in ("low", "high")]
    metrics = (*DROPS, *(c.metric for c in constraints))
    wanted = {*question.objectives, *question.columns, *used, *bounds}
    found = read_candidates(snapshot, context, {*wanted, *metrics})
    ok = equals(found.table["status"], "ok")
    keeps = feasible(ok, lambda name: floats(found.table[name]), constraints)
    found = found.with_feasible(keeps, wanted).some(np.flatnonzero(ok if question.all_rows else keeps))
    if condition is not None:
        found = found.some(np.flatnonzero(condition.rows(found.table.select([*used, ROW.name]))))
    axes = read_axes(snapshot, found, question.objectives, question.directions)
    if all(axis.found is None for axis in axes):
        rows, groups = _nominal(axes)
    else:
        rows, groups = _uncertain(snapshot, found, axes)
    return _standing(snapshot, found, axes, rows, groups, question)


def _nominal(axes: Sequence[Axis]) -> tuple[Numbers, Groups]:
    """Everything is exact: the usual frontier, equal points as one group."""
    costs = np.stack([axis.centre for axis in axes], axis=1)
    front = np.flatnonzero(nondominated(costs, ["minimize"] * len(axes)))
    points, group = np.unique(costs[front], axis=0, return_inverse=True)
    return front, Groups(group.reshape(-1), np.ones(len(points)), [])


def _uncertain(snapshot: Snapshot, found: Candidates, axes: Sequence[Axis]) -> tuple[Numbers, Groups]:
    """Draws those that may matter, in an order that does not depend on that of the rows."""
    rows, simulated = _contenders(snapshot, found, axes)
    if not len(rows):
        return rows, Groups(rows, np.empty(0), [])
    names = np.array(found.shown(snapshot, ["trial_id"], rows)["trial_id"].to_pylist(), np.str_)
    order = np.lexsort((names, axes[0].centre[rows]))
    rows, names = rows[order], names[order]
    drawn = [axis.drawn(snapshot, found, rows, names.tolist(), simulated) for axis in axes]
    return rows, judged(drawn)


def _contenders(snapshot: Snapshot, found: Candidates, axes: Sequence[Axis]) -> tuple[Numbers, Mask]:
    """Returns the candidates that none is better than beyond doubt, and which candidates are simulated.

    That stands in a text, which is read for few: those that are left by what is known so far, until that is all of them.
    """
    known = np.flatnonzero(np.isfinite(np.stack([axis.centre for axis in axes], axis=1)).all(axis=1))
    simulated, seen = np.zeros(len(found), np.bool_), np.zeros(len(found), np.bool_)
    while True:
        objectives = [axis.known(known, simulated) for axis in axes]
        rows = known[contenders(objectives, front(objectives), MOST)]
        fresh = rows[~seen[rows]] if any(axis.timed for axis in axes) else rows[:0]
        seen[fresh] = True
        simulated[fresh] = found.simulated(snapshot, fresh)
        if not simulated[fresh].any():
            return rows, simulated


def _standing(
    snapshot: Snapshot,
    found: Candidates,
    axes: Sequence[Axis],
    rows: Numbers,
    groups: Groups,
    question: Question,
) -> Judged:
    """Spreads what was found for ``rows`` over all candidates; the simplest member of a group represents it."""
    group, probability = np.full(len(found), -1), np.zeros(len(found))
    group[rows], probability[rows] = groups.group, groups.probability[groups.group]
    order = np.argsort(groups.group, kind="stable")
    ends = np.searchsorted(groups.group[order], np.arange(len(groups.probability) + 1))
    members = [rows[order[a:b]].tolist() for a, b in pairwise(ends.tolist())]
    several = np.array(sorted(row for one in members if len(one) > 1 for row in one), np.int64)
    if len(several):
        text = found.shown(snapshot, ["trial_id", "techniques"], several)
        parts = zip(several.tolist(), text["techniques"].to_pylist(), text["trial_id"].to_pylist(), strict=True)
        simple = {row: (len(t.split("+")) if t else 0, axes[0].centre[row], name) for row, t, name in parts}
        members = [sorted(one, key=simple.__getitem__) if len(one) > 1 else one for one in members]
    return Judged(question, found, axes, group, probability, members, groups)


def to_measure_again(judged: Judged, snapshot: Snapshot) -> list[str]:
    """Returns the trials whose further measurement may decide who belongs to the frontier, the most useful first.

    Undecided are groups whose probability is neither certain nor out of the question and would change if every speed were
    what it seems. For each, the one nearest to 0.5 first (:data:`MOST_UNDECIDED` at most), come its own trials and those of
    the groups that dominate it in some draws and may belong to the frontier themselves, the least exactly measured first:
    what is known least is what a measurement narrows most.
    """
    groups, timed = judged.groups, [axis.found.sigma for axis in judged.axes if axis.timed and axis.found is not None]
    if not timed:
        return []
    sigma = np.max(timed, axis=0)
    chance, settled = groups.probability, groups.settled()
    undecided = np.flatnonzero((chance >= POSSIBLE) & (chance < CERTAIN) & (np.abs(chance - settled) > DECIDES))
    undecided = undecided[np.argsort(np.abs(chance[undecided] - 0.5), kind="stable")][:MOST_UNDECIDED]
    rivals = np.flatnonzero(chance > 0)
    wanted: list[int] = []
    for group, share in zip(undecided.tolist(), groups.dominated_by(undecided, rivals), strict=True):
        asked = [
            one for g in (group, *rivals[share >= DECIDES].tolist()) for one in judged.members[g] if sigma[one] > 0
        ]
        wanted += sorted(asked, key=lambda one: -sigma[one])
    rows = np.array(list(dict.fromkeys(wanted)), np.int64)
    trials = judged.candidates.shown(snapshot, ["trial_id", "speed_of"], rows)
    things = measured_things(trials).to_pylist()
    names = dict(zip(reversed(things), reversed(trials["trial_id"].to_pylist()), strict=True))
    return [names[thing] for thing in dict.fromkeys(things)]  # what shares a measurement is measured once for all
