"""One consistent view of a ledger: immutable parts and the loose rows that are not in them yet."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.ledger.columns import Mask, booleans, empty, equals, group_numbers, to_arrow
from orchestrator.ledger.files import LedgerFiles, Loose, Part, Problem
from orchestrator.ledger.schema import SCHEMAS, conform, schema_fault
from orchestrator.ledger.trials import Accepted, Rows, accepted, trials_table
from orchestrator.study.constraints import Constraint
from workers.node.storage import Storage

_GONE = frozenset({errno.ENOENT, errno.ESTALE})


class PartVanishedError(Exception):
    """A part was merged into another one meanwhile; a new snapshot has its rows. The text is its name."""


class PartUnreadableError(Exception):
    """A part is damaged, foreign or newer."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(f"{problem.file}: {problem.reason}")


def read_parquet(
    storage: Storage, name: str, kind: str, columns: Sequence[str] | None = None, keep: Mask | None = None
) -> pa.Table:
    """Reads ``columns`` of a Parquet file of the ledger (``kind``: a key of SCHEMAS), in the schema of this version.

    Args:
        keep: which rows; decoded a row group at a time, so that wanting few rows takes little memory. None reads all.

    Raises:
        PartVanishedError: the file is gone.
        PartUnreadableError: it is damaged, foreign or newer.
    """
    schema = SCHEMAS[kind]
    wanted = schema if columns is None else pa.schema([schema.field(c) for c in columns])
    path = storage.local(name)
    try:
        # Not memory-mapped: a mapped file that is deleted on a network file system ends the reader with SIGBUS.
        source = io.BytesIO(storage.read(name)) if path is None else str(path)
        with pq.ParquetFile(source, page_checksum_verification=True) as file:
            fault = schema_fault(kind, file.schema_arrow)
            if fault:
                raise PartUnreadableError(Problem(name, fault))
            present = [c for c in wanted.names if c in file.schema_arrow.names] or file.schema_arrow.names[:1]
            table = file.read(columns=present) if keep is None else _read_some(file, present, keep)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and (isinstance(error, FileNotFoundError) or error.errno in _GONE):
            raise PartVanishedError(name) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PartUnreadableError(Problem(name, f"is damaged: {reason[:200]}")) from None
    return conform(table, wanted)


def _read_some(file: pq.ParquetFile, columns: list[str], keep: Mask) -> pa.Table:
    found, start = [empty(file.schema_arrow).select(columns)], 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        if keep[start:stop].any():
            found.append(file.read_row_group(group, columns).select(columns).filter(to_arrow(keep[start:stop])))
        start = stop
    return pa.concat_tables(found)


class Snapshot:
    """What the ledger held at one moment. Every call answers from the same rows in the same order.

    Args:
        reports: evaluations on the report split, which belong to no attempt.
        repeats: the parts may hold an attempt twice (there was no manifest to name the right ones).
    """

    def __init__(
        self,
        files: LedgerFiles,
        parts: Sequence[Part],
        loose: Loose,
        reports: pa.Table,
        constraints: Sequence[Constraint],
        repeats: bool,
    ) -> None:
        self._files, self._parts, self._constraints = files, list(parts), list(constraints)
        self._reports = reports
        self._loose = {"attempts": loose.attempts, "measurements": loose.measurements}
        self._may_repeat = repeats or bool(loose.names and parts)
        self._rows: dict[str, Rows | None] = {}
        self._lengths: dict[str, list[int]] = {}
        self._accepted: Accepted | None = None

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
        first = self._first_rows(kind) if self._may_repeat else None
        if first is not None:
            rows = first if rows is None else first[rows]
        return self._all(kind, names) if rows is None else self._some(kind, names, rows)

    def _all(self, kind: str, names: list[str]) -> pa.Table:
        read = [read_parquet(self._files.storage, self._files.part(p, kind), kind, names) for p in self._parts]
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
            for part, start, stop in zip(self._parts, ends[:-1], ends[1:], strict=True)
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
