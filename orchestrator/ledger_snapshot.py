"""One consistent view of a ledger: immutable parts and the loose rows that are not in them yet."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.constraints import Constraint
from orchestrator.ledger_files import LedgerFiles, Loose, Part, Problem
from orchestrator.ledger_schema import SCHEMAS, conform, schema_fault
from orchestrator.ledger_trials import Accepted, accepted, trials_table
from workers.storage import Storage

_GONE = frozenset({errno.ENOENT, errno.ESTALE})


class PartVanishedError(Exception):
    """A part was merged into another one meanwhile; a new snapshot has its rows. The text is its name."""


class PartUnreadableError(Exception):
    """A part is damaged, foreign or newer."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(f"{problem.file}: {problem.reason}")


def read_parquet(storage: Storage, name: str, kind: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads ``columns`` of a Parquet file of the ledger (``kind``: a key of SCHEMAS), in the schema of this version.

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
            present = [c for c in wanted.names if c in file.schema_arrow.names]
            table = file.read(columns=present or file.schema_arrow.names[:1])
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and (isinstance(error, FileNotFoundError) or error.errno in _GONE):
            raise PartVanishedError(name) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PartUnreadableError(Problem(name, f"is damaged: {reason[:200]}")) from None
    return conform(table, wanted)


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
        self._rows: dict[str, pa.Array | None] = {}
        self._accepted: Accepted | None = None

    def attempts(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Returns one row an attempt with ``columns`` of ``ledger_schema.ATTEMPTS`` (None: all)."""
        return self._read("attempts", columns)

    def measurements(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Returns one row a measured quantity with ``columns`` of ``ledger_schema.MEASUREMENTS`` (None: all)."""
        table = self._read("measurements", columns)
        return pa.concat_tables([table, self._reports.select(table.column_names)])

    def trials(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Returns one row a trial with ``columns`` of ``ledger_trials.TRIALS`` (None: all)."""
        if self._accepted is None:
            rest = ["status", "started_at", "attempt_id"]
            self._accepted = accepted(self.attempts(["trial_id"])["trial_id"], lambda: self.attempts(rest))
        return trials_table(self.attempts, self._accepted, self._constraints, columns)

    def _read(self, kind: str, columns: Iterable[str] | None) -> pa.Table:
        names = SCHEMAS[kind].names if columns is None else list(dict.fromkeys(columns))
        unknown = [n for n in names if n not in SCHEMAS[kind].names]
        if unknown:
            raise KeyError(f"{kind} has no column {', '.join(unknown)}; columns: {', '.join(SCHEMAS[kind].names)}")
        table = self._all(kind, names)
        rows = self._first_rows(kind) if self._may_repeat else None
        return table if rows is None else table.take(rows)

    def _all(self, kind: str, names: list[str]) -> pa.Table:
        read = [read_parquet(self._files.storage, self._files.part(p, kind), kind, names) for p in self._parts]
        return pa.concat_tables([*read, self._loose[kind].select(names)])

    def _first_rows(self, kind: str) -> pa.Array | None:
        """Row numbers without the repeats that an interrupted compaction leaves (None: there are none)."""
        if kind not in self._rows:
            keys = self._all(kind, ["attempt_id"] if kind == "attempts" else ["attempt_id", "position"])
            key = keys["attempt_id"]
            if kind == "measurements":
                key = pc.binary_join_element_wise(key, keys["position"].cast(pa.string()), ":")
            encoded = key.combine_chunks().dictionary_encode()
            repeats = len(encoded.dictionary) < len(encoded)
            first = np.unique(encoded.indices.to_numpy(), return_index=True)[1] if repeats else None
            self._rows[kind] = None if first is None else pa.array(np.sort(first))
        return self._rows[kind]
