"""Which candidates may be on a frontier at all, told without drawing. A pure leaf over arrays.

Everything is minimised, see :mod:`orchestrator.frontier.draws`. What is dominated in every draw can be left out without changing any
other candidate's status in any draw. Shapes: n candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.frontier.dominance import nondominated
from orchestrator.frontier.draws import counted

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

HOPELESS = 5.0
"""Standard deviations of a difference. Who is worse than one and the same other candidate by so much in everything uncertain,
and no better in anything exact, is dominated by it in every draw."""

MOST = 5000
"""Candidates that are drawn at most. Time and memory of the whole grow with their number times the draws, that of grouping
with the square of how many are equal in everything exact."""

_SAMPLE = 4000
"""Candidates by which :func:`contenders` chooses where to stop."""


@dataclass(frozen=True)
class Known:
    """What is known of one objective of n candidates without drawing.

    Attributes:
        centre, sigma: (n,) mean and standard deviation, 0 where exact.
        limit: (n,) beyond which a draw counts as the worst possible value; infinite for no limit.
    """

    centre: Floats
    sigma: Floats
    limit: Floats

    def some(self, rows: Numbers) -> Known:
        """Returns the objective for some candidates."""
        return Known(self.centre[rows], self.sigma[rows], self.limit[rows])


def front(objectives: Sequence[Known]) -> Numbers:
    """Returns the candidates that would be the frontier if every objective were what it seems."""
    seeming = np.stack([counted(o.centre, o.limit) for o in objectives], axis=1)
    return np.flatnonzero(nondominated(seeming, ["minimize"] * len(objectives)))


def contenders(objectives: Sequence[Known], rivals: Numbers, most: int) -> Numbers:
    """Returns the candidates that no rival is better than beyond doubt, ascending; rivals are always among them.

    What is left out is dominated in every draw by a rival, which in each draw dominates whatever the other one dominates. So
    leaving it out changes nothing. Where more than ``most`` would be left, those go too that a rival dominates most probably,
    until about so many are left; then the probability of what stays is an upper bound.

    Args:
        rivals: of :func:`front`.
    """
    left = _left(objectives, rivals)
    if len(left) <= max(most, len(rivals)):
        return left
    remaining, heads = [o.some(left) for o in objectives], np.searchsorted(left, rivals)
    order = np.lexsort([o.centre for o in remaining])
    sample = np.union1d(heads, order[:: max(1, len(left) // _SAMPLE)])
    doubts = np.sort(_doubt([o.some(sample) for o in remaining], np.searchsorted(sample, heads), 0.0))[::-1]
    share = (len(left) - len(rivals)) / max(len(sample) - len(rivals), 1)
    wanted = len(rivals) + int((most - len(rivals)) / share) if most > len(rivals) else len(rivals)
    kept: Numbers = left[_doubt(remaining, heads, doubts[wanted]) > doubts[wanted]]
    return kept


def _left(objectives: Sequence[Known], rivals: Numbers) -> Numbers:
    """Returns those that no rival is :data:`HOPELESS` standard deviations better than."""
    columns = [(o.centre, o.sigma, o.centre - o.limit >= HOPELESS * o.sigma) for o in objectives]
    left = np.arange(len(objectives[0].centre))
    for rival in rivals.tolist():
        as_good, better = np.ones(len(left), np.bool_), np.zeros(len(left), np.bool_)
        for o, (centre, sigma, beyond) in zip(objectives, columns, strict=True):
            difference = centre - o.centre[rival]
            clear = difference >= HOPELESS * np.hypot(sigma, o.sigma[rival])
            within = o.limit[rival] - o.centre[rival] >= HOPELESS * o.sigma[rival]
            as_good = as_good & (clear | beyond)
            better = better | (clear & (difference > 0) & within)
        keep = ~(as_good & better)
        if not keep.all():
            left = left[keep]
            columns = [(centre[keep], sigma[keep], beyond[keep]) for centre, sigma, beyond in columns]
    return left


def _doubt(objectives: Sequence[Known], rivals: Numbers, enough: float) -> Floats:
    """Returns how doubtful it is that a rival dominates each candidate, (n,): for the rival that does so most probably the
    negative logarithm of that probability, about (every objective by itself; a logistic curve for the normal one, within 0.01,
    Bowling et al. 2009). Infinite where none seems better anywhere, and for rivals. Exact only above ``enough``.
    """
    found = np.full(len(objectives[0].centre), np.inf)
    left = np.setdiff1d(np.arange(len(found)), rivals)
    columns = [(o.centre[left], o.sigma[left], o.centre[left] > o.limit[left]) for o in objectives]
    for rival in rivals.tolist():
        doubt, better = np.zeros(len(left)), np.zeros(len(left), np.bool_)
        for o, (centre, sigma, beyond) in zip(objectives, columns, strict=True):
            if o.centre[rival] > o.limit[rival]:
                doubt[~beyond] = np.inf
                continue
            difference, apart = centre - o.centre[rival], np.hypot(sigma, o.sigma[rival])
            sure = np.where(difference < 0, -np.inf, np.inf)
            distance = np.divide(difference, apart, out=sure, where=apart > 0)
            doubt += np.where(beyond, 0.0, np.logaddexp(0.0, -1.702 * distance))
            better |= beyond | (difference > 0)
        found[left] = np.minimum(found[left], np.where(better, doubt, np.inf))
        keep = found[left] > enough
        if not keep.all():
            left = left[keep]
            columns = [(centre[keep], sigma[keep], beyond[keep]) for centre, sigma, beyond in columns]
    return found
