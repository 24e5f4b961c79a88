"""One quantity that is learnt: on which scale, with which numbers, and what is predicted of recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import rankdata

from orchestrator.sampling.gaussian_process import PRIOR, Process, Products, fit, leave_one_out

Array = NDArray[np.float64]

SCALES = ("raw", "log", "ranked")
"""Values as they are; their logarithms, where all are positive; the worse half replaced by normal scores of its ranks, so that
what fails badly does not decide what is thought of the better half."""

CLEARLY = 0.01
"""Rank correlation by which a later scale must predict better."""

INFLATION = 3.0
"""Most by which standard deviations are widened where predictions left out were farther off than they claimed."""


@dataclass(frozen=True)
class Fitted:
    """What was learnt of a quantity, in plain numbers: its scale, the process's five numbers, how much too sure it was."""

    scale: str
    theta: tuple[float, ...]
    inflation: float

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Self:
        """Reads what :meth:`to_list` wrote."""
        return cls(str(values[0]), tuple(map(float, values[2:])), float(values[1]))

    def to_list(self) -> list[Any]:
        """Returns plain values."""
        return [self.scale, self.inflation, *self.theta]


def forward(scale: str, y: Array) -> Array:
    """Returns values (n,) on a scale."""
    if scale == "log":
        return np.log(y)
    if scale == "raw":
        return y
    middle = np.median(y)
    good = y <= middle
    spread = float(np.sqrt(np.mean((y[good] - middle) ** 2))) or float(np.std(y)) or 1.0
    found = y.copy()
    found[~good] = middle + spread * np.maximum(ndtri((rankdata(y)[~good] - 0.5) / len(y)), 0.0)
    return found


def backward(scale: str, z: Array) -> Array:
    """Returns values on a scale in the objective's own units; ranks stay, of which the better half are values."""
    return np.exp(np.minimum(z, 700.0)) if scale == "log" else z


def learn(y: Array, products: Products, before: Fitted | None, scales: Sequence[str] = SCALES) -> Fitted:
    """Fits a process on each scale; returns that which predicts the better half best when it is left out.

    Args:
        y: (n,) values, less is better.
        products: of the points with themselves.
        before: the last fit, from which the search for the five numbers starts.
        scales: those that are tried, the simplest first.
    """
    start = np.array(before.theta) if before else PRIOR
    good = y <= np.median(y)
    best: tuple[float, Fitted] | None = None
    for scale in scales:
        if scale == "log" and y.min() <= 0:
            continue
        z = _standardised(forward(scale, y))
        theta = fit(start, products, z)
        predicted, off = leave_one_out(theta, products, z)
        quality = _correlation(predicted[good], y[good])
        wide = min(max(float(np.sqrt(np.mean(off[good] ** 2))), 1.0), INFLATION)
        if best is None or quality > best[0] + CLEARLY:
            best = quality, Fitted(scale, tuple(map(float, theta)), wide)
    assert best is not None  # raw values can always be tried
    return best[1]


def _standardised(z: Array) -> Array:
    found: Array = (z - z.mean()) / (z.std() + 1e-12)
    return found


def _correlation(one: Array, other: Array) -> float:
    first, second = rankdata(one), rankdata(other)
    if first.std() == 0 or second.std() == 0:
        return -1.0
    return float(np.corrcoef(first, second)[0, 1])


class Target:
    """A quantity with its points: predicts it of other recipes."""

    def __init__(self, fitted: Fitted, products: Products) -> None:
        self.fitted = fitted
        self.process = Process(np.array(fitted.theta), products)

    def predict(self, products: Products, prior: Array, y: Array) -> tuple[Array, Array]:
        """Predicts on the scale of the fit.

        Args:
            products: of the points with the recipes: (points, m).
            prior: prior variances of the recipes: (m,).
            y: values of the points: (known,), the first of them; those after have none yet and only make the nearby surer.

        Returns:
            means and standard deviations, (m,) each.
        """
        z = forward(self.fitted.scale, y)
        middle, spread = z.mean(), z.std() + 1e-12
        across = products.covariance(self.process.theta)
        known = self.process.mean(across, (z - middle) / spread)
        deviation = self.process.deviation(across, prior) * spread * self.fitted.inflation
        return known * spread + middle, deviation
