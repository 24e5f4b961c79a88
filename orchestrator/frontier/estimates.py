"""From trials to what is known of candidates: value, 95 % interval, standard deviation; over seeds and repeated measurements.

A candidate is one recipe, or one trial, with one row a seed. Vectorised, since a ledger may hold a million rows. Shapes: t
trials, n candidates; ``of`` is (t,) the candidate of each trial.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.frontier.draws import normals, rounded
from orchestrator.frontier.quantiles import Z95, t975
from orchestrator.ledger.columns import booleans, floats, group_numbers
from orchestrator.ledger.schema import metric_of
from orchestrator.ledger.snapshot import Snapshot
from workers.metrics import ACCURACIES, INTERVALS, METRICS, OBJECTIVES, SPEED_OBJECTIVES

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

LEVELS = np.array([0.0, 0.3, 0.6, 0.9, 1.0], np.float32)
"""Score of a VQA answer by how many of the ten annotators gave it, 4 or more being one."""


@dataclass(frozen=True)
class Estimate:
    """One measured objective of n candidates.

    Attributes:
        point: mean over seeds, repeated measurements pooled; NaN where unknown.
        low, high: 95 % interval; NaN where the value is exact.
        sigma: standard deviation, of the logarithm except for accuracy; 0 where exact.
        ratio: over the strong baseline; NaN where unknown and for what is no speed.
        seed_sigma: of an accuracy, standard deviation of the seeds times the factor that makes its interval Student's.
    """

    point: Floats
    low: Floats
    high: Floats
    sigma: Floats
    ratio: Floats
    seed_sigma: Floats

    @property
    def exact(self) -> npt.NDArray[np.bool_]:
        """(n,) True where there is no interval."""
        return np.isnan(self.low) | np.isnan(self.high)

    def some(self, rows: Numbers) -> Estimate:
        """Returns the estimates of some candidates."""
        return Estimate(*(getattr(self, field.name)[rows] for field in fields(self)))

    def slower(self, name: str) -> npt.NDArray[np.bool_]:
        """Says where the whole interval of the speed ``name`` is on the slow side of the strong baseline; (n,)."""
        with np.errstate(invalid="ignore"):
            if OBJECTIVES[name] == "minimize":
                return np.asarray(self.low / self.point * self.ratio > 1)
            return np.asarray(self.high / self.point * self.ratio < 1)


def columns_of(name: str) -> list[str]:
    """Returns the columns of ``trials`` that :func:`estimate` needs for the objective ``name``."""
    more = [f"{name}_ratio", "is_baseline", "speed_of"] if name in SPEED_OBJECTIVES else []
    return [name, f"{name}_low", f"{name}_high", *more]


def estimate(name: str, snapshot: Snapshot, trials: pa.Table, of: Numbers, count: int) -> Estimate:
    """Estimates an objective of ``metrics.INTERVALS``.

    Args:
        trials: (t,) rows with :func:`columns_of`, and ``trial_id``, which is looked at only if something was measured again, or a
            speed is another trial's: seeds that share one measurement are one sample of it.
        count: n.
    """
    assert name in INTERVALS
    value, low, high = (floats(trials[c]) for c in (name, f"{name}_low", f"{name}_high"))
    if name in ACCURACIES:
        return _accuracy(value, low, high, of, count)
    ratio = np.full(len(of), np.nan)
    again = (np.empty(0, np.int64), np.empty(0))
    if name in SPEED_OBJECTIVES:
        baseline = booleans(trials["is_baseline"])
        ratio = np.where(baseline, 1.0, floats(trials[f"{name}_ratio"]))
        things = measured_things(trials)
        rows = _distinct(things, of) if trials["speed_of"].null_count < len(trials) else np.arange(len(of))
        again = _measured_again(snapshot, METRICS[name].record, things, rows)
        value, low, high, ratio, of = value[rows], low[rows], high[rows], ratio[rows], of[rows]
    return _ratio_scale(value, low, high, ratio, again, of, count)


def measured_things(trials: pa.Table) -> pa.ChunkedArray:
    """Returns whose measurement the speeds of each trial are: its own, or that of an equal structure.

    Args:
        trials: with ``trial_id`` and ``speed_of``.
    """
    if trials["speed_of"].null_count == len(trials):
        return trials["trial_id"]
    return pc.coalesce(trials["speed_of"], trials["trial_id"])


def _distinct(things: pa.ChunkedArray, of: Numbers) -> Numbers:
    """Returns the first trial of each candidate with each measurement, ascending."""
    number, _ = group_numbers(things)
    order = np.lexsort((number, of))
    new = np.r_[True, (np.diff(of[order]) != 0) | (np.diff(number[order]) != 0)]
    return np.sort(order[new[: len(order)]])


def _measured_again(snapshot: Snapshot, kind: str, things: pa.ChunkedArray, rows: Numbers) -> tuple[Numbers, Floats]:
    """Returns the places in ``rows`` of the trials that were measured again and the logarithms of the ratios found; what was
    found of one thing goes to all that it is the measurement of."""
    added = snapshot.added(kind)
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log(floats(added["ratio"]))
    if not len(added) or not len(rows):
        return np.empty(0, np.int64), np.empty(0)
    numbers, _ = group_numbers(pa.chunked_array([*things.chunks, *added["trial_id"].chunks], pa.string()))
    own = numbers[: len(things)][rows]
    order = np.argsort(own, kind="stable")
    asked = numbers[len(things) :]
    start, stop = (np.searchsorted(own[order], asked, side=side) for side in ("left", "right"))
    many = np.where(np.isfinite(log), stop - start, 0)
    place = np.arange(many.sum()) + np.repeat(start - (np.cumsum(many) - many), many)
    return order[place], np.repeat(log, many)


@np.errstate(divide="ignore", invalid="ignore")  # a value of 0 has no logarithm; exact ones need none
def _ratio_scale(
    value: Floats, low: Floats, high: Floats, ratio: Floats, again: tuple[Numbers, Floats], of: Numbers, count: int
) -> Estimate:
    """Pools logarithms: each trial's own record and those of ``again``; seeds are repeated measurements too.

    The standard deviation of one record is the row's, or that which the records show if it is larger; that of the mean is
    smaller by the square root of their number.
    """
    rows, logs = again
    own, base = np.log(value), np.log(value / ratio)
    stated = (np.log(high) - np.log(low)) / 2 / Z95
    records = np.concatenate([own, base[rows] + logs])
    record_of = np.concatenate([np.arange(len(of)), rows])
    many = np.bincount(record_of, minlength=len(of))
    pooled = np.bincount(record_of, weights=records, minlength=len(of)) / many
    seeds = np.bincount(of, minlength=count)
    point = np.bincount(of, weights=np.exp(pooled), minlength=count) / seeds
    total = np.bincount(of, weights=many, minlength=count)
    centre = np.bincount(of[record_of], weights=records, minlength=count) / total
    squares = np.bincount(of[record_of], weights=(records - centre[of[record_of]]) ** 2, minlength=count)
    seen = np.where(total > 1, squares / np.maximum(total - 1, 1), 0.0)
    variance = np.bincount(of, weights=np.nan_to_num(stated) ** 2, minlength=count) / seeds
    has = np.bincount(of, weights=~np.isnan(stated), minlength=count) > 0
    sigma = np.where(has, np.sqrt(np.maximum(variance, seen) / total), 0.0)
    single = np.zeros(count, np.bool_)
    single[of] = total[of] == 1
    ends = []
    for sign, stored in ((-1, low), (1, high)):
        only = np.bincount(of, weights=stored, minlength=count)
        ends.append(np.where(has, np.where(single, only, point * np.exp(sign * Z95 * sigma)), np.nan))
    over = point / (np.bincount(of, weights=value / ratio, minlength=count) / seeds)
    point = np.where(single, np.bincount(of, weights=value, minlength=count), point)  # not its own exp(log)
    return Estimate(point, ends[0], ends[1], sigma, over, np.zeros(count))


def _accuracy(value: Floats, low: Floats, high: Floats, of: Numbers, count: int) -> Estimate:
    """The interval over the examples (the seeds have seen the same ones) and that over the seeds, independent of each other."""
    seeds = np.bincount(of, minlength=count)
    point, below, above = (np.bincount(of, weights=x, minlength=count) / seeds for x in (value, low, high))
    squares = np.bincount(of, weights=(value - point[of]) ** 2, minlength=count)
    spread = np.sqrt(squares / np.maximum(seeds - 1, 1)) * np.where(
        seeds > 1, t975(np.maximum(seeds - 1, 1)) / Z95, 0.0
    )
    has = ~np.isnan(below) & ~np.isnan(above)
    spread = np.where(has, spread, 0.0)
    over_seeds = Z95 * spread / np.sqrt(seeds)
    return Estimate(
        point=point,
        low=np.where(has, point - np.hypot(point - below, over_seeds), np.nan),
        high=np.where(has, point + np.hypot(above - point, over_seeds), np.nan),
        sigma=np.where(has, np.nan_to_num(above - below) / 2 / Z95, 0.0),
        ratio=np.full(count, np.nan),
        seed_sigma=spread,
    )


# --- accuracy, example by example -------------------------------------------------------------------------------------


def example_scores(name: str, snapshot: Snapshot, trials: pa.Table) -> npt.NDArray[np.float32] | None:
    """Reads how right each trial had every example of the search split, in the measure of one accuracy.

    Args:
        name: of ``metrics.ACCURACIES``.
        trials: with ``trial_id`` and ``attempt_id``.

    Returns:
        (t, examples) from 0 to 1: right or wrong, of VQA the values of :data:`LEVELS`; None where a trial has no such
        record, or they are over different numbers of examples.
    """
    ids = trials["trial_id"].combine_chunks()
    found = snapshot.records("accuracy_search", ids, ["attempt_id", "conditions"])
    attempts = {attempt: i for i, attempt in enumerate(trials["attempt_id"].to_pylist())}
    rows: list[npt.NDArray[np.float32] | None] = [None] * len(trials)
    for attempt, text in zip(found["attempt_id"].to_pylist(), found["conditions"].to_pylist(), strict=True):
        conditions = json.loads(text or "{}")
        if attempt in attempts and metric_of(conditions) == name:
            rows[attempts[attempt]] = _scores(conditions)
    known = [row for row in rows if row is not None]
    if not rows or len(known) < len(rows) or len({len(row) for row in known}) > 1:
        return None
    return np.stack(known)


def _scores(conditions: Mapping[str, Any]) -> npt.NDArray[np.float32] | None:
    try:
        examples = int(conditions["images"])
        if "levels" in conditions:
            levels = np.frombuffer(conditions["levels"].encode(), np.uint8) - ord("0")
            return LEVELS[levels] if len(levels) == examples else None
        packed = np.frombuffer(bytes.fromhex(conditions["correct_bits"]), np.uint8)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        return None
    if len(packed) != (examples + 7) // 8:
        return None
    return np.unpackbits(packed, count=examples).astype(np.float32)


def seed_noise(values: Floats, seeds: Numbers, of: Numbers, found: Estimate) -> Floats:
    """Draws what the choice of the seeds adds to mean accuracies, (n, DRAWS), with the interval of Student's t.

    Every seed has one noise for all candidates, so that differences are paired by seed and equal results stay equal.

    Args:
        values, seeds: (t,) accuracy and seed of each trial.
    """
    names, place = np.unique(seeds, return_inverse=True)
    noise = normals([f"seed {seed}" for seed in names.tolist()])[place]
    count = np.bincount(of, minlength=len(found.point))
    squares = np.bincount(of, weights=(values - found.point[of]) ** 2, minlength=len(count))
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(squares > 0, found.seed_sigma / np.sqrt(squares * count), 0.0)
    drawn = np.zeros((len(count), noise.shape[1]))
    np.add.at(drawn, of, (scale[of] * (values - found.point[of]))[:, None] * noise)
    return rounded(drawn)
