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
"""

from __future__ import annotations

import json
import re
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.ledger.columns import empty
from orchestrator.ledger.compaction import Compaction
from orchestrator.ledger.files import LedgerError, LedgerFiles, LedgerWarning, Part
from orchestrator.ledger.parquet_files import (
    KINDS,
    PartUnreadableError,
    PartVanishedError,
    Problem,
    parquet_bytes,
    read_parquet,
    verify,
)
from orchestrator.ledger.records import row_fault
from orchestrator.ledger.schema import (
    FRONTIER,
    attempt_row,
    attempts_table,
    frontier_table,
    measurements_table,
    report_record,
)
from orchestrator.ledger.snapshot import Snapshot
from orchestrator.ledger.study_file import read_study
from orchestrator.study.constraints import Constraint, parse
from workers.node.storage import Storage

__all__ = ["Ledger", "LedgerError", "LedgerWarning", "Problem", "Snapshot", "attempt_row", "parquet_bytes"]

T = TypeVar("T")

_REMEASURED = re.compile(r"([0-9a-f]+)\.[0-9a-f]{8}\.json")

_MISSING = "is named by the manifest but missing"

READ_TRIES = 20
"""Snapshots a reader takes before it gives up; each failed one means that a compaction ended meanwhile."""


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
        self._compaction = Compaction(self._files)
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
        self.storage.put_atomic(self._files.ask(context, number), json.dumps(record).encode())

    def asks(self, context: str) -> list[dict[str, Any]]:
        """Returns what was handed out in a context, by number."""
        return self._files.asks([], prefix=f"{context}.")

    def mark_running(self, trial_id: str, whereabouts: Mapping[str, Any]) -> None:
        """Records where a trial runs. Its attempt removes the mark; a lost worker leaves it."""
        record = {**whereabouts, "trial_id": trial_id}
        self.storage.put_atomic(self._files.name("running", f"{trial_id}.json"), json.dumps(record).encode())

    def running(self) -> dict[str, dict[str, Any]]:
        """Returns trial id to whereabouts of the marks that are left: trials that run, or whose worker was lost."""
        return self._files.running([])

    def waiting(self) -> frozenset[str]:
        """Returns those of :meth:`running` that wait for the lane, or for a stage that another trial runs."""
        return frozenset(trial for trial, record in self.running().items() if record.get("waiting") is True)

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
            return read_study(name, self.storage.read(name))
        except FileNotFoundError:
            return None

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

    def outcomes(
        self, context: str, trials: Sequence[str] | None = None, without: Collection[str] = ()
    ) -> dict[str, tuple[str, dict[str, float]]]:
        """Returns trial id to (status, metrics) of accepted attempts in a context; ``trials`` names those wanted.

        Args:
            without: attempts that are left out; their trials are, where no later attempt was accepted.
        """
        table = self.trials(["trial_id", "attempt_id", "status", "metrics", "context"])
        keep = pc.equal(table["context"], context)
        if without:
            keep = pc.and_(
                keep, pc.invert(pc.is_in(table["attempt_id"], value_set=pa.array(list(without), pa.string())))
            )
        if trials is not None:
            keep = pc.and_(keep, pc.is_in(table["trial_id"], value_set=pa.array(list(trials), pa.string())))
        rows = table.filter(keep).to_pylist()
        known = ({k: v for k, v in json.loads(r["metrics"]).items() if v is not None} for r in rows)
        return {r["trial_id"]: (r["status"], metrics) for r, metrics in zip(rows, known, strict=True)}

    def accepted_attempts(self, context: str, statuses: Collection[str]) -> frozenset[str]:
        """Returns the accepted attempts of a context that ended in one of ``statuses``."""
        table = self.trials(["attempt_id", "status", "context"])
        wanted = pc.is_in(table["status"], value_set=pa.array(list(statuses), pa.string()))
        rows = table.filter(pc.and_(pc.equal(table["context"], context), wanted))
        return frozenset(rows["attempt_id"].to_pylist())

    def consistent(self, read: Callable[[Snapshot], T]) -> T:
        """Returns ``read(snapshot)``, called again on a new snapshot where a part vanished or proved damaged while
        reading.

        Rows that are known to be missing from the answer are told as :class:`LedgerWarning`, one a file.

        Raises:
            LedgerError: if parts keep vanishing.
            StorageFault: the storage does not answer.
        """
        gone = ""
        for _ in range(READ_TRIES):
            try:
                snapshot = self.snapshot()
                answer = read(snapshot)
            except PartVanishedError as error:
                if str(error) == gone:  # the manifest was read again and still names it
                    self._damaged[gone] = Problem(gone, _MISSING, hides_rows=True)
                gone = str(error)
            except PartUnreadableError as error:
                self._damaged[error.problem.file] = error.problem
            else:
                self._warn(snapshot.missing())
                return answer
        raise LedgerError(
            f"{self.study}/ledger: parts keep vanishing, last {gone}; does anything else delete files there?"
        )

    def _warn(self, problems: Sequence[Problem]) -> None:
        remedy = f"what it holds is missing from what is told; `vitpareto repair {self.study}` says what is left"
        for problem in problems:
            warnings.warn(f"{problem.file}: {problem.reason}; {remedy}", LedgerWarning, stacklevel=4)

    def snapshot(self) -> Snapshot:
        """Takes a snapshot; its reads may raise, so use :meth:`consistent`."""
        lost: list[Problem] = []
        listed = self._files.attempts()  # before the manifest: see the module docstring
        of_reports: list[Problem] = []
        reports = self._files.reports(of_reports)
        parts, taken = self._files.parts(lost)
        damaged = {kind: [p for p in parts if self._files.part(p, kind) in self._damaged] for kind in KINDS}
        covered = False
        if any(damaged.values()):  # the generation before is still there
            there = {part.id: part for part in (*self._files.unnamed(), *parts)}
            covered = taken is not None and self._compaction.covers(parts, there.values(), taken, self._damaged)
            parts, taken = list(there.values()), None
        loose = self._files.loose(lost, sorted(set(listed).difference(taken or (), self._damaged)))
        usable, missing = {}, {}
        for kind in KINDS:
            usable[kind] = [part for part in parts if self._files.part(part, kind) not in self._damaged]
            gone = [] if covered else [self._damaged[self._files.part(part, kind)] for part in damaged[kind]]
            missing[kind] = [p for p in [*lost, *gone] if p.hides_rows]
        missing["measurements"] += [p for p in of_reports if p.hides_rows]
        return Snapshot(self._files, usable, loose, reports, self.constraints, taken is None, missing)

    def problems(self) -> list[Problem]:
        """Looks through the study's files, every byte of the ledger's; returns those that cannot be used.

        Raises:
            StorageFault: the storage does not answer.
        """
        found: list[Problem] = []
        self._files.reports(found)
        self._files.asks(found)
        self._files.running(found)
        self._files.records("baselines", found)
        self._files.loose(found)
        found += self._files.foreign()
        parts, taken = self._files.parts(found)
        bad = [problem for part in parts for kind in KINDS if (problem := self.part_problem(part, kind)) is not None]
        if (
            bad
            and taken is not None
            and self._compaction.covers(parts, self._files.unnamed(), taken, {p.file for p in bad})
        ):
            bad = [replace(problem, hides_rows=False) for problem in bad]
        found += bad
        try:
            verify(self.storage, self._files.name("frontier.parquet"), "frontier", None)
        except PartUnreadableError as error:
            found.append(error.problem)
        except PartVanishedError:
            pass  # there is none before the baseline
        return found

    def part_problem(self, part: Part, kind: str) -> Problem | None:
        """Reads the whole file of a part; returns what is wrong with it, or None."""
        file = self._files.part(part, kind)
        try:
            verify(self.storage, file, kind, part.contents.get(kind))
        except PartUnreadableError as error:
            return error.problem
        except PartVanishedError:
            named = {self._files.part(p, kind) for p in self._files.parts([])[0]}  # or merged meanwhile
            return Problem(file, _MISSING, hides_rows=True) if file in named else None
        return None

    def check_whole(self) -> None:
        """Checks that no row is known to be missing, before trials are run that only seem to be left to run.

        Raises:
            LedgerError: some are; the text names every file and the remedy.
            StorageFault: the storage does not answer.
        """
        lost = [f"{p.file}: {p.reason}" for p in self.problems() if p.hides_rows]
        if lost:
            what = f"study {self.study}: trials that ended would be run again; put these files back from a copy, or see"
            remedy = f"with `vitpareto repair {self.study}` what is left and go on with that (--apply)"
            raise LedgerError("\n".join([*lost, f"{what} {remedy}"]))

    # --- compaction ---------------------------------------------------------------------------------------------------

    def compact(self, min_rows: int = 1) -> int:
        """Moves the loose attempts into Parquet and returns how many. Being killed at any point loses and repeats nothing.

        Args:
            min_rows: with fewer loose attempts nothing is done.

        Raises:
            LedgerError: the manifest is damaged, newer or missing; loose attempts stay as they are and stay readable.
            StorageFault: whether it was done is not known; nothing that is needed was deleted.
        """
        return self._compaction.compact(min_rows)

    def append(self, attempts: pa.Table, measurements: pa.Table | None = None) -> None:
        """Adds tables of new attempts past the loose files, for imports and benchmarks.

        Raises:
            LedgerError: another process compacted at the same time, or the manifest is unusable.
        """
        self._compaction.append(attempts, measurements)

    def rebuild(self, kept: Sequence[Part], attempts: pa.Table, measurements: pa.Table) -> None:
        """Makes a generation of these parts and rows the newest one; what else lies in the folder counts no more.

        Raises:
            LedgerError: another process compacted at the same time.
        """
        self._compaction.rebuild(kept, attempts, measurements)

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
            self._warn([error.problem])
            return empty(FRONTIER)
