"""Frontiers of numbers that are known only up to an interval: draws, pruning, groups, probabilities. A pure leaf over
arrays: it knows no ledger and no study. docs/decisions/0013-certain-frontier.md has the argument.

Everything here is minimised: accuracies and throughputs come with their sign turned, ratio scales (speeds, memory) as
logarithms. Shapes: n candidates, k of them that may matter, m objectives, ``DRAWS`` joint draws.

A draw is one possible world: a value for every candidate in every objective. In each world dominance is the usual one, so
what is dominated in every world can be left out without changing any other candidate's status in any world. Longer than
other files, since pruning, groups and probabilities hold only together, for one and the same draws.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from orchestrator.frontier import nondominated, nondominated_share

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]

DRAWS = 1000
"""Joint draws. The standard error of a probability of 0.95 is 0.007."""

CERTAIN = 0.95
POSSIBLE = 0.05
"""Probabilities of being non-dominated from which a group is a certain, and a possible, member of the frontier."""

Z95 = NormalDist().inv_cdf(0.975)
"""Standard deviations from the centre to an end of a 95 % interval."""

WORST = np.inf
"""What a speed counts as that is beyond its limit."""

_DECIMALS = 10
"""Draws are rounded to these, so that the mean of equal draws is that draw: dominance asks for equality."""

HOPELESS = 5.0
"""Standard deviations of a difference. Who is worse than one and the same other candidate by so much in everything uncertain,
and no better in anything exact, is dominated by it in every draw."""

MOST = 5000
"""Candidates that are drawn at most. Time and memory of the whole grow with their number times :data:`DRAWS`, that of grouping
with the square of how many are equal in everything exact."""

_SAMPLE = 4000
"""Candidates by which :func:`contenders` chooses where to stop."""

_AT_ONCE = 50
"""Draws whose frontiers are found at once: a few megabytes."""

_PSEUDO_IMAGES = 64
_PSEUDO_WEIGHT = 2.0
"""Prior weight of :func:`bootstrapped`, in images, and over how many images it is spread."""

_WEIGHTS_SEED = 20317
_BLOCK = 8192
"""Images that are drawn and multiplied at once."""

_ROWS = 512
"""Rows of a table of pairs that are computed at once."""

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


# --- quantiles --------------------------------------------------------------------------------------------------------


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


# --- draws ------------------------------------------------------------------------------------------------------------


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
    rows = right[list(first.values())]  # equal rows once: a matrix product may round equal rows differently
    total, found = np.zeros(DRAWS), np.zeros((len(rows), DRAWS))
    rng = np.random.default_rng([_WEIGHTS_SEED, right.shape[1]])
    pseudo = rng.gamma(_PSEUDO_WEIGHT / _PSEUDO_IMAGES, size=(DRAWS, _PSEUDO_IMAGES))
    keys = np.array([_key(digest) for digest in first], np.uint64)
    order = np.argsort(_mixed(keys[:, None] ^ _mixed(np.arange(_PSEUDO_IMAGES, dtype=np.uint64))[None, :]), axis=1)
    found += (order < _PSEUDO_IMAGES // 2).astype(np.float64) @ pseudo.T
    total += pseudo.sum(axis=1)
    for start in range(0, right.shape[1], _BLOCK):
        block = rows[:, start : start + _BLOCK]
        weights = rng.standard_exponential((DRAWS, block.shape[1]), dtype=np.float32)
        found += block @ weights.T
        total += weights.sum(axis=1, dtype=np.float64)
    return np.round(100.0 * (found / total), _DECIMALS)[[place[digest] for digest in digests]]


def rounded(draws: Floats) -> Floats:
    """Rounds draws, so that what is equal up to the last bits is equal."""
    found: Floats = np.round(draws, _DECIMALS)
    return found


def counted(values: Floats, limit: Floats) -> Floats:
    """Returns ``values`` (k, ...) with the worst possible value where they are beyond ``limit`` (k,)."""
    edge = limit.reshape(-1, *[1] * (values.ndim - 1))
    return np.where(values > edge, WORST, values)


# --- pruning ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """What is known of one objective of n candidates without drawing.

    Attributes:
        centre, sigma: (n,) mean and standard deviation, 0 where exact.
        limit: (n,) beyond which a draw counts as the worst possible value; infinite for no limit.
    """

    centre: Floats
    sigma: Floats
    limit: Floats

    def some(self, rows: Numbers) -> Known:
        """Returns the objective for some candidates."""
        return Known(self.centre[rows], self.sigma[rows], self.limit[rows])


def front(objectives: Sequence[Known]) -> Numbers:
    """Returns the candidates that would be the frontier if every objective were what it seems."""
    seeming = np.stack([counted(o.centre, o.limit) for o in objectives], axis=1)
    return np.flatnonzero(nondominated(seeming, ["minimize"] * len(objectives)))


def contenders(objectives: Sequence[Known], rivals: Numbers, most: int) -> Numbers:
    """Returns the candidates that no rival is better than beyond doubt, ascending; rivals are always among them.

    What is left out is dominated in every draw by a rival, which in each draw dominates whatever the other one dominates. So
    leaving it out changes nothing. Where more than ``most`` would be left, those go too that a rival dominates most probably,
    until about so many are left; then the probability of what stays is an upper bound.

    Args:
        rivals: of :func:`front`.
    """
    left = _left(objectives, rivals)
    if len(left) <= max(most, len(rivals)):
        return left
    remaining, heads = [o.some(left) for o in objectives], np.searchsorted(left, rivals)
    order = np.lexsort([o.centre for o in remaining])
    sample = np.union1d(heads, order[:: max(1, len(left) // _SAMPLE)])
    doubts = np.sort(_doubt([o.some(sample) for o in remaining], np.searchsorted(sample, heads), 0.0))[::-1]
    share = (len(left) - len(rivals)) / max(len(sample) - len(rivals), 1)
    wanted = len(rivals) + int((most - len(rivals)) / share) if most > len(rivals) else len(rivals)
    kept: Numbers = left[_doubt(remaining, heads, doubts[wanted]) > doubts[wanted]]
    return kept


def _left(objectives: Sequence[Known], rivals: Numbers) -> Numbers:
    """Returns those that no rival is :data:`HOPELESS` standard deviations better than."""
    columns = [(o.centre, o.sigma, o.centre - o.limit >= HOPELESS * o.sigma) for o in objectives]
    left = np.arange(len(objectives[0].centre))
    for rival in rivals.tolist():
        as_good, better = np.ones(len(left), np.bool_), np.zeros(len(left), np.bool_)
        for o, (centre, sigma, beyond) in zip(objectives, columns, strict=True):
            difference = centre - o.centre[rival]
            clear = difference >= HOPELESS * np.hypot(sigma, o.sigma[rival])
            within = o.limit[rival] - o.centre[rival] >= HOPELESS * o.sigma[rival]
            as_good = as_good & (clear | beyond)
            better = better | (clear & (difference > 0) & within)
        keep = ~(as_good & better)
        if not keep.all():
            left = left[keep]
            columns = [(centre[keep], sigma[keep], beyond[keep]) for centre, sigma, beyond in columns]
    return left


def _doubt(objectives: Sequence[Known], rivals: Numbers, enough: float) -> Floats:
    """Returns how doubtful it is that a rival dominates each candidate, (n,): for the rival that does so most probably the
    negative logarithm of that probability, about (every objective by itself; a logistic curve for the normal one, within 0.01,
    Bowling et al. 2009). Infinite where none seems better anywhere, and for rivals. Exact only above ``enough``.
    """
    found = np.full(len(objectives[0].centre), np.inf)
    left = np.setdiff1d(np.arange(len(found)), rivals)
    columns = [(o.centre[left], o.sigma[left], o.centre[left] > o.limit[left]) for o in objectives]
    for rival in rivals.tolist():
        doubt, better = np.zeros(len(left)), np.zeros(len(left), np.bool_)
        for o, (centre, sigma, beyond) in zip(objectives, columns, strict=True):
            if o.centre[rival] > o.limit[rival]:
                doubt[~beyond] = np.inf
                continue
            difference, apart = centre - o.centre[rival], np.hypot(sigma, o.sigma[rival])
            sure = np.where(difference < 0, -np.inf, np.inf)
            distance = np.divide(difference, apart, out=sure, where=apart > 0)
            doubt += np.where(beyond, 0.0, np.logaddexp(0.0, -1.702 * distance))
            better |= beyond | (difference > 0)
        found[left] = np.minimum(found[left], np.where(better, doubt, np.inf))
        keep = found[left] > enough
        if not keep.all():
            left = left[keep]
            columns = [(centre[keep], sigma[keep], beyond[keep]) for centre, sigma, beyond in columns]
    return found


def shares(worlds: Sequence[Floats]) -> Floats:
    """Returns the share of draws in which each is non-dominated, (k,).

    Args:
        worlds: (k, DRAWS) of each objective, or (k, 1).
    """
    draws = max(values.shape[1] for values in worlds)
    wide = [np.broadcast_to(values, (len(values), draws)) for values in worlds]
    found = np.zeros(len(worlds[0]))
    for start in range(0, draws, _AT_ONCE):
        some = np.stack([values[:, start : start + _AT_ONCE] for values in wide])
        found += nondominated_share(some.transpose(2, 1, 0)) * some.shape[2]
    return np.asarray(found / draws)


# --- groups -----------------------------------------------------------------------------------------------------------


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


# --- the whole --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """One objective of k candidates.

    Attributes:
        values: (k, DRAWS), or (k, 1) where the objective is exact.
        limit: (k,) beyond which a draw counts as the worst possible value; infinite for no limit.
        timed: it is a speed, which measuring again can tell better.
    """

    values: Floats
    limit: Floats
    timed: bool = False

    @property
    def exact(self) -> bool:
        """The objective has no uncertainty."""
        return bool(self.values.shape[1] == 1)

    def some(self, rows: Numbers) -> Drawn:
        """Returns the objective for some candidates."""
        return Drawn(self.values[rows], self.limit[rows], self.timed)

    def counted(self) -> Floats:
        """Returns what the draws count as."""
        return counted(self.values, self.limit)

    def held(self) -> Drawn:
        """Returns the objective with every draw at its mean."""
        return Drawn(rounded(self.values.mean(axis=1, keepdims=True)), self.limit, self.timed)


@dataclass(frozen=True)
class Groups:
    """What the draws say.

    Attributes:
        group: (k,) number of each candidate's group.
        probability: (groups,) of being non-dominated.
        objectives: of the groups: means over their members.
    """

    group: Numbers
    probability: Floats
    objectives: Sequence[Drawn]

    def settled(self) -> Floats:
        """Returns the probabilities if every speed were known to be what it seems."""
        if not any(o.timed and not o.exact for o in self.objectives):
            return self.probability
        return shares([(o.held() if o.timed else o).counted() for o in self.objectives])

    def dominated_by(self, groups: Numbers, rivals: Numbers) -> Floats:
        """Returns the share of draws in which each of ``rivals`` dominates each of ``groups``, (groups, rivals)."""
        worlds = [o.counted() for o in self.objectives]
        theirs = [values[rivals] for values in worlds]
        found = np.zeros((len(groups), len(rivals)))
        for place, group in enumerate(groups.tolist()):
            as_good, better = np.ones((1, 1), np.bool_), np.zeros((1, 1), np.bool_)
            for values, rival in zip(worlds, theirs, strict=True):
                as_good, better = as_good & (rival <= values[group]), better | (rival < values[group])
            found[place] = (as_good & better).mean(axis=1)
        return found


def judged(objectives: Sequence[Drawn]) -> Groups:
    """Finds groups and probabilities.

    Time and memory are bounded by k of :data:`MOST` at most: k x DRAWS numbers an objective, a frontier of k points for each
    draw (k log k for two and three objectives), and for candidates that are equal in everything exact, K of them, K x K
    distances.

    Args:
        objectives: of k candidates, in an order that does not depend on the rows' order.
    """
    exact = [o.values[:, 0] for o in objectives if o.exact] or [np.zeros(len(objectives[0].limit))]
    blocks = np.unique(np.stack(exact, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    group = grouped([o.values for o in objectives if not o.exact], blocks)
    merged = [_merged(o, group) for o in objectives]
    return Groups(group, shares([o.counted() for o in merged]), merged)


def _merged(objective: Drawn, number: Numbers) -> Drawn:
    """Returns the means over the members of each group."""
    if objective.exact:  # equal within a group, and a mean of equal numbers may differ from them in the last bit
        first = np.unique(number, return_index=True)[1]
        return objective.some(first)
    size = np.bincount(number)
    total = np.zeros((len(size), objective.values.shape[1]))
    np.add.at(total, number, objective.values)
    edge = np.bincount(number, weights=np.where(np.isinf(objective.limit), 0.0, objective.limit)) / size
    without = np.bincount(number, weights=np.isinf(objective.limit)) > 0
    return Drawn(rounded(total / size[:, None]), np.where(without, np.inf, rounded(edge)), objective.timed)
