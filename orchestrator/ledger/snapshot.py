"""One consistent view of a ledger: immutable parts and the loose rows that are not in them yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.ledger.columns import booleans, equals, group_numbers, to_arrow
from orchestrator.ledger.files import LedgerFiles, Loose, Part
from orchestrator.ledger.parquet_files import Problem, read_parquet
from orchestrator.ledger.schema import SCHEMAS
from orchestrator.ledger.trials import Accepted, Rows, accepted, trials_table
from orchestrator.study.constraints import Constraint


class Snapshot:
    """What the ledger held at one moment. Every call answers from the same rows in the same order.

    Args:
        parts: ``attempts`` and ``measurements`` to the parts whose file of that kind can be read.
        missing: ``attempts`` and ``measurements`` to the files whose rows are not here, so not in any answer from there.
        reports: evaluations on the report split, which belong to no attempt.
        repeats: the parts may hold an attempt twice (there was no manifest to name the right ones).
    """

    def __init__(
        self,
        files: LedgerFiles,
        parts: Mapping[str, Sequence[Part]],
        loose: Loose,
        reports: pa.Table,
        constraints: Sequence[Constraint],
        repeats: bool,
        missing: Mapping[str, Sequence[Problem]],
    ) -> None:
        self._files, self._parts, self._constraints = files, parts, list(constraints)
        self._reports, self._missing = reports, missing
        self._asked: set[str] = set()
        self._loose = {"attempts": loose.attempts, "measurements": loose.measurements}
        self._may_repeat = repeats or bool(loose.names and any(parts.values()))
        self._rows: dict[str, Rows | None] = {}
        self._lengths: dict[str, list[int]] = {}
        self._accepted: Accepted | None = None

    def missing(self) -> list[Problem]:
        """Returns the files whose rows are missing from what was asked so far."""
        return list(dict.fromkeys(p for kind in sorted(self._asked) for p in self._missing[kind]))

    def attempts(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Returns one row an attempt with ``columns`` of ``schema.ATTEMPTS`` (None: all)."""
        return self._read("attempts", columns)

    def measurements(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Returns one row a measured quantity with ``columns`` of ``schema.MEASUREMENTS`` (None: all)."""
        table = self._read("measurements", columns)
        return pa.concat_tables([table, self._reports.select(table.column_names)])

    def records(self, kind: str, trial_ids: pa.Array, columns: Sequence[str]) -> pa.Table:
        """Returns the attempts' own measurements of a kind of some trials; of Parquet only the row groups that hold some are
        decoded."""
        keys = self._read("measurements", ["trial_id", "kind"])
        mine = equals(keys["kind"], kind) & booleans(pc.is_in(keys["trial_id"], value_set=trial_ids))
        return self._read("measurements", columns, np.flatnonzero(mine))

    def added(self, kind: str) -> pa.Table:
        """Returns the measurements of a kind that were added after their trials had ended."""
        self._asked.add("measurements")
        return self._reports.filter(to_arrow(equals(self._reports["kind"], kind)))

    def trials(self, columns: Iterable[str] | None = None, rows: Rows | None = None) -> pa.Table:
        """Returns one row a trial with ``columns`` of ``trials.TRIALS`` (None: all).

        Args:
            rows: numbers of the wanted trials in the order of this table, ascending (None: all). For few of many.
        """
        if self._accepted is None:
            rest = ["status", "started_at", "attempt_id"]
            self._accepted = accepted(self.attempts(["trial_id"])["trial_id"], lambda: self.attempts(rest))
        return trials_table(partial(self._read, "attempts"), self._accepted, self._constraints, columns, rows)

    def _read(self, kind: str, columns: Iterable[str] | None, rows: Rows | None = None) -> pa.Table:
        names = SCHEMAS[kind].names if columns is None else list(dict.fromkeys(columns))
        unknown = [n for n in names if n not in SCHEMAS[kind].names]
        if unknown:
            raise KeyError(f"{kind} has no column {', '.join(unknown)}; columns: {', '.join(SCHEMAS[kind].names)}")
        self._asked.add(kind)
        first = self._first_rows(kind) if self._may_repeat else None
        if first is not None:
            rows = first if rows is None else first[rows]
        return self._all(kind, names) if rows is None else self._some(kind, names, rows)

    def _all(self, kind: str, names: list[str]) -> pa.Table:
        read = [read_parquet(self._files.storage, self._files.part(p, kind), kind, names) for p in self._parts[kind]]
        self._lengths[kind] = [len(table) for table in read]
        return pa.concat_tables([*read, self._loose[kind].select(names)])

    def _some(self, kind: str, names: list[str], rows: Rows) -> pa.Table:
        if kind not in self._lengths:
            self._all(kind, ["trial_id"])
        lengths = self._lengths[kind]
        keep = np.zeros(sum(lengths) + len(self._loose[kind]), np.bool_)
        keep[rows] = True
        ends = np.cumsum([0, *lengths])
        read = [
            read_parquet(self._files.storage, self._files.part(part, kind), kind, names, keep[start:stop])
            for part, start, stop in zip(self._parts[kind], ends[:-1], ends[1:], strict=True)
        ]
        return pa.concat_tables([*read, self._loose[kind].select(names).filter(to_arrow(keep[ends[-1] :]))])

    def _first_rows(self, kind: str) -> Rows | None:
        """Row numbers without the repeats that an interrupted compaction leaves (None: there are none)."""
        if kind not in self._rows:
            keys = self._all(kind, ["attempt_id"] if kind == "attempts" else ["attempt_id", "position"])
            key = keys["attempt_id"]
            if kind == "measurements":
                key = pc.binary_join_element_wise(key, keys["position"].cast(pa.string()), ":")
            numbers, count = group_numbers(key)
            first = np.sort(np.unique(numbers, return_index=True)[1]) if count < len(numbers) else None
            self._rows[kind] = first
        return self._rows[kind]
