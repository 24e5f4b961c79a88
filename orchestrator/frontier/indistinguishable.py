"""Groups of candidates that noise cannot tell apart: distances, floors, complete linkage. A pure leaf over arrays.

Shapes: k candidates, ``DRAWS`` draws of each (:mod:`orchestrator.frontier.draws`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from orchestrator.frontier.quantiles import floor_width

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

_ROWS = 512
"""Rows of a table of pairs that are computed at once."""


def distances(draws: Sequence[Floats]) -> Floats:
    """Returns how many standard deviations of its difference each pair lies apart, in the objective that parts it most, (k, k).

    Args:
        draws: (k, DRAWS) of each uncertain objective, one at least.
    """
    apart = np.zeros((len(draws[0]), len(draws[0])))
    for values in draws:
        mean = values.mean(axis=1)
        centred = values - mean[:, None]
        for start in range(0, len(values), _ROWS):  # with those after them: the table is symmetric
            rows = slice(start, start + _ROWS)
            difference, spread = np.abs(mean[rows, None] - mean[None, start:]), spreads(centred[rows], centred[start:])
            parted = np.where(difference == 0, 0.0, np.inf)
            np.divide(difference, spread, out=parted, where=(spread > 0) & (difference > 0))
            np.maximum(apart[rows, start:], parted, out=apart[rows, start:])
            apart[start:, rows] = apart[rows, start:].T
    return apart


def spreads(some: Floats, others: Floats) -> Floats:
    """Returns the standard deviations of the differences between (r, DRAWS) and (k, DRAWS) draws with mean 0, (r, k)."""
    variances = [np.einsum("ij,ij->i", draws, draws) for draws in (some, others)]
    squares = variances[0][:, None] + variances[1][None, :] - 2 * (some @ others.T)
    return np.asarray(np.sqrt(np.maximum(squares, 0.0) / some.shape[1]))


def grouped(draws: Sequence[Floats], blocks: Numbers) -> Numbers:
    """Groups candidates that lie within the floor of each other in every objective.

    Groups are merged, those nearest in multiples of their floor first, while the farthest two members of what they would
    become lie within the floor for as many equal things (complete linkage with the critical distances of a multiple range
    test). So copies of one artefact become one group with probability 0.95, however many there are, while two things by
    themselves are told apart as soon as 1.96 standard deviations part them.

    Args:
        draws: (k, DRAWS) of each uncertain objective, candidates in an order that does not depend on the rows' order.
        blocks: (k,) equal for candidates that are equal in every exact objective; only those can be one group.

    Returns:
        (k,) group numbers from 0, in the order of the first members.
    """
    label = np.arange(len(blocks))
    order = np.argsort(blocks, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(blocks[order])) + 1):
        if len(rows) > 1:
            label[rows] = rows[_linked(distances([values[rows] for values in draws]))]
    numbers: Numbers = np.unique(label, return_inverse=True)[1]
    return numbers


def _linked(distance: Floats) -> Numbers:
    """Merges groups as :func:`grouped` says; returns the first member of each one's group, (k,). Overwrites ``distance``.

    The nearest neighbour of each is known as a lower bound only, and looked for when that is the least of all.
    """
    k = len(distance)
    width = np.concatenate(
        [[1.0, 1.0], floor_width(np.arange(2, 2 * k + 1))]
    )  # by size; a group with itself is looked up too
    label, size = np.arange(k), np.ones(k, np.int64)
    np.fill_diagonal(distance, np.inf)
    nearest = distance.min(axis=1) / width[2]
    while nearest[i := int(np.argmin(nearest))] <= 1:
        share = distance[i] / width[size[i] + size]
        j = int(np.argmin(share))
        if share[j] > nearest[i]:
            nearest[i] = share[j]
            continue
        keep, gone = min(i, j), max(i, j)
        label[label == gone] = keep
        merged = np.maximum(distance[keep], distance[gone])  # infinite to itself and to those that are merged already
        merged[gone] = np.inf
        distance[keep], distance[:, keep], distance[gone], distance[:, gone] = merged, merged, np.inf, np.inf
        size[keep] += size[gone]
        size[gone], nearest[gone] = 0, np.inf
        share = merged / width[size[keep] + size]
        nearest[keep] = share.min()
        np.minimum(nearest, share, out=nearest, where=size > 0)
    return label
