"""A Gaussian process over recipes: one objective, five numbers learnt, points added a row at a time.

The covariance of two recipes with features x and y, inner product ``p = s (1 + x y)`` and squared distance d, is
``a p + b p^2 + c exp(-d / l)``, and a noise on the diagonal: effects that add up, effects of pairs, and what is left, which
recipes share the more the nearer they are.

Source: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006): algorithm 2.1, section 5.4.1 (marginal
likelihood and its gradient), section 5.4.2 (leave-one-out in closed form), section 4.2.2 (linear and polynomial covariances).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, lapack, solve_triangular
from scipy.optimize import minimize

Array = NDArray[np.float64]

JITTER = 1e-6
"""Added to the diagonal, in units of the objective's variance, so that equal recipes can be factorised."""

PRIOR = np.log([0.5, 0.3, 0.3, 1.5, 0.03])
"""Centres of the normal priors, of standard deviation 2, of the logarithms of a, b, c, l and the noise's variance."""

PRIOR_SD = 2.0

BOUNDS = [(-7.0, 4.0), (-7.0, 4.0), (-7.0, 4.0), (-2.0, 4.0), (-9.0, 1.0)]

STEPS = 12
"""Most iterations of L-BFGS from the numbers of the last fit."""


@dataclass(frozen=True)
class Products:
    """What the covariance of two sets of recipes is made of: scaled inner products and squared distances, (n, m) each."""

    inner: Array
    distance: Array

    @classmethod
    def of(cls, one: Array, other: Array, scale: float) -> Products:
        """Calculates them from features (n, columns) and (m, columns)."""
        inner = one @ other.T
        squares = (one * one).sum(1)[:, None] + (other * other).sum(1)[None]
        return cls((1 + inner) * scale, np.maximum(squares - 2 * inner, 0.0))

    def covariance(self, theta: Array) -> Array:
        """Returns the covariances without noise, (n, m), for the logarithms ``theta`` of a, b, c, l and noise."""
        a, b, c, length = np.exp(theta[:4])
        found: Array = a * self.inner + b * self.inner * self.inner + c * np.exp(-self.distance / length)
        return found


def variances(features: Array, scale: float, theta: Array) -> Array:
    """Returns the prior variance of each recipe, without noise: (n,)."""
    a, b, c = np.exp(theta[:3])
    inner = (1 + (features * features).sum(1)) * scale
    found: Array = a * inner + b * inner * inner + c
    return found


def scale_of(features: Array) -> float:
    """Returns the scale of inner products that makes their mean on the diagonal one."""
    return float(1 / (1 + np.mean((features * features).sum(1))))


def noise(theta: Array) -> float:
    """Returns the variance on the diagonal."""
    return math.exp(theta[4]) + JITTER


def fit(start: Array, products: Products, y: Array) -> Array:
    """Returns the logarithms of the five numbers with the highest posterior, from ``start``.

    Args:
        products: of the points with themselves.
        y: (n,) with mean 0 and variance 1.
    """
    n, inner, distance = len(y), products.inner, products.distance
    squares = inner * inner

    def negative(theta: Array) -> tuple[float, Array]:
        a, b, c, length, own = np.exp(theta)
        decay = np.exp(-distance / length)
        covariance = a * inner + b * squares + c * decay
        covariance.flat[:: n + 1] += own + JITTER
        factor, failed = lapack.dpotrf(covariance, lower=1, clean=1)
        if failed:
            return 1e10, np.zeros(5)
        inverse = lapack.dpotri(factor, lower=1)[0]
        inverse = np.tril(inverse) + np.tril(inverse, -1).T
        alpha = inverse @ y
        slope = 0.5 * (inverse - np.outer(alpha, alpha))
        gradient = np.array(
            [
                a * np.vdot(slope, inner),
                b * np.vdot(slope, squares),
                c * np.vdot(slope, decay),
                c * np.vdot(slope, decay * distance) / length,
                own * np.trace(slope),
            ]
        )
        away = (theta - PRIOR) / PRIOR_SD
        value = 0.5 * y @ alpha + np.log(np.diag(factor)).sum() + 0.5 * away @ away
        return float(value), gradient + away / PRIOR_SD

    found = minimize(negative, start, jac=True, method="L-BFGS-B", bounds=BOUNDS, options={"maxiter": STEPS})
    best: Array = found.x
    return best


def leave_one_out(theta: Array, products: Products, y: Array) -> tuple[Array, Array]:
    """Returns what the others predict of each point, and by how many standard deviations it is off: (n,) each."""
    covariance = products.covariance(theta)
    covariance.flat[:: len(y) + 1] += noise(theta)
    inverse = np.linalg.inv(covariance)
    alpha, diagonal = inverse @ y, np.diag(inverse)
    return y - alpha / diagonal, alpha / np.sqrt(diagonal)


class Process:
    """A process with its numbers fixed, that takes points as they come.

    Points after the first ones are rows added to the Cholesky factor one by one: it does not depend on how many came at once.
    """

    def __init__(self, theta: Array, products: Products) -> None:
        self.theta = theta
        covariance = products.covariance(theta)
        covariance.flat[:: len(covariance) + 1] += noise(theta)
        self.size = len(covariance)
        self._factor = np.asfortranarray(np.linalg.cholesky(covariance))

    def truncate(self, size: int) -> None:
        """Forgets all points but the first ``size``."""
        self.size = min(self.size, size)

    def add(self, products: Products) -> None:
        """Adds points: ``products`` are of the new ones (k) with all, themselves the last: (k, size + k)."""
        rows = products.covariance(self.theta)
        total = self.size + len(rows)
        if total > len(self._factor):
            grown = np.zeros((total + 64, total + 64), order="F")
            grown[: self.size, : self.size] = self.factor
            self._factor = grown
        for row, i in zip(rows, range(self.size, total), strict=True):
            across = solve_triangular(self._factor[:i, :i], row[:i], lower=True, check_finite=False)
            self._factor[i, :i] = across
            self._factor[i, i] = math.sqrt(max(row[i] + noise(self.theta) - across @ across, 1e-8))
        self.size = total

    @property
    def factor(self) -> Array:
        """The lower Cholesky factor of the points' covariance: (size, size)."""
        return self._factor[: self.size, : self.size]

    def mean(self, across: Array, y: Array) -> Array:
        """Returns posterior means, (m,), for covariances (size, m) with the points, and standardised values of the first of them.

        Points after the first ``len(y)`` have no values yet; believing what is predicted of them changes no mean.
        """
        n = len(y)
        found: Array = cho_solve((self.factor[:n, :n], True), y, check_finite=False) @ across[:n]
        return found

    def deviation(self, across: Array, prior: Array) -> Array:
        """Returns posterior standard deviations without noise, (m,), for covariances (size, m) and prior variances (m,)."""
        known = solve_triangular(self.factor, across, lower=True, check_finite=False)
        found: Array = np.sqrt(np.maximum(prior - (known * known).sum(0), 1e-9))
        return found
