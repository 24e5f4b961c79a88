"""Candidates of a frontier: the recipes of one context, each with its trials, one a seed."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator.ledger.columns import equals, floats, group_numbers, integers, to_arrow
from orchestrator.ledger.snapshot import Snapshot
from orchestrator.ledger.trials import DEFAULT_COLUMNS, NUMERIC, TRIALS
from orchestrator.study.constraints import DROPS

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]

ROW = pa.field("_row", pa.int64())
"""Number of a candidate's shown trial in ``Snapshot.trials``."""


@dataclass(frozen=True)
class Candidates:
    """n candidates with t trials.

    Attributes:
        table: one row each: what was asked for (numbers are means over the seeds, other columns those of the lowest seed),
            ``seeds``, ``_row``.
        row: (t,) numbers of all their trials in ``Snapshot.trials``.
        of: (t,) the candidate of each.
    """

    table: pa.Table
    row: Numbers
    of: Numbers

    def __len__(self) -> int:
        return len(self.table)

    def with_feasible(self, feasible: Mask, wanted: Collection[str]) -> Candidates:
        """Returns the candidates with ``feasible``, what is wanted, and what is dearer to derive again than to keep."""
        table = self.table.append_column("feasible", to_arrow(feasible))
        kept = {*wanted, *DROPS, "feasible", "seeds", ROW.name}
        if len(self.row) > len(self):  # means over seeds, which cannot be read again
            kept |= set(NUMERIC)
        return Candidates(table.select([n for n in table.column_names if n in kept]), self.row, self.of)

    def some(self, rows: Numbers) -> Candidates:
        """Returns the candidates with the given numbers, ascending."""
        if len(rows) == len(self):
            return self
        chosen = np.zeros(len(self), np.bool_)
        chosen[rows] = True  # unlike ``take`` a filter copies nothing else
        table = self.table.filter(to_arrow(chosen))
        if len(self.row) == len(self):
            return Candidates(table, self.row[rows], np.arange(len(rows)))
        keep = chosen[self.of]
        place = np.cumsum(chosen) - 1
        return Candidates(table, self.row[keep], place[self.of[keep]])

    def trials(
        self, snapshot: Snapshot, columns: Sequence[str], rows: Numbers | None = None
    ) -> tuple[pa.Table, Numbers]:
        """Reads ``columns`` of the trials of ``rows`` (None: of all candidates).

        Returns:
            The trials, and for each the position of its candidate in ``rows``.
        """
        row, of = self.row, self.of
        if rows is not None:
            place = np.full(len(self), -1)
            place[rows] = np.arange(len(rows))
            keep = place[of] >= 0
            row, of = row[keep], place[of[keep]]
        order = np.argsort(row, kind="stable")
        return snapshot.trials(columns, row[order]), of[order]

    def shown(self, snapshot: Snapshot, columns: Sequence[str], rows: Numbers) -> pa.Table:
        """Reads ``columns`` of the shown trials of ``rows``, in the order of ``rows``."""
        numbers = self.numbers[rows]
        ascending = np.sort(numbers)
        found = snapshot.trials(columns, ascending)
        return found if (ascending == numbers).all() else found.take(to_arrow(np.searchsorted(ascending, numbers)))

    @property
    def numbers(self) -> Numbers:
        """Numbers of the shown trials in ``Snapshot.trials``."""
        return integers(self.table[ROW.name])

    def simulated(self, snapshot: Snapshot, rows: Numbers) -> Mask:
        """Says which of ``rows`` have a trial whose conditions say that no integer kernel ran."""
        if not len(rows):
            return np.zeros(0, np.bool_)
        trials, of = self.trials(snapshot, ["conditions"], rows)
        return simulated(trials["conditions"], of, len(rows))


def simulated(conditions: pa.ChunkedArray, of: Numbers, count: int) -> Mask:
    """Says which of ``count`` candidates have a trial whose conditions say that no integer kernel ran."""
    found = np.zeros(count, np.bool_)
    flags = [text is not None and json.loads(text).get("simulated") is True for text in conditions.to_pylist()]
    found[of[np.array(flags, np.bool_)]] = True
    return found


def read_candidates(snapshot: Snapshot, context: str | None, wanted: Collection[str]) -> Candidates:
    """Reads the trials of one context (None: that of the newest trial), one row a recipe, with ``wanted`` columns."""
    needed = {"recipe_hash", "seed", "started_at", "status", "context", *wanted} - {"feasible", "seeds"}
    trials = snapshot.trials(sorted(needed))
    if group_numbers(trials["recipe_hash"])[1] < len(trials):  # several seeds: all that is shown is a mean
        trials = snapshot.trials(sorted(needed.union(set(NUMERIC).intersection(DEFAULT_COLUMNS))))
    numbered = trials.append_column(ROW, to_arrow(np.arange(len(trials))))
    return _mean_over_seeds(_of_context(numbered, context))


def _of_context(trials: pa.Table, context: str | None) -> pa.Table:
    if context is None and len(trials):
        newest = int(np.argmax(integers(trials["started_at"])))
        context = trials["context"][newest].as_py()
    mine = equals(trials["context"], context or "")
    return trials if mine.all() else trials.filter(to_arrow(mine))


def _mean_over_seeds(trials: pa.Table) -> Candidates:
    recipe, count = group_numbers(trials["recipe_hash"])
    if count == len(trials):
        table = trials.append_column("seeds", to_arrow(np.ones(count, np.int64)))
        return Candidates(table, integers(trials[ROW.name]), np.arange(count))
    seed = integers(trials["seed"])
    order = np.lexsort((-integers(trials["started_at"]), seed, recipe))
    newest = np.sort(order[np.r_[True, (np.diff(recipe[order]) != 0) | (np.diff(seed[order]) != 0)]])
    trials, recipe = trials.take(to_arrow(newest)), recipe[newest]
    ok = equals(trials["status"], "ok")
    order = np.lexsort((integers(trials["seed"]), ok, recipe))  # a seed that failed stands for its recipe
    first = order[np.r_[True, np.diff(recipe[order]) != 0]]
    seeds = np.bincount(recipe)
    found = trials.take(to_arrow(first)).append_column("seeds", to_arrow(seeds))
    for name in set(NUMERIC) & set(trials.column_names):
        mean = np.bincount(recipe, weights=floats(trials[name])) / seeds
        found = found.set_column(found.schema.get_field_index(name), TRIALS.field(name), to_arrow(mean))
    return Candidates(found, integers(trials[ROW.name]), recipe)
