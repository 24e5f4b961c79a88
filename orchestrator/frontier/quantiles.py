"""Quantiles of the normal distribution, Student's t and the studentised range. A pure leaf."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

Z95 = NormalDist().inv_cdf(0.975)
"""Standard deviations from the centre to an end of a 95 % interval."""

_RANGE = {
    2: 2.7718, 3: 3.5580, 4: 4.0641, 5: 4.4382, 6: 4.7342, 7: 4.9786, 8: 5.1861, 9: 5.3661, 10: 5.5248, 12: 5.7944, 14: 6.0176,
    17: 6.2928, 20: 6.5181, 25: 6.8205, 30: 7.0617, 40: 7.4322, 50: 7.7114, 70: 8.1200, 100: 8.5377, 150: 8.9950, 200: 9.3090,
    300: 9.7379, 500: 10.2576, 1000: 10.9299, 2000: 11.5690, 5000: 12.3699, 10000: 12.9468,
}  # fmt: skip
"""95 % quantiles of the studentised range of so many equal things (Tukey; tables: Harter 1960), whose common deviation four A/A
runs told, the fewest of a named protocol; in deviations that Student's t has widened for the same reason, by t975(4) / 1.96.
With more runs it is too wide by a tenth at most. Linear in the logarithm of the count between, within 0.01."""

_T975 = (
    12.7062,
    4.3027,
    3.1824,
    2.7764,
    2.5706,
    2.4469,
    2.3646,
    2.3060,
    2.2622,
    2.2281,
    2.2010,
    2.1788,
    2.1604,
    2.1448,
)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


def t975(dof: npt.ArrayLike) -> Floats:
    """Returns the 97.5 % quantile of Student's t; ``dof`` are whole numbers of 1 or more.

    Beyond the table it is Fisher's expansion in 1/dof (Abramowitz and Stegun 26.7.5), within 2e-5 there.
    """
    degrees = np.asarray(dof, np.int64)
    large = np.maximum(degrees, len(_T975) + 1).astype(np.float64)
    z = Z95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    expansion = z + first / large + second / large**2 + third / large**3
    return np.where(degrees <= len(_T975), np.array(_T975)[np.minimum(degrees, len(_T975)) - 1], expansion)


def floor_width(count: npt.ArrayLike) -> Floats:
    """Returns how many standard deviations of their difference the farthest two of ``count`` equal things may lie apart.

    With probability 0.95 they lie no farther: 1.96 for two, 4.10 for twelve. Deviations are those of Student intervals.
    """
    counts, quantiles = (np.array(column) for column in zip(*_RANGE.items(), strict=True))
    found: Floats = np.interp(np.log(np.asarray(count)), np.log(counts), quantiles) / math.sqrt(2)
    return found
