"""What a recipe is expected to add to the hypervolume, in any number of objectives, all minimised.

The hypervolume between points and a reference point is, up to a constant, the mean over random directions of the largest cube
that a point spans in a direction. Improvements of that mean cost one maximum a direction, whatever the number of objectives,
and their expectation is taken over draws of the posterior with random numbers that all candidates share.

Source: Deng and Zhang, Approximating hypervolume and hypervolume contributions using polar coordinate, IEEE Transactions on
Evolutionary Computation 2019; Zhang and Golovin, Random hypervolume scalarizations for provable multi-objective black box
optimization, ICML 2020 (arXiv 2006.04655), lemma 5.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DIRECTIONS = 48
DRAWS = 16
TOP = 32
"""Candidates whose expectation is calculated: those of the highest optimistic value."""

OPTIMISM = 0.7
"""Standard deviations below the mean at which a candidate's optimistic value is taken."""


class Improvement:
    """Improvements over a frontier.

    Args:
        front: (n, objectives) values of the frontier; may be empty.
        reference: (objectives,) the point beyond which nothing counts.
        scale: (objectives,) lengths that make the objectives alike, positive.
        generator: of the random directions.
    """

    def __init__(self, front: Array, reference: Array, scale: Array, generator: np.random.Generator) -> None:
        self.reference, self.scale = reference, scale
        directions = np.abs(generator.standard_normal((DIRECTIONS, len(reference))))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        self._inverse = 1 / np.maximum(directions, 1e-3)
        self._best = self._cubes(front).max(0) if len(front) else np.zeros(DIRECTIONS)

    def _cubes(self, points: Array) -> Array:
        """Returns for points (..., objectives) the cube each spans in each direction: (..., directions)."""
        gap = (self.reference - points) / self.scale
        shortest: Array = (gap[..., None, :] * self._inverse).min(-1)
        return np.maximum(shortest, 0.0) ** len(self.reference)

    def of(self, points: Array) -> Array:
        """Returns what each of (..., objectives) points adds: (...,)."""
        found: Array = np.maximum(self._cubes(points) - self._best, 0.0).mean(-1)
        return found


def draws(count: int, objectives: int, generator: np.random.Generator) -> Array:
    """Returns standard normal numbers, (count, objectives), each with its opposite."""
    half = generator.standard_normal((count // 2, objectives))
    return np.concatenate([half, -half])


def lengths(front: Array, reference: Array) -> Array:
    """Returns for each objective from the best of a frontier to the reference point: (objectives,), positive."""
    found = reference - front.min(0)
    return np.where(found > 0, found, np.maximum(np.abs(reference), 1.0))


BEYOND = 0.1
"""Where no reference point is given, it lies this share of the frontier's extent beyond its worst values, or further."""


def assumed_reference(front: Array, first: Array, *, far: bool) -> Array:
    """Returns a reference point where none is given: (objectives,).

    Against one just beyond the frontier nothing counts that is found where the frontier has not been yet; against a far one the
    ends of the frontier count for most. A sampler takes both in turn.

    Args:
        front: (n, objectives) values of the frontier.
        first: (m, objectives) values of the first recipes, which nothing has steered.
        far: also beyond the worst of the first recipes.
    """
    low, high = front.min(0), front.max(0)
    if far:
        high = np.maximum(high, first.max(0))
    found: Array = high + BEYOND * (high - low)
    return found
