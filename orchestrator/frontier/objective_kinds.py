"""What the objectives of a frontier mean for its statistics: which are exact, which are logarithms, where a speed stops counting.

Every axis is minimised. n candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.frontier import estimates
from orchestrator.frontier.candidates import Candidates
from orchestrator.frontier.draws import bootstrapped, normals, rounded
from orchestrator.frontier.estimates import Estimate
from orchestrator.frontier.membership import Drawn
from orchestrator.frontier.possible_members import Known
from orchestrator.frontier.quantiles import Z95
from orchestrator.ledger.columns import floats, integers
from orchestrator.ledger.snapshot import Snapshot
from orchestrator.study.constraints import DROPS
from workers.metrics import ACCURACIES, INTERVALS, OBJECTIVES, SPEED_OBJECTIVES

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]

SIZE = "size_bytes"

SIZE_RESOLUTION = 1e-3
"""Sizes that differ by less than this share are equal: the texts of two manifests differ by a few bytes."""


@dataclass(frozen=True)
class Axis:
    """One objective of n candidates.

    Attributes:
        source: objective that the column is told from; ``sign``: -1 where more of the source is better.
        value: (n,) to show, repeated measurements pooled.
        centre, sigma: (n,) mean and standard deviation on the scale that is minimised.
        limit: (n,) the strong baseline's speed: what is worse counts as the worst possible; infinite without one.
        found: None where the axis is exact.
    """

    source: str
    sign: float
    value: Floats
    centre: Floats
    sigma: Floats
    limit: Floats
    found: Estimate | None = None

    @property
    def timed(self) -> bool:
        """It is a measured speed."""
        return self.found is not None and self.source in SPEED_OBJECTIVES

    def known(self, rows: Numbers, simulated: Mask) -> Known:
        """Returns what pruning needs of some candidates."""
        centre, limit = self.centre[rows], self.limit[rows]
        return Known(self._claimed(centre, limit, simulated[rows]), self.sigma[rows], limit)

    def drawn(
        self, snapshot: Snapshot, candidates: Candidates, rows: Numbers, names: Sequence[str], simulated: Mask
    ) -> Drawn:
        """Draws the axis for some candidates; ``names`` are their trial ids."""
        centre, limit = self.centre[rows], self.limit[rows]
        if self.found is None:
            return Drawn(centre[:, None], limit)
        draws = None
        if self.source in ACCURACIES and not self.found.exact[rows].any():
            draws = _example_by_example(self.source, self.found.some(rows), snapshot, candidates, rows)
        if draws is None:
            things = _things(snapshot, candidates, rows) if self.timed else names
            noise = normals([f"{name} {self.source}" for name in things])
            draws = centre[:, None] + self.sigma[rows][:, None] * noise
        else:
            draws = self.sign * draws
        return Drawn(self._claimed(rounded(draws), limit[:, None], simulated[rows][:, None]), limit, self.timed)

    def _claimed(self, values: Floats, limit: Floats, simulated: Mask) -> Floats:
        """Lets a simulated speed be the strong baseline's at best."""
        least = np.where(simulated & np.isfinite(limit), limit, -np.inf)
        return np.maximum(values, least) if self.timed else values


def source_of(name: str) -> tuple[str, bool]:
    """Returns the objective that a column is told from, and whether more of the one is less of the other."""
    if name in DROPS:
        return DROPS[name], True
    source = name.removesuffix("_ratio")
    return (source if source in OBJECTIVES else name), False


def read_axes(
    snapshot: Snapshot, candidates: Candidates, objectives: Sequence[str], directions: Sequence[str]
) -> list[Axis]:
    """Returns the objectives of all candidates as axes; exact ones where no candidate has an interval."""
    table, measured = candidates.table, {}
    for source in sorted({source_of(name)[0] for name in objectives} & set(INTERVALS)):
        if table[f"{source}_low"].null_count < len(table):
            trials, of = candidates.trials(snapshot, [*estimates.columns_of(source), "trial_id"])
            measured[source] = estimates.estimate(source, snapshot, trials, of, len(table))
    axes = []
    for name, direction in zip(objectives, directions, strict=True):
        source, reverse = source_of(name)
        sign = 1.0 if direction == "minimize" else -1.0
        value = floats(table[name])
        if source in measured:
            axes.append(_measured(name, -sign if reverse else sign, direction, value, measured[source]))
            continue
        cost = sign * (snapped(value) if measured and source == SIZE else value)
        axes.append(Axis(source, sign, value, cost, np.zeros(len(value)), np.full(len(value), np.inf)))
    return axes


def pooled(name: str, value: Floats, found: Estimate) -> Floats:
    """Returns the values of a column with repeated measurements pooled in."""
    if name in INTERVALS:
        return found.point
    return found.ratio if name.removesuffix("_ratio") in SPEED_OBJECTIVES else value


def _measured(name: str, sign: float, direction: str, value: Floats, found: Estimate) -> Axis:
    source = source_of(name)[0]
    shown = np.where(np.isnan(value), np.nan, pooled(name, value, found))
    endless = np.full(len(value), np.inf)
    if source in ACCURACIES:
        centre = np.where(np.isnan(value), np.nan, sign * found.point)
        sigma = np.where(found.exact, 0.0, (found.high - found.low) / 2 / Z95)
        return Axis(source, sign, shown, centre, sigma, endless, found)
    with np.errstate(divide="ignore", invalid="ignore"):
        centre, limit = rounded(sign * np.log(shown)), rounded(sign * np.log(shown / found.ratio))
    if name != source:  # over the baseline
        limit = np.where(np.isnan(limit), np.nan, 0.0)
    counts = source in SPEED_OBJECTIVES and direction == OBJECTIVES[source]
    limit = np.where(found.exact | np.isnan(limit), np.inf, limit) if counts else endless
    return Axis(source, sign, shown, centre, found.sigma, limit, found)


def snapped(sizes: Floats) -> Floats:
    """Returns sizes with those within :data:`SIZE_RESOLUTION` of a smaller one made equal to it, from the smallest up."""
    found = sizes.copy()
    order = np.argsort(sizes, kind="stable")
    ascending = sizes[order][: int(np.sum(~np.isnan(sizes)))]
    start = 0
    while start < len(ascending):
        edge = ascending[start] + abs(ascending[start]) * SIZE_RESOLUTION
        stop = max(int(np.searchsorted(ascending, edge, side="left")), start + 1)
        found[order[start:stop]] = ascending[start]
        start = stop
    return found


def _things(snapshot: Snapshot, candidates: Candidates, rows: Numbers) -> list[str]:
    """Names whose measurements the speeds of candidates are: what shares a measurement shares its error, too."""
    trials, of = candidates.trials(snapshot, ["trial_id", "speed_of"], rows)
    found: list[set[str]] = [set() for _ in range(len(rows))]
    for place, thing in zip(of.tolist(), estimates.measured_things(trials).to_pylist(), strict=True):
        found[place].add(thing)
    return ["+".join(sorted(things)) for things in found]


def _example_by_example(
    name: str, found: Estimate, snapshot: Snapshot, candidates: Candidates, rows: Numbers
) -> Floats | None:
    """Draws an accuracy, the examples drawn for all candidates together; None where the ledger does not say how each did."""
    trials, of = candidates.trials(snapshot, ["trial_id", "attempt_id", "seed", name], rows)
    scores = estimates.example_scores(name, snapshot, trials)
    if scores is None:
        return None
    shares = np.zeros((len(rows), scores.shape[1]), np.float32)
    np.add.at(shares, of, scores)
    shares /= np.bincount(of, minlength=len(rows))[:, None].astype(np.float32)
    draws = bootstrapped(shares)
    if found.seed_sigma.any():
        draws = draws + estimates.seed_noise(floats(trials[name]), integers(trials["seed"]), of, found)
    return draws
