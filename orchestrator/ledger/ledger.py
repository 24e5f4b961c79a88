"""The ledger of a study: immutable attempt files, compacted into Parquet. The one writer of Parquet.

Files under ``<study>/``::

    attempts/<trial_id>.<attempt_id>.json    one an attempt, written once
    asks/<context>-<number>.json                       what the driver handed out
    running/<trial_id>.json                  where a trial runs; gone when its attempt is written
    reports/<trial_id>.json                  accuracy on the report split
    reports/<trial_id>.<id>.json             a later measurement of the same artefact
    ledger/attempts-<n>-<id>.parquet, ledger/measurements-<n>-<id>.parquet
    ledger/manifest-<n>.json                 the parts of generation n; the highest counts
    study.json                               what the study is
    frontier.parquet                         the frontier and its history

Compaction writes new parts, then the next manifest, then deletes what that replaces. The manifest of a generation is
created, never replaced, so of two processes that compact at once exactly one wins and the other deletes nothing. A
reader reads the loose files before it looks for the manifest: what vanished meanwhile is in a part by then.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.ledger.columns import empty
from orchestrator.ledger.files import LedgerError, LedgerFiles, Manifest, Part, Problem
from orchestrator.ledger.schema import (
    ATTEMPTS,
    FRONTIER,
    MEASUREMENTS,
    attempt_row,
    attempts_table,
    conform,
    frontier_table,
    measurements_table,
    report_record,
    row_fault,
)
from orchestrator.ledger.snapshot import PartUnreadableError, PartVanishedError, Snapshot, read_parquet
from orchestrator.study.constraints import Constraint, parse
from workers.node.storage import Storage

__all__ = ["Ledger", "LedgerError", "Problem", "Snapshot", "attempt_row", "parquet_bytes"]

T = TypeVar("T")

LARGEST_MERGED_ROWS = 250_000
"""A part with more rows than this is not rewritten any more."""

_REMEASURED = re.compile(r"([0-9a-f]+)\.[0-9a-f]{8}\.json")

READ_TRIES = 20
"""Snapshots a reader takes before it gives up; each failed one means that a compaction ended meanwhile."""


def parquet_bytes(table: pa.Table) -> bytes:
    """Returns ``table`` as one Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=65_536, write_page_checksum=True)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


class Ledger:
    """What a study has found so far.

    Args:
        study: name of the study, its folder in ``storage``.
        constraints: of the study, as text (``"size_bytes < 4e6"``) or parsed; ``feasible`` follows from them.
        context: digest of the context that the study asks about now; frontiers leave rows of other contexts out. None:
            that of the newest trial.
    """

    def __init__(
        self, storage: Storage, study: str, constraints: Sequence[str | Constraint] = (), context: str | None = None
    ) -> None:
        self.storage, self.study, self.context = storage, study, context
        self.constraints = [c if isinstance(c, Constraint) else parse(c) for c in constraints]
        self._files = LedgerFiles(storage, study)
        self._damaged: dict[str, Problem] = {}

    # --- writing ------------------------------------------------------------------------------------------------------

    def write_attempt(self, row: Mapping[str, Any]) -> bool:
        """Writes one attempt (see :func:`attempt_row`) for good; False if it was there already, and then it stays as it
        was.

        Raises:
            ValueError: for a row that could not be read back.
        """
        fault = row_fault(dict(row))
        if fault:
            raise ValueError(f"attempt row {fault}")
        name = self._files.attempt(row)
        attempts_table([row]), measurements_table([row])
        created = self.storage.put_if_absent(name, json.dumps(row, allow_nan=False).encode())
        self.clear_running(row["trial_id"])
        return created

    def write_report(self, trial_id: str, recipe_hash: str, *measurements: Mapping[str, Any]) -> bool:
        """Adds the accuracies on the report split to a trial that has ended; False if they were there already, and stay.

        Args:
            measurements: the fields of ``trial.Measurement``, one an accuracy.
        """
        record = report_record(trial_id, recipe_hash, *measurements)
        name = self._files.name("reports", f"{trial_id}.json")
        return self.storage.put_if_absent(name, json.dumps(record, allow_nan=False).encode())

    def reported(self) -> set[str]:
        """Returns the trials that were evaluated on the report split."""
        added = self._files.reports([])
        return set(added.filter(pc.equal(added["kind"], "accuracy_report"))["trial_id"].to_pylist())

    def write_remeasurement(self, trial_id: str, recipe_hash: str, measurements: Sequence[Mapping[str, Any]]) -> None:
        """Adds later measurements of a trial's artefact; they stand beside the trial's own.

        Args:
            measurements: the fields of ``trial.Measurement``, what one further measurement found.
        """
        record = report_record(trial_id, recipe_hash, *measurements)
        name = self._files.name("reports", f"{trial_id}.{uuid.uuid4().hex[:8]}.json")
        self.storage.put_atomic(name, json.dumps(record, allow_nan=False).encode())

    def remeasured(self) -> list[str]:
        """Returns the trial of every further measurement of this study, one entry each."""
        names = self.storage.files(self._files.name("reports"))
        return [m[1] for m in map(_REMEASURED.fullmatch, names) if m]

    def write_ask(self, context: str, number: int, ask: Mapping[str, Any]) -> None:
        """Records what the driver handed out as Optuna's trial ``number`` of a context; a later call replaces it."""
        record = {**ask, "number": int(number), "context": context}
        self.storage.put_atomic(self._files.name("asks", f"{context}.{number:08d}.json"), json.dumps(record).encode())

    def asks(self, context: str) -> list[dict[str, Any]]:
        """Returns what was handed out in a context, by number."""
        return [record for _, record in self._files.records("asks", [], prefix=f"{context}.")]

    def mark_running(self, trial_id: str, whereabouts: Mapping[str, Any]) -> None:
        """Records where a trial runs. Its attempt removes the mark; a lost worker leaves it."""
        record = {**whereabouts, "trial_id": trial_id}
        self.storage.put_atomic(self._files.name("running", f"{trial_id}.json"), json.dumps(record).encode())

    def running(self) -> dict[str, dict[str, Any]]:
        """Returns trial id to whereabouts of the marks that are left: trials that run, or whose worker was lost."""
        return {str(record.get("trial_id")): record for _, record in self._files.records("running", [])}

    def clear_running(self, trial_id: str) -> None:
        """Removes the mark of a trial."""
        self.storage.delete(self._files.name("running", f"{trial_id}.json"))

    def write_study(self, record: Mapping[str, Any]) -> None:
        """Writes ``study.json``, what the study is: its config, its context, its token."""
        self.storage.put_atomic(self._files.name("study.json"), json.dumps(record, indent=1).encode())

    def study_record(self) -> dict[str, Any] | None:
        """Returns what :meth:`write_study` wrote, None where there is no study of that name.

        Raises:
            LedgerError: the file is damaged.
        """
        name = self._files.name("study.json")
        try:
            data = self.storage.read(name)
        except FileNotFoundError:
            return None
        try:
            record = json.loads(data)
        except ValueError as error:
            raise LedgerError(f"{name} is damaged: {error}") from None
        if not isinstance(record, dict):
            raise LedgerError(f"{name} is not a record of vitpareto")
        return record

    @property
    def folder(self) -> str:
        """Path or URL of the study's folder."""
        return f"{self.storage.url}/{self.study}"

    # --- reading ------------------------------------------------------------------------------------------------------

    def trials(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Returns one row a trial (columns: ``trials.TRIALS``); ``.to_pandas()`` makes it a DataFrame.

        Args:
            columns: names to read; naming few is what makes a large ledger fast. None reads all.
        """
        names = None if columns is None else list(columns)
        return self.consistent(lambda snapshot: snapshot.trials(names))

    def attempts(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Returns one row an attempt (columns: ``schema.ATTEMPTS``); ``.to_pandas()`` makes it a DataFrame."""
        names = None if columns is None else list(columns)
        return self.consistent(lambda snapshot: snapshot.attempts(names))

    def measurements(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Returns one row a measured quantity (``schema.MEASUREMENTS``); ``.to_pandas()`` makes it a
        DataFrame."""
        names = None if columns is None else list(columns)
        return self.consistent(lambda snapshot: snapshot.measurements(names))

    def outcomes(self, context: str, trials: Sequence[str] | None = None) -> dict[str, tuple[str, dict[str, float]]]:
        """Returns trial id to (status, metrics) of accepted attempts in a context; ``trials`` names those wanted."""
        table = self.trials(["trial_id", "status", "metrics", "context"])
        keep = pc.equal(table["context"], context)
        if trials is not None:
            keep = pc.and_(keep, pc.is_in(table["trial_id"], value_set=pa.array(list(trials), pa.string())))
        rows = table.filter(keep).to_pylist()
        known = ({k: v for k, v in json.loads(r["metrics"]).items() if v is not None} for r in rows)
        return {r["trial_id"]: (r["status"], metrics) for r, metrics in zip(rows, known, strict=True)}

    def consistent(self, read: Callable[[Snapshot], T]) -> T:
        """Returns ``read(snapshot)``, called again on a new snapshot where a part vanished or proved damaged while
        reading.

        Raises:
            LedgerError: if parts keep vanishing.
        """
        missing = ""
        for _ in range(READ_TRIES):
            try:
                return read(self.snapshot())
            except PartVanishedError as gone:
                if str(gone) == missing:  # the manifest was read again and still names it
                    self._damaged[missing] = Problem(missing, "is named by the manifest but missing")
                missing = str(gone)
            except PartUnreadableError as error:
                self._damaged[error.problem.file] = error.problem
        raise LedgerError(
            f"{self.study}/ledger: parts keep vanishing, last {missing}; does anything else delete files there?"
        )

    def snapshot(self) -> Snapshot:
        """Takes a snapshot; its reads may raise, so use :meth:`consistent`."""
        loose = self._files.loose([])  # before the manifest: see the module docstring
        reports = self._files.reports([])
        parts, repeats = self._files.parts([])
        kinds = ("attempts", "measurements")
        usable = [p for p in parts if not any(self._files.part(p, kind) in self._damaged for kind in kinds)]
        return Snapshot(self._files, usable, loose, reports, self.constraints, repeats)

    def problems(self) -> list[Problem]:
        """Looks through the study's files; returns those that cannot be used, besides what reads came across so far."""
        found: list[Problem] = []
        self._files.reports(found)
        for folder in ("asks", "running"):
            self._files.records(folder, found)
        self._files.loose(found)
        found += self._files.foreign()
        parts, _ = self._files.parts(found)
        checks = [(self._files.part(p, kind), kind) for p in parts for kind in ("attempts", "measurements")]
        for file, kind in [*checks, (self._files.name("frontier.parquet"), "frontier")]:
            try:
                read_parquet(self.storage, file, kind, ["trial_id"])
            except PartUnreadableError as error:
                found.append(error.problem)
            except PartVanishedError:
                if kind != "frontier" and file in {self._files.part(p, kind) for p in self._files.parts([])[0]}:
                    found.append(Problem(file, "is named by the manifest but missing"))
        return found + [p for p in self._damaged.values() if p.file not in {f.file for f in found}]

    # --- compaction ---------------------------------------------------------------------------------------------------

    def compact(self, min_rows: int = 1) -> int:
        """Moves the loose attempts into Parquet and returns how many. Being killed at any point loses and repeats
        nothing.

        Args:
            min_rows: with fewer loose attempts nothing is done.

        Raises:
            LedgerError: the manifest is damaged, newer or missing; loose attempts stay as they are and stay readable.
        """
        manifest = self._files.manifest()
        self._sweep(manifest)  # what a compaction that was killed left
        loose = self._files.loose([])
        if len(loose.names) < max(min_rows, 1):
            return 0
        try:
            known = self._attempt_ids(manifest)
        except PartVanishedError:
            return 0  # another process compacts
        fresh = [
            table.filter(pc.invert(pc.is_in(table["attempt_id"], value_set=known)))
            for table in (loose.attempts, loose.measurements)
        ]
        return len(loose.names) if self._commit(manifest, fresh[0], fresh[1], loose.names) else 0

    def append(self, attempts: pa.Table, measurements: pa.Table | None = None) -> None:
        """Adds tables of new attempts past the loose files, for imports and benchmarks.

        Raises:
            LedgerError: another process compacted at the same time, or the manifest is unusable.
        """
        more = empty(MEASUREMENTS) if measurements is None else conform(measurements, MEASUREMENTS)
        if not self._commit(self._files.manifest(), conform(attempts, ATTEMPTS), more, []):
            raise LedgerError(f"{self.study}: another process compacted at the same time; append again")

    def _attempt_ids(self, manifest: Manifest) -> pa.Array:
        found = [pa.chunked_array([], pa.string())]
        for part in manifest.parts:
            try:
                table = read_parquet(self.storage, self._files.part(part, "attempts"), "attempts", ["attempt_id"])
            except PartUnreadableError:
                continue  # stays in the manifest and in problems()
            found.append(table["attempt_id"])
        return pa.chunked_array([chunk for array in found for chunk in array.chunks], pa.string()).combine_chunks()

    def _commit(self, manifest: Manifest, attempts: pa.Table, measurements: pa.Table, sources: Sequence[str]) -> bool:
        """Writes the next generation with the new rows; False, with nothing changed, if another process was first."""
        generation = manifest.generation + 1
        kept, attempts, measurements = self._merge(list(manifest.parts), attempts, measurements)
        part = Part(f"{generation:06d}-{uuid.uuid4().hex[:8]}", len(attempts))
        tables = {"attempts": attempts, "measurements": measurements}
        for kind, table in tables.items():
            self.storage.put_atomic(self._files.part(part, kind), parquet_bytes(table))
        following = Manifest(generation, (*kept, part), tuple(sources))
        created = self.storage.put_if_absent(self._files.manifest_name(generation), following.to_json())
        # A slow process may create a manifest whose generation was already replaced and deleted; only the newest counts.
        if not created or self._files.newest() != generation:
            for kind in tables:
                self.storage.delete(self._files.part(part, kind))
            return False
        self._sweep(following)
        return True

    def _sweep(self, manifest: Manifest) -> None:
        """Deletes what the newest manifest replaces: loose files that its parts hold, older manifests and parts."""
        present = {self._files.name("attempts", file) for file in self.storage.files(self._files.name("attempts"))}
        for name in [*present.intersection(manifest.sources), *self._files.superseded(manifest)]:
            self.storage.delete(name)

    def _merge(
        self, parts: list[Part], attempts: pa.Table, measurements: pa.Table
    ) -> tuple[list[Part], pa.Table, pa.Table]:
        """Takes small parts in: sizes stay a falling geometric series, so files are few and rows are rewritten log n
        times."""
        while parts and parts[-1].rows <= min(2 * len(attempts), LARGEST_MERGED_ROWS):
            try:
                older = [
                    read_parquet(self.storage, self._files.part(parts[-1], k), k) for k in ("attempts", "measurements")
                ]
            except (PartUnreadableError, PartVanishedError):
                break  # what cannot be read is kept as it is
            attempts, measurements = pa.concat_tables([older[0], attempts]), pa.concat_tables([older[1], measurements])
            parts.pop()
        return parts, attempts, measurements

    # --- frontier -----------------------------------------------------------------------------------------------------

    def write_frontier(
        self,
        members: pa.Table,
        hypervolume: float | None,
        n_trials: int,
        *,
        objectives: Sequence[str] = (),
        reference: Sequence[float] = (),
        context: str | None = None,
    ) -> int:
        """Adds a snapshot to ``frontier.parquet`` and returns its number. A damaged history is set aside, not lost.

        Args:
            members: the frontier as ``query.pareto`` returns it; may be empty.
            hypervolume: up to ``reference``, in multiples of the baseline; None where the baseline does not allow it.
            n_trials: trials done when it was taken.
            objectives: names, in the order of ``reference``.
            reference: the reference point in the objectives' own units, one number an objective.
        """
        name = self._files.name("frontier.parquet")
        try:
            history = read_parquet(self.storage, name, "frontier")
        except PartVanishedError:
            history = empty(FRONTIER)
        except PartUnreadableError:
            self.storage.put_atomic(f"{name}.damaged-{int(time.time())}", self.storage.read(name))
            history = empty(FRONTIER)
        number = (pc.max(history["snapshot"]).as_py() or 0) + 1
        shared = {
            "snapshot": number,
            "taken_at": time.time_ns() // 1000,
            "trials": n_trials,
            "hypervolume": hypervolume,
            "objectives": list(objectives),
            "reference": [float(r) for r in reference],
            "context": context or self.context,
        }
        new = frontier_table([{**row, **shared} for row in members.to_pylist()] or [shared])
        self.storage.put_atomic(name, parquet_bytes(pa.concat_tables([history, new])))
        return number

    def frontier(self) -> pa.Table:
        """Returns ``frontier.parquet``: one row a member of each snapshot (``schema.FRONTIER``), the newest
        last."""
        try:
            return read_parquet(self.storage, self._files.name("frontier.parquet"), "frontier")
        except PartVanishedError:
            return empty(FRONTIER)
        except PartUnreadableError as error:
            self._damaged[error.problem.file] = error.problem
            return empty(FRONTIER)
