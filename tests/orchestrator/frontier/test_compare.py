"""The test of whether two models err on different images, against the binomial distribution."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from orchestrator.frontier.compare import paired_test


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 0), (3, 9), (20, 41), (300, 340)])
def test_mid_p(b, c):
    n = b + c
    coin = stats.binom(n, 0.5)
    expected = 1.0 if b == c else 2 * coin.cdf(min(b, c)) - coin.pmf(min(b, c))
    assert paired_test(np.repeat([10, -10], [c, b])) == (pytest.approx(expected), "McNemar")
