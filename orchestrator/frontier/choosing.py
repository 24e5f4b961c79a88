"""Picking one point of a frontier: its knee, and what a budget allows. A pure leaf over arrays.

Shapes: n points, m objectives; ``costs`` are objectives on a scale that is minimised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.study.constraints import Constraint, ConstraintError, parse

Floats = npt.NDArray[np.float64]

BEST, NEAREST = "best within", "nearest beyond"
"""Names of what :func:`within_budget` finds."""


@dataclass(frozen=True)
class Knee:
    """The knee of a frontier.

    Attributes:
        row: its number.
        losses: (m,) how far it is from the best of each objective, as a share of the frontier's extent.
        bulges: False where no point has a smaller sum of losses than an extreme one has: there is no knee, only a best sum.
    """

    row: int
    losses: Floats
    bulges: bool


def knee(costs: npt.ArrayLike) -> Knee:
    """Finds the point that gives up least in all objectives together.

    With every objective scaled to 0 at the frontier's best and 1 at its worst, the hyperplane through the extremes is where
    the losses sum up to a constant, so the point that is farthest from it on the ideal point's side has the least sum.
    Source: Das 1999, Structural Optimization 18:107; Branke et al. 2004, PPSN VIII (the same point for equal weights). The
    lower row wins a tie.

    Args:
        costs: (n, m), n of 1 or more; without NaN.
    """
    points = np.asarray(costs, np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    extent = np.where(high > low, high - low, 1.0)
    losses = (points - low) / extent
    total = losses.sum(axis=1)
    row = int(np.argmin(np.round(total, 12)))
    extreme = total[(losses == 0).any(axis=1) & (losses == 1).any(axis=1)]
    return Knee(row, losses[row], bool(len(extreme) == 0 or total[row] < extreme.min() - 1e-12))


def parse_budget(texts: Sequence[str]) -> list[Constraint]:
    """Reads budgets such as ``size_bytes<=6e6 and latency_ms_p50 < 2``.

    Raises:
        ConstraintError: a part is no constraint; its rule starts with that part.
    """
    found = []
    for part in (part.strip() for text in texts for part in re.split(r"\band\b", text, flags=re.IGNORECASE)):
        try:
            found.append(parse(part))
        except ConstraintError as error:
            raise ConstraintError(f"{part!r} {error.rule}", error.remedy) from None
    return found


def within_budget(costs: Floats, values: Mapping[str, Floats], budget: Sequence[Constraint]) -> dict[str, int]:
    """Finds the best point within a budget, and of those beyond it that are better the nearest.

    Best is by the first objective, then by the others in turn. Nearest is the least sum of what exceeds each bound, as a share
    of the bound.

    Args:
        costs: (n, m); a point with a NaN is left out.
        values: (n,) of each metric that the budget names; NaN keeps no bound and is no nearest either.

    Returns:
        :data:`BEST` and :data:`NEAREST` to row numbers, as far as there are such points.
    """
    over = np.zeros(len(costs))
    for constraint in budget:
        exceeds = np.array([constraint.violation({constraint.metric: v}) for v in values[constraint.metric].tolist()])
        over += np.maximum(exceeds, 0.0) / max(abs(constraint.bound), 1e-300)
    known = ~np.isnan(costs).any(axis=1)
    order = np.lexsort(costs.T[::-1])
    inside = order[(known & (over == 0))[order]]
    found = {BEST: int(inside[0])} if len(inside) else {}
    beyond = known & (over > 0) & np.isfinite(over)
    if len(inside):
        beyond &= costs[:, 0] < costs[inside[0], 0]
    rows = order[beyond[order]]
    if len(rows):
        found[NEAREST] = int(rows[np.argmin(over[rows])])
    return found
