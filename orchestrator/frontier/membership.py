"""Frontiers of numbers that are known only up to an interval: probabilities of being non-dominated. A pure leaf over
arrays: it knows no ledger and no study. docs/decisions/0013-certain-frontier.md has the argument.

Everything here is minimised: accuracies and throughputs come with their sign turned, ratio scales (speeds, memory) as
logarithms. Shapes: k candidates that may matter (:mod:`orchestrator.frontier.possible_members`), ``DRAWS`` joint draws
(:mod:`orchestrator.frontier.draws`). In each drawn world dominance is the usual one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.frontier.dominance import nondominated_share
from orchestrator.frontier.draws import counted, rounded
from orchestrator.frontier.indistinguishable import grouped

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]

CERTAIN = 0.95
POSSIBLE = 0.05
"""Probabilities of being non-dominated from which a group is a certain, and a possible, member of the frontier."""

_AT_ONCE = 50
"""Draws whose frontiers are found at once: a few megabytes."""


def shares(worlds: Sequence[Floats]) -> Floats:
    """Returns the share of draws in which each is non-dominated, (k,).

    Args:
        worlds: (k, DRAWS) of each objective, or (k, 1).
    """
    draws = max(values.shape[1] for values in worlds)
    wide = [np.broadcast_to(values, (len(values), draws)) for values in worlds]
    found = np.zeros(len(worlds[0]))
    for start in range(0, draws, _AT_ONCE):
        some = np.stack([values[:, start : start + _AT_ONCE] for values in wide])
        found += nondominated_share(some.transpose(2, 1, 0)) * some.shape[2]
    return np.asarray(found / draws)


@dataclass(frozen=True)
class Drawn:
    """One objective of k candidates.

    Attributes:
        values: (k, DRAWS), or (k, 1) where the objective is exact.
        limit: (k,) beyond which a draw counts as the worst possible value; infinite for no limit.
        timed: it is a speed, which measuring again can tell better.
    """

    values: Floats
    limit: Floats
    timed: bool = False

    @property
    def exact(self) -> bool:
        """The objective has no uncertainty."""
        return bool(self.values.shape[1] == 1)

    def some(self, rows: Numbers) -> Drawn:
        """Returns the objective for some candidates."""
        return Drawn(self.values[rows], self.limit[rows], self.timed)

    def counted(self) -> Floats:
        """Returns what the draws count as."""
        return counted(self.values, self.limit)

    def held(self) -> Drawn:
        """Returns the objective with every draw at its mean."""
        return Drawn(rounded(self.values.mean(axis=1, keepdims=True)), self.limit, self.timed)


@dataclass(frozen=True)
class Groups:
    """What the draws say.

    Attributes:
        group: (k,) number of each candidate's group.
        probability: (groups,) of being non-dominated.
        objectives: of the groups: means over their members.
    """

    group: Numbers
    probability: Floats
    objectives: Sequence[Drawn]

    def settled(self) -> Floats:
        """Returns the probabilities if every speed were known to be what it seems."""
        if not any(o.timed and not o.exact for o in self.objectives):
            return self.probability
        return shares([(o.held() if o.timed else o).counted() for o in self.objectives])

    def dominated_by(self, groups: Numbers, rivals: Numbers) -> Floats:
        """Returns the share of draws in which each of ``rivals`` dominates each of ``groups``, (groups, rivals)."""
        worlds = [o.counted() for o in self.objectives]
        theirs = [values[rivals] for values in worlds]
        found = np.zeros((len(groups), len(rivals)))
        for place, group in enumerate(groups.tolist()):
            as_good, better = np.ones((1, 1), np.bool_), np.zeros((1, 1), np.bool_)
            for values, rival in zip(worlds, theirs, strict=True):
                as_good, better = as_good & (rival <= values[group]), better | (rival < values[group])
            found[place] = (as_good & better).mean(axis=1)
        return found


def judged(objectives: Sequence[Drawn]) -> Groups:
    """Finds groups and probabilities.

    Time and memory are bounded by k of :data:`~orchestrator.frontier.possible_members.MOST` at most: k x DRAWS numbers an objective, a frontier of k points for each
    draw (k log k for two and three objectives), and for candidates that are equal in everything exact, K of them, K x K
    distances.

    Args:
        objectives: of k candidates, in an order that does not depend on the rows' order.
    """
    exact = [o.values[:, 0] for o in objectives if o.exact] or [np.zeros(len(objectives[0].limit))]
    blocks = np.unique(np.stack(exact, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    group = grouped([o.values for o in objectives if not o.exact], blocks)
    merged = [_merged(o, group) for o in objectives]
    return Groups(group, shares([o.counted() for o in merged]), merged)


def _merged(objective: Drawn, number: Numbers) -> Drawn:
    """Returns the means over the members of each group."""
    if objective.exact:  # equal within a group, and a mean of equal numbers may differ from them in the last bit
        first = np.unique(number, return_index=True)[1]
        return objective.some(first)
    size = np.bincount(number)
    total = np.zeros((len(size), objective.values.shape[1]))
    np.add.at(total, number, objective.values)
    edge = np.bincount(number, weights=np.where(np.isinf(objective.limit), 0.0, objective.limit)) / size
    without = np.bincount(number, weights=np.isinf(objective.limit)) > 0
    return Drawn(rounded(total / size[:, None]), np.where(without, np.inf, rounded(edge)), objective.timed)
