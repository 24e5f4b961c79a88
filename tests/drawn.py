"""Exact numbers, speeds and rows of right and wrong images for the tests of uncertain frontiers."""

from __future__ import annotations

import math

import numpy as np

from orchestrator.frontier.draws import DRAWS, normals, rounded
from orchestrator.frontier.membership import Drawn

MONTE_CARLO = 3.5 * 0.5 / math.sqrt(DRAWS)
"""Three and a half standard errors of a probability."""


def exact(*values):
    return Drawn(np.array(values, np.float64)[:, None], np.full(len(values), np.inf))


def speed(log, sigma, names=None, limit=np.inf):
    log, sigma = np.asarray(log, np.float64), np.broadcast_to(sigma, len(log))
    names = names or [f"speed {i}" for i in range(len(log))]
    return Drawn(rounded(log[:, None] + sigma[:, None] * normals(names)), np.full(len(log), limit), timed=True)


def images(total, *wrong):
    """Rows of right and wrong images; each of ``wrong`` lists the wrong ones."""
    rows = np.ones((len(wrong), total), np.float32)
    for row, which in zip(rows, wrong, strict=True):
        row[list(which)] = 0
    return rows
