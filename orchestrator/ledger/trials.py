"""From attempts to trials: the accepted attempt of each, and the columns that follow from other rows.

Nothing here is stored: a changed constraint or a new baseline row takes effect at the next read. Vectorised, since a
ledger may hold a million rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator.ledger.columns import (
    Floats,
    Mask,
    booleans,
    equals,
    floats,
    group_few,
    group_numbers,
    integers,
    to_arrow,
)
from orchestrator.ledger.schema import ATTEMPTS, RATIOS
from orchestrator.study.constraints import DROPS, Constraint
from workers.metrics import OBJECTIVES, SPEED_OBJECTIVES

_STORED = [f for f in ATTEMPTS if f.name not in (*RATIOS, "spec")]
_DERIVED = [
    *(pa.field(name, pa.float64()) for name in (*DROPS, *RATIOS)),
    pa.field("feasible", pa.bool_()),
    pa.field("slower_than_baseline", pa.bool_()),
    pa.field("attempts", pa.int64()),
]

_DERIVED_NAMES = frozenset(f.name for f in _DERIVED)

TRIALS = pa.schema([*_STORED, *_DERIVED])
"""Columns of the trials table: the stored ones of the accepted attempt, then the derived ones. ``*_drop`` is the
accuracy of the same context's baseline minus this one, in points; ``*_ratio`` the value over the baseline's; ``feasible``
says that the trial is ok and keeps every constraint of the study; ``slower_than_baseline`` that a speed's whole interval is
on the slow side of the strong baseline's; ``attempts`` counts."""

NUMERIC = [f.name for f in TRIALS if pa.types.is_floating(f.type) and f.name != "rung"]
"""Columns that can be an objective; over several seeds they are averaged. Those of a trial at a rung are no end."""

DEFAULT_COLUMNS = (
    "trial_id",
    "number",
    "label",
    *(column for name in OBJECTIVES for column in (name, f"{name}_drop") if column in OBJECTIVES or column in DROPS),
    "feasible",
    "recipe_hash",
    "recipe",
    "seed",
    "context",
    "device",
)
"""What a query shows of a trial where it is not told."""

_SLOW_ENDS = {name: "low" if OBJECTIVES[name] == "minimize" else "high" for name in sorted(SPEED_OBJECTIVES)}
"""Speed to the end of its interval that is the better one."""

_COMPARE = {"<=": np.less_equal, ">=": np.greater_equal, "<": np.less, ">": np.greater}
_FOR_BASELINE = ("context", "is_baseline", "status")

Rows = npt.NDArray[np.int64]
"""Row numbers, ascending."""

Accepted = tuple[Rows | None, npt.NDArray[np.int64]]

Read = Callable[[list[str], Rows | None], pa.Table]
"""Reads the named columns of the given attempts (None: of all)."""


def accepted(trial_id: pa.ChunkedArray, rest: Callable[[], pa.Table]) -> Accepted:
    """Finds the accepted attempt of each trial: the first ``ok`` one (by start, then id), otherwise the newest.

    Args:
        trial_id: of every attempt.
        rest: returns ``status``, ``started_at`` and ``attempt_id`` of the same rows; called only if a trial
            has several.

    Returns:
        Row numbers of the accepted attempts, ascending (None: all rows), and how many attempts those trials have.
    """
    trial, count = group_numbers(trial_id)
    if count == len(trial):
        return None, np.ones(count, np.int64)
    attempts = np.bincount(trial)
    columns = rest()
    ok = equals(columns["status"], "ok")
    started = integers(columns["started_at"])
    name = np.unique(columns["attempt_id"].to_pylist(), return_inverse=True)[1]
    sign = np.where(ok, 1, -1)  # the first ok, but the newest failure
    order = np.lexsort((name * sign, started * sign, ~ok, trial))
    first = np.r_[True, np.diff(trial[order]) != 0]
    rows = np.sort(order[first])
    return rows, attempts[trial[rows]]


def trials_table(
    attempts: Read,
    chosen: Accepted,
    constraints: Sequence[Constraint],
    columns: Iterable[str] | None = None,
    rows: Rows | None = None,
) -> pa.Table:
    """Returns one row a trial, with ``columns`` of :data:`TRIALS` (None: all), reading no column that is not needed.

    Args:
        chosen: what :func:`accepted` found.
        rows: numbers of the wanted trials among all (None: all).

    Raises:
        KeyError: for a column that is not in :data:`TRIALS`.
    """
    names = TRIALS.names if columns is None else list(dict.fromkeys(columns))
    unknown = [n for n in names if n not in TRIALS.names]
    if unknown:
        raise KeyError(f"trials has no column {', '.join(unknown)}; columns: {', '.join(TRIALS.names)}")
    of_trial, counts = chosen
    plain = [n for n in names if n not in _DERIVED_NAMES]
    basis = _needed([n for n in names if n in _DERIVED_NAMES], constraints)
    if rows is None:
        stored = derived_from = attempts(sorted({*plain, *basis}) or ["trial_id"], of_trial)
    else:
        stored = attempts(plain, rows if of_trial is None else of_trial[rows])
        derived_from = attempts(sorted(basis) or ["trial_id"], of_trial) if len(plain) < len(names) else stored
    derived = _Derived(derived_from, constraints, counts)
    arrays = [stored[n] if n in plain else to_arrow(_of(derived.column(n), rows)) for n in names]
    return pa.Table.from_arrays(arrays, schema=pa.schema([TRIALS.field(n) for n in names]))


def _of(values: npt.NDArray[Any], rows: Rows | None) -> npt.NDArray[Any]:
    return values if rows is None else values[rows]


def feasible(ok: Mask, metric: Callable[[str], Floats], constraints: Sequence[Constraint]) -> Mask:
    """Says for each row whether it is ok and every constraint holds; an unknown value (NaN) holds none."""
    for constraint in constraints:
        ok = ok & _COMPARE[constraint.op](metric(constraint.metric), constraint.bound)
    return ok


def _needed(names: Iterable[str], constraints: Sequence[Constraint]) -> set[str]:
    needed = set()
    for name in names:
        metrics = [c.metric for c in constraints] if name == "feasible" else [name]
        needed |= {"status"} if name == "feasible" else set()
        if name == "slower_than_baseline":
            needed |= {f"{speed}_{end}" for speed, end in _SLOW_ENDS.items()}
            metrics = [f"{speed}_ratio" for speed in _SLOW_ENDS]
        for metric in metrics:
            if metric in DROPS:
                needed |= {DROPS[metric], *_FOR_BASELINE}
            elif metric in RATIOS:
                needed |= {metric, metric.removesuffix("_ratio"), *_FOR_BASELINE}
            elif metric != "attempts":
                needed.add(metric)
    return needed


class _Derived:
    """Derived columns of accepted attempts as numpy arrays; NaN where unknown."""

    def __init__(self, stored: pa.Table, constraints: Sequence[Constraint], counts: npt.NDArray[np.int64]) -> None:
        self.stored, self.constraints, self.counts = stored, constraints, counts

    def column(self, name: str) -> npt.NDArray[Any]:
        """Values of a derived column, one a row."""
        if name == "attempts":
            return self.counts
        if name == "feasible":
            return feasible(equals(self.stored["status"], "ok"), self.metric, self.constraints)
        return self._slower() if name == "slower_than_baseline" else self.metric(name)

    def _slower(self) -> Mask:
        found = np.zeros(len(self.stored), np.bool_)
        for speed, end in _SLOW_ENDS.items():
            value, best = self._floats(speed), self._floats(f"{speed}_{end}")
            over = np.divide(best, value, out=np.full(len(best), np.nan), where=value != 0) * self.metric(
                f"{speed}_ratio"
            )
            found |= over > 1 if end == "low" else over < 1
        return found

    def metric(self, name: str) -> Floats:
        """Values of an objective, of a drop or of a ratio, one a row."""
        if name in DROPS:
            return self._baseline(DROPS[name]) - self._floats(DROPS[name])
        if name in RATIOS:
            objective = name.removesuffix("_ratio")
            measured, baseline = self._floats(name), self._baseline(objective)
            computed = np.divide(
                self._floats(objective), baseline, out=np.full(len(baseline), np.nan), where=baseline != 0
            )
            return np.where(np.isnan(measured), computed, measured)
        return self._floats(name)

    def _floats(self, name: str) -> Floats:
        return floats(self.stored[name])

    def _baseline(self, objective: str) -> Floats:
        """The objective of the baseline of each row's context: the mean over its ok rows (seeds)."""
        values = self._floats(objective)
        if self.stored[objective].null_count == len(values):  # an accuracy that the study's task has not
            return values
        context, contexts = group_few(self.stored["context"])
        is_baseline = booleans(self.stored["is_baseline"]) & equals(self.stored["status"], "ok")
        rows = is_baseline & ~np.isnan(values) & (context >= 0)
        total = np.bincount(context[rows], weights=values[rows], minlength=contexts)
        count = np.bincount(context[rows], minlength=contexts)
        mean = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
        of_row: Floats = np.append(mean, np.nan)[context]  # -1: no context, no baseline
        return of_row
