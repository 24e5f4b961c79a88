"""Trials side by side: what differs in their recipes, and whether noise tells their numbers apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.frontier import estimates
from orchestrator.frontier.candidates import ROW, Candidates, simulated
from orchestrator.frontier.objective_kinds import Axis, read_axes
from orchestrator.frontier.quantiles import floor_width
from orchestrator.ledger import Ledger, Snapshot
from orchestrator.ledger.columns import to_arrow
from orchestrator.ledger.show import find_trial
from workers.metrics import ACCURACIES, INTERVALS, OBJECTIVES

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

MOST_EXACT = 5000
"""Gains of several sizes that are tested exactly; the effort grows with the square of their number."""

SAME, BETTER, WORSE, OPEN = "the same", "better", "worse", "cannot be told apart"


class CompareError(ValueError):
    """The trials cannot be compared; the text says which, why, and what to do."""


@dataclass(frozen=True)
class Against:
    """A trial's metric beside the first trial's.

    Attributes:
        verdict: :data:`BETTER`, :data:`WORSE`, :data:`SAME` or :data:`OPEN`.
        difference: for an accuracy, in points; ``ratio`` for other metrics; with the ends of its 95 % interval (None: exact).
        probability: that it is the better one of the two, by the draws; None where both are exact.
        only_first, only_this: examples that one of the two has right and the other not, or less; None where that is not known.
        p_value, test: two-sided p value of the test on them, and its name.
    """

    verdict: str
    difference: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    probability: float | None = None
    only_first: int | None = None
    only_this: int | None = None
    p_value: float | None = None
    test: str | None = None


@dataclass(frozen=True)
class Metric:
    """One metric of all trials.

    Attributes:
        values: a dict a trial: ``value``, ``low``, ``high``, ``ratio`` to the strong baseline; None where unknown or exact.
        against: of the second trial on; None where either value is unknown.
    """

    name: str
    values: list[dict[str, float | None]]
    against: list[Against | None] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """Several trials; ``recipe`` maps what differs to a value a trial (None: does not have it)."""

    trials: list[str]
    labels: list[str]
    simulated: list[bool]
    recipe: dict[str, list[Any]]
    metrics: list[Metric]


def compare(ledger: Ledger, starts: Sequence[str]) -> Comparison:
    """Compares trials, given by the starts of their ids, with the first one.

    Raises:
        LookupError: a start is that of no trial or of several.
        CompareError: fewer than two trials, one twice, one that failed, or trials of different contexts.
    """
    rows = [find_trial(ledger, start) for start in starts]
    ids = [str(row["trial_id"]) for row in rows]
    _check(rows)

    def read(snapshot: Snapshot) -> tuple[list[bool], list[Metric]]:
        return _measured(snapshot, ids)

    flags, metrics = ledger.consistent(read)
    return Comparison(ids, [row["label"] for row in rows], flags, _recipes(rows), metrics)


def _check(rows: Sequence[dict[str, Any]]) -> None:
    ids = [row["trial_id"] for row in rows]
    if len(ids) < 2 or len(set(ids)) < len(ids):
        raise CompareError(
            f"compare: must name two or more different trials, got {', '.join(ids)}; name another one (vitpareto pareto)"
        )
    for row in rows:
        if row["status"] != "ok":
            raise CompareError(
                f"TRIAL {row['trial_id']}: must be ok to have numbers, but its status is {row['status']}"
            )
        if row["context"] != rows[0]["context"]:
            raise CompareError(
                f"TRIAL {row['trial_id']}: must have the context of {ids[0]}, but other data, training or measurement "
                "settings hold for it, so their numbers answer different questions; compare trials of one context"
            )


def _recipes(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Returns what differs: ``technique.parameter``, and the order where only that does."""
    found = []
    for row in rows:
        values: dict[str, Any] = {}
        for step in row["recipe"]:
            config = {f"{step['technique']}.{key}": value for key, value in step["config"].items()}
            values |= config or {step["technique"]: True}
        values["order"] = " + ".join(step["technique"] for step in row["recipe"])
        values["seed"] = row["seed"]
        found.append(values)
    keys = [k for k in dict.fromkeys(key for values in found for key in values) if k != "order"]
    table = {key: [values.get(key) for values in found] for key in keys}
    differing = {key: one for key, one in table.items() if any(v != one[0] for v in one)}
    orders = [values["order"] for values in found]
    same_techniques = len({tuple(sorted(order.split(" + "))) for order in orders}) == 1
    return {**differing, "order": orders} if same_techniques and len(set(orders)) > 1 else differing


# --- numbers ----------------------------------------------------------------------------------------------------------


def _measured(snapshot: Snapshot, ids: Sequence[str]) -> tuple[list[bool], list[Metric]]:
    numbers = {trial: i for i, trial in enumerate(snapshot.trials(["trial_id"])["trial_id"].to_pylist())}
    row = np.array([numbers[trial] for trial in ids])
    ascending = np.sort(row)
    bounds = [f"{name}_{end}" for name in INTERVALS for end in ("low", "high")]
    table = snapshot.trials([*OBJECTIVES, *bounds, "conditions"], ascending)
    table = table.append_column(ROW, to_arrow(ascending)).take(to_arrow(np.searchsorted(ascending, row)))
    flags = simulated(table["conditions"], np.arange(len(ids)), len(ids))
    trials = Candidates(table, row, np.arange(len(ids)))
    names = list(OBJECTIVES)
    metrics = [
        _metric(name, axis, snapshot, trials, ids, flags)
        for name, axis in zip(names, read_axes(snapshot, trials, names, list(OBJECTIVES.values())), strict=True)
        if not np.isnan(axis.value).all()
    ]
    return flags.tolist(), metrics


def _metric(
    name: str, axis: Axis, snapshot: Snapshot, trials: Candidates, ids: Sequence[str], flags: npt.NDArray[np.bool_]
) -> Metric:
    count, found = len(ids), axis.found
    nothing = np.full(count, np.nan)
    low, high, ratio = (nothing,) * 3 if found is None else (found.low, found.high, found.ratio)
    columns = {"value": axis.value, "low": low, "high": high, "ratio": ratio}
    values = [{key: _plain(column[i]) for key, column in columns.items()} for i in range(count)]
    rows = np.arange(count)
    scores = None
    if name in ACCURACIES and found is not None:
        scores = estimates.example_scores(name, snapshot, trials.shown(snapshot, ["trial_id", "attempt_id"], rows))
    draws = axis.drawn(snapshot, trials, rows, ids, flags).values
    against = [None if np.isnan(axis.value[[0, i]]).any() else _against(axis, draws, i) for i in range(1, count)]
    if scores is not None:
        tenths = np.rint(10 * scores).astype(np.int64)
        against = [one and _by_examples(one, tenths[i] - tenths[0], count) for i, one in enumerate(against, 1)]
    return Metric(name, values, against)


def _against(axis: Axis, draws: Floats, i: int) -> Against:
    """Compares trial ``i`` with the first: told apart where they lie farther from each other than the floor."""
    gap = draws[i] - draws[0]
    mean, spread = float(gap.mean()), float(gap.std())
    apart = abs(mean) > float(floor_width(len(draws))) * spread
    verdict = OPEN if not apart else WORSE if mean > 0 else BETTER
    if not spread:
        verdict = SAME if mean == 0 else verdict
    ends = sorted(axis.sign * np.quantile(gap, (0.025, 0.975))) if spread else None
    better = float((gap < 0).mean() + (gap == 0).mean() / 2) if spread else None
    if axis.source in ACCURACIES:
        low, high = ends or (None, None)
        difference = float(axis.value[i] - axis.value[0])
        return Against(verdict, difference, None, _plain(low), _plain(high), better)
    ratio = float(axis.value[i] / axis.value[0]) if axis.value[0] else None
    low, high = (math.exp(end) for end in ends) if ends else (None, None)
    return Against(verdict, None, ratio, low, high, better)


def _by_examples(found: Against, gains: Numbers, count: int) -> Against:
    """Adds the exact test, which then has the verdict, at the level of the floor for ``count`` trials.

    Args:
        gains: (examples,) what this trial has more of each than the first one, in tenths.
    """
    p_value, test = paired_test(gains)
    level = math.erfc(float(floor_width(count)) / math.sqrt(2))
    verdict = OPEN if gains.any() else SAME
    if p_value < level:
        verdict = BETTER if gains.sum() > 0 else WORSE
    return replace(
        found,
        verdict=verdict,
        only_first=int((gains < 0).sum()),
        only_this=int((gains > 0).sum()),
        p_value=p_value,
        test=test,
    )


def paired_test(gains: Numbers) -> tuple[float, str]:
    """Tests whether the sum of ``gains`` (n,) is 0: each could as well have had the other sign.

    Where all gains are of one size, as between right and wrong, this is McNemar's exact test. Source: Pitman 1937, Supplement to
    the JRSS 4:119; the mid-p value: Fagerland, Lydersen, Laake 2013, BMC Medical Research Methodology 13:91.

    Returns:
        The two-sided mid-p value, and the test's name; of more than :data:`MOST_EXACT` gains of several sizes the normal one.
    """
    sizes, counts = np.unique(np.abs(gains[gains != 0]), return_counts=True)
    name = "McNemar" if len(sizes) <= 1 and set(sizes.tolist()) <= {10} else "sign flips"
    won, lost = int(gains[gains > 0].sum()), int(-gains[gains < 0].sum())
    if won == lost:
        return 1.0, name
    if len(sizes) > 1 and counts.sum() > MOST_EXACT:
        distance = abs(won - lost) / math.sqrt(float(sizes**2 @ counts))
        return math.erfc(distance / math.sqrt(2)), name
    chance = np.ones(1)  # of each sum of the gains that count as won
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        spread = np.zeros(size * count + 1)
        spread[::size] = _coin(count)
        chance = np.convolve(chance, spread)
    least = min(won, lost)
    return min(1.0, float(2 * chance[:least].sum() + chance[least])), name


def _coin(throws: int) -> Floats:
    """Returns the probability of each number of heads, (throws + 1,)."""
    logs = [math.lgamma(throws + 1) - math.lgamma(k + 1) - math.lgamma(throws - k + 1) for k in range(throws + 1)]
    return np.exp(np.array(logs) - throws * math.log(2))


def _plain(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
