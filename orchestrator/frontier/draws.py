"""Draws: possible worlds of numbers that are known only up to an interval. A pure leaf over arrays.

A draw is one possible world: a value for every candidate in every objective. Everything is minimised: accuracies and
throughputs come with their sign turned, ratio scales (speeds, memory) as logarithms. Shapes: k candidates, ``DRAWS`` draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DRAWS = 1000
"""Joint draws. The standard error of a probability of 0.95 is 0.007."""

WORST = np.inf
"""What a speed counts as that is beyond its limit."""

_DECIMALS = 10
"""Draws are rounded to these, so that the mean of equal draws is that draw: dominance asks for equality."""

_PSEUDO_IMAGES = 64
_PSEUDO_WEIGHT = 2.0
"""Prior weight of :func:`bootstrapped`, in images, and over how many images it is spread."""

_WEIGHTS_SEED = 20317
_BLOCK = 8192
"""Images that are drawn and multiplied at once."""

_WEIGHT_STEP = 2.0**-8
_SHARE_STEP = 2.0**-20
"""Grids of the weights of images and pseudo-images, and of what a candidate has right of one. Sums of their products are
exact, so that they do not depend on the order in which this machine's matrix product adds: 2^13 images of weights up to 2^4
in steps of 2^-8 fit the 24 bits of float32 where rows are 0 and 1, and the 53 of float64 where they are means over seeds."""


def normals(names: Sequence[str]) -> Floats:
    """Returns a stratified standard normal sample for each name, (k, DRAWS): the same for a name in whatever company.

    Each row is a random order of the same DRAWS quantiles (Latin hypercube, McKay et al. 1979), so its mean is 0 and no value
    lies beyond 3.3.
    """
    keys = np.array([_key(name.encode()) for name in names], np.uint64)
    order = np.argsort(
        _mixed(keys[:, None] ^ _mixed(np.arange(DRAWS, dtype=np.uint64))[None, :]), axis=1, kind="stable"
    )
    return _quantiles()[order]


@cache
def _quantiles() -> Floats:
    normal = NormalDist()
    upper = np.array([normal.inv_cdf((i + 0.5) / DRAWS) for i in range(DRAWS // 2, DRAWS)])
    return np.concatenate([-upper[::-1], upper])


def _key(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scrambles 64-bit integers (the finaliser of SplitMix64, Steele et al. 2014)."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def bootstrapped(right: npt.NDArray[np.float32]) -> Floats:
    """Draws accuracies from what was right, image by image: a Bayesian bootstrap (Rubin 1981) over the images.

    Every candidate gets the same image weights, so that differences are paired, and equal rows get equal draws. Pseudo-images
    of weight 2 in all, of which a candidate has a half right that follows from its row, add what the plain bootstrap lacks: a
    prior. A candidate alone then has the posterior of a uniform prior, two that differ have Jeffreys' for which of them is
    right where one is, so that one image of difference is no certainty (0.82, not 1).

    Args:
        right: (k, images), 1 where right, 0 where wrong, between where a candidate is a mean over seeds.

    Returns:
        (k, DRAWS) per cent.
    """
    digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in right]
    first = {digest: i for i, digest in reversed(list(enumerate(digests)))}
    place = {digest: i for i, digest in enumerate(first)}
    rows = right[list(first.values())]  # equal rows once: the product is the cost
    if (rows != np.round(rows)).any():
        rows = _on_grid(rows.astype(np.float64), _SHARE_STEP)
    total, found = np.zeros(DRAWS), np.zeros((len(rows), DRAWS))
    rng = np.random.default_rng([_WEIGHTS_SEED, right.shape[1]])
    pseudo = _on_grid(rng.gamma(_PSEUDO_WEIGHT / _PSEUDO_IMAGES, size=(DRAWS, _PSEUDO_IMAGES)), _SHARE_STEP)
    keys = np.array([_key(digest) for digest in first], np.uint64)
    order = np.argsort(_mixed(keys[:, None] ^ _mixed(np.arange(_PSEUDO_IMAGES, dtype=np.uint64))[None, :]), axis=1)
    found += (order < _PSEUDO_IMAGES // 2).astype(np.float64) @ pseudo.T
    total += pseudo.sum(axis=1)
    for start in range(0, right.shape[1], _BLOCK):
        block = rows[:, start : start + _BLOCK]
        weights = _on_grid(rng.standard_exponential((DRAWS, block.shape[1]), dtype=np.float32), _WEIGHT_STEP)
        found += block @ weights.T
        total += weights.sum(axis=1, dtype=np.float64)
    return np.round(100.0 * (found / total), _DECIMALS)[[place[digest] for digest in digests]]


def _on_grid(values: npt.NDArray[Any], step: float) -> npt.NDArray[Any]:
    return np.round(values / step) * step  # a power of two: exact in both float types


def rounded(draws: Floats) -> Floats:
    """Rounds draws, so that what is equal up to the last bits is equal."""
    found: Floats = np.round(draws, _DECIMALS)
    return found


def counted(values: Floats, limit: Floats) -> Floats:
    """Returns ``values`` (k, ...) with the worst possible value where they are beyond ``limit`` (k,)."""
    edge = limit.reshape(-1, *[1] * (values.ndim - 1))
    return np.where(values > edge, WORST, values)
