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
import pyarrow.compute as pc

from orchestrator.constraints import Constraint
from orchestrator.ledger_schema import ATTEMPTS, RATIOS

Floats = npt.NDArray[np.float64]

_STORED = [f for f in ATTEMPTS if f.name not in (*RATIOS, "spec")]
_DERIVED = [
    pa.field("top1_pct_drop", pa.float64()),
    *(pa.field(name, pa.float64()) for name in RATIOS),
    pa.field("feasible", pa.bool_()),
    pa.field("attempts", pa.int64()),
]

TRIALS = pa.schema([*_STORED, *_DERIVED])
"""Columns of the trials table: the stored ones of the accepted attempt, then the derived ones. ``top1_pct_drop`` is the
top-1 of the same context's baseline minus this one, in points; ``*_ratio`` the value over the baseline's; ``feasible``
says that the trial is ok and keeps every constraint of the study; ``attempts`` counts."""

NUMERIC = [f.name for f in TRIALS if pa.types.is_floating(f.type)]
"""Columns that can be an objective; over several seeds they are averaged."""

DEFAULT_COLUMNS = (
    "trial_id",
    "number",
    "label",
    "top1_pct",
    "top1_pct_drop",
    "size_bytes",
    "params",
    "macs",
    "latency_ms_p50",
    "throughput_images_per_s",
    "peak_memory_bytes",
    "feasible",
    "recipe_hash",
    "recipe",
    "seed",
    "context",
    "device",
)
"""What a query shows of a trial where it is not told."""

_COMPARE = {"<=": np.less_equal, ">=": np.greater_equal, "<": np.less, ">": np.greater}
_HEXADECIMAL = np.full(256, 255, np.uint8)
_HEXADECIMAL[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
"""Character to value; 255 for what is no digit."""

_FOR_BASELINE = ("context", "is_baseline", "status")


Accepted = tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64]]


def accepted(trial_id: pa.ChunkedArray, rest: Callable[[], pa.Table]) -> Accepted:
    """Finds the accepted attempt of each trial: the first ``ok`` one (by start, then id), otherwise the newest.

    Args:
        trial_id: of every attempt.
        rest: returns ``status``, ``started_at`` and ``attempt_id`` of the same rows; called only if a trial has
        several.

    Returns:
        Row numbers of the accepted attempts, ascending (None: all rows), and how many attempts those trials have.
    """
    trial, count = group_numbers(trial_id)
    if count == len(trial):
        return None, np.ones(count, np.int64)
    attempts = np.bincount(trial)
    columns = rest()
    ok = mask(pc.equal(columns["status"], "ok"))
    started = columns["started_at"].cast(pa.int64()).to_numpy()
    name = pc.rank(columns["attempt_id"].combine_chunks(), tiebreaker="dense").to_numpy().astype(np.int64)
    sign = np.where(ok, 1, -1)  # the first ok, but the newest failure
    order = np.lexsort((name * sign, started * sign, ~ok, trial))
    first = np.r_[True, np.diff(trial[order]) != 0]
    rows = np.sort(order[first])
    return rows, attempts[trial[rows]]


def group_numbers(names: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], int]:
    """Numbers equal strings alike, from 0; returns the number of each row and how many there are.

    Ids of up to 16 hexadecimal digits, as all of ours are, are compared as integers: ten times faster than as strings.
    """
    keys = _hexadecimal(names.combine_chunks())
    if keys is None:
        encoded = names.combine_chunks().dictionary_encode()
        return encoded.indices.to_numpy().astype(np.int64), len(encoded.dictionary)
    ordered = np.sort(keys)
    if (ordered[1:] != ordered[:-1]).all():
        return np.arange(len(keys)), len(keys)
    unique, numbers = np.unique(keys, return_inverse=True)
    return numbers, len(unique)


def _hexadecimal(names: pa.StringArray) -> npt.NDArray[np.uint64] | None:
    """Returns strings of one length of up to 16 lower-case hexadecimal digits as integers; None for any others."""
    if not len(names) or names.null_count:
        return None
    offsets = np.frombuffer(names.buffers()[1], np.int32)[names.offset : names.offset + len(names) + 1]
    length = int(offsets[1] - offsets[0])
    if not 0 < length <= 16 or (np.diff(offsets) != length).any():
        return None
    text = np.frombuffer(names.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    if (_HEXADECIMAL[text[:length]] > 15).any() or ((digit := _HEXADECIMAL[text]) > 15).any():
        return None
    found = np.zeros(len(names), np.uint64)
    for column in digit.reshape(-1, length).T:
        found = (found << np.uint64(4)) | column
    return found


def trials_table(
    attempts: Callable[[list[str]], pa.Table],
    chosen: Accepted,
    constraints: Sequence[Constraint],
    columns: Iterable[str] | None = None,
) -> pa.Table:
    """Returns one row a trial, with ``columns`` of :data:`TRIALS` (None: all), reading no column that is not needed.

    Args:
        attempts: reads the named columns of every attempt, each call in the same row order.
        chosen: what :func:`accepted` found for these rows.

    Raises:
        KeyError: for a column that is not in :data:`TRIALS`.
    """
    names = TRIALS.names if columns is None else list(dict.fromkeys(columns))
    unknown = [n for n in names if n not in TRIALS.names]
    if unknown:
        raise KeyError(f"trials has no column {', '.join(unknown)}; columns: {', '.join(TRIALS.names)}")
    rows, counts = chosen
    stored = attempts([n for n in ATTEMPTS.names if n in _needed(names, constraints)])
    if rows is not None:
        stored = stored.filter(row_mask(rows, len(stored)))
    derived = _Derived(stored, constraints)
    arrays = [_column(name, stored, derived, counts) for name in names]
    return pa.Table.from_arrays(arrays, schema=pa.schema([TRIALS.field(n) for n in names]))


def feasible(
    ok: npt.NDArray[np.bool_], metric: Callable[[str], Floats], constraints: Sequence[Constraint]
) -> npt.NDArray[np.bool_]:
    """Says for each row whether it is ok and every constraint holds; an unknown value (NaN) holds none."""
    for constraint in constraints:
        ok = ok & _COMPARE[constraint.op](metric(constraint.metric), constraint.bound)
    return ok


def _column(name: str, stored: pa.Table, derived: _Derived, counts: npt.NDArray[np.int64]) -> Any:
    if name == "attempts":
        return to_arrow(counts)
    if name == "feasible":
        return to_arrow(feasible(mask(pc.equal(stored["status"], "ok")), derived.metric, derived.constraints))
    if name == "top1_pct_drop" or name in RATIOS:
        return to_arrow(derived.metric(name))
    return stored[name]


def _needed(names: Iterable[str], constraints: Sequence[Constraint]) -> set[str]:
    needed = set() if set(names) - {"attempts"} else {"trial_id"}
    for name in names:
        metrics = [c.metric for c in constraints] if name == "feasible" else [name]
        if name == "feasible":
            needed.add("status")
        for metric in metrics:
            if metric == "top1_pct_drop":
                needed |= {"top1_pct", *_FOR_BASELINE}
            elif metric in RATIOS:
                needed |= {metric, metric.removesuffix("_ratio"), *_FOR_BASELINE}
            else:
                needed.add(metric)
    return needed


class _Derived:
    """Derived columns of accepted attempts as numpy arrays; NaN where unknown."""

    def __init__(self, stored: pa.Table, constraints: Sequence[Constraint]) -> None:
        self.stored, self.constraints = stored, constraints

    def metric(self, name: str) -> Floats:
        """Values of an objective, of ``top1_pct_drop`` or of a ratio, one a row."""
        if name == "top1_pct_drop":
            return self._baseline("top1_pct") - self._floats("top1_pct")
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
        encoded = pc.dictionary_encode(pc.fill_null(self.stored["context"], "").combine_chunks())
        context = encoded.indices.to_numpy()
        is_baseline = mask(pc.and_(self.stored["is_baseline"], pc.equal(self.stored["status"], "ok")))
        rows = is_baseline & ~np.isnan(values)
        total = np.bincount(context[rows], weights=values[rows], minlength=len(encoded.dictionary))
        count = np.bincount(context[rows], minlength=len(encoded.dictionary))
        mean = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
        of_row: Floats = mean[context]
        return of_row


def to_arrow(values: npt.NDArray[Any]) -> pa.Array:
    """Returns int64, float64 (NaN becomes null) or Boolean values as an Arrow array.

    ``pa.array`` would import pandas to look at its argument, which takes a quarter of a second.
    """
    if values.dtype == np.bool_:
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, _bits(values)])
    if values.dtype == np.int64:
        return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])
    data = pa.py_buffer(np.ascontiguousarray(values, dtype=np.float64))
    return pa.Array.from_buffers(pa.float64(), len(values), [_bits(~np.isnan(values)), data])


def _bits(values: npt.NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))


def floats(column: pa.ChunkedArray) -> Floats:
    """Returns a numeric Arrow column as numpy floats, null as NaN."""
    return np.asarray(column.to_numpy(), dtype=np.float64)


def row_mask(rows: npt.NDArray[np.int64], length: int) -> pa.Array:
    """Returns a mask of ``length`` rows that is true for ``rows``; filtering copies less than taking from many
    chunks."""
    chosen = np.zeros(length, np.bool_)
    chosen[rows] = True
    return to_arrow(chosen)


def mask(condition: Any) -> npt.NDArray[np.bool_]:
    """Returns an Arrow condition as numpy booleans, null as False."""
    return np.asarray(pc.fill_null(condition, False).to_numpy(), dtype=np.bool_)
