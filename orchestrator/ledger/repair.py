"""Makes a usable ledger again of what is left of a damaged one.

Nothing is deleted: damaged files move to ``<study>/damaged/<time>/``. Copies are made first, then a generation with all rows that
could be saved becomes the newest, then the originals go; a repair that was killed is done again.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.ledger.columns import empty, group_numbers, to_arrow
from orchestrator.ledger.files import LedgerError, LedgerFiles, Manifest, Part
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.parquet_files import (
    KINDS,
    PartUnreadableError,
    PartVanishedError,
    Problem,
    parquet_bytes,
    read_parquet,
)
from orchestrator.ledger.records import ask_fault
from orchestrator.ledger.salvage import salvage
from orchestrator.ledger.schema import SCHEMAS
from workers.node.lease import LeaseHeld, acquire
from workers.node.storage import Storage


@dataclass(frozen=True)
class Repair:
    """What a repair does, or did.

    Attributes:
        aside: damaged file to the reason; it moves to ``folder``.
        gone: what is not there to be moved, with the reason: a missing file, a folder in place of a file.
        trials: that the ledger knows after it; ``recovered`` counts attempts that were taken out of damaged or older files.
        lost: ids of trials that are known to have ended, or to have been asked for, and are in no file that can be read.
        without_records: ids of trials whose numbers are there, but not the single measurements that they rest on.
        null_columns: columns that are null in recovered rows because they could not be read.
        asks: records of asks that are written anew from the attempts.
    """

    study: str
    applied: bool
    folder: str
    aside: dict[str, str]
    gone: dict[str, str]
    trials: int
    recovered: int
    lost: list[str]
    without_records: list[str]
    null_columns: list[str]
    asks: int

    @property
    def needed(self) -> bool:
        """Something is damaged."""
        return bool(self.aside or self.gone)


_TRIAL = re.compile(r"([A-Za-z0-9_-]+)\..*json")
"""A file that is named after a trial: an attempt, a report."""

_OF_ATTEMPTS = ["trial_id", "attempt_id", "status", "context", "optuna", "spec"]


@dataclass
class _Rows:
    """What the next generation holds: parts that are whole, and tables of the rows saved from others."""

    kept: list[Part]
    tables: dict[str, pa.Table] = field(default_factory=lambda: {kind: empty(SCHEMAS[kind]) for kind in KINDS})
    nulls: set[str] = field(default_factory=set)


def repair(storage: Storage, study: str, *, apply: bool = False) -> Repair:
    """Looks what is left of a damaged study, and with ``apply`` goes on with that.

    Rows come from parts that are whole, from the readable columns of damaged ones, from parts of older generations that are
    still there, and from attempt files that are not compacted.

    Raises:
        LedgerError: the study is being run, or a file of it is of a newer version.
        StorageFault: the storage does not answer; nothing counts as damaged that only could not be read.
    """
    with _held(storage, study) if apply else nullcontext():
        return _repair(storage, study, apply=apply)


@contextmanager
def _held(storage: Storage, study: str) -> Iterator[None]:
    try:
        lease = acquire(storage, f"{study}/lease", note={"study": study, "for": "repair"})
    except LeaseHeld as error:
        raise LedgerError(f"study {study} is being run: {error}; wait for it or stop it, then repair") from None
    assert lease is not None  # only a waiting acquire returns None
    with lease:
        yield


def _repair(storage: Storage, study: str, *, apply: bool) -> Repair:
    files, ledger = LedgerFiles(storage, study), Ledger(storage, study)
    problems = _problems(ledger, files)
    aside = {p.file: p.reason for p in problems if storage.exists(p.file)}
    manifest = _manifest(files)
    of_ledger = [p for p in problems if p.file.startswith(files.name("ledger"))]
    rows_gone = any(p.hides_rows or p.file.endswith(".parquet") for p in of_ledger)
    rows = _saved(ledger, files, manifest) if rows_gone else _Rows(files.parts([])[0])
    attempts = _all_attempts(files, rows)
    asks = files.asks([])
    named = _named_trials(files, manifest, problems) | (_asked(asks) if rows_gone else set())
    lost = sorted(named - {*attempts["trial_id"].to_pylist(), *files.running([])})
    anew = _asks_of(attempts, asks)
    folder = files.name("damaged", time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
    if apply and problems:
        for file in aside:
            storage.put_atomic(f"{folder}/{file.removeprefix(f'{study}/')}", storage.read(file))
        _write(ledger, files, rows if rows_gone else None, anew, lost, aside)
    return Repair(
        study=study,
        applied=apply and bool(problems),
        folder=f"{storage.url}/{folder}",
        aside=aside,
        gone={p.file: p.reason for p in problems if p.file not in aside},
        trials=len(set(attempts["trial_id"].to_pylist())),
        recovered=len(rows.tables["attempts"]),
        lost=lost,
        without_records=_without_records(files, rows, attempts) if rows_gone else [],
        null_columns=sorted(rows.nulls),
        asks=len(anew),
    )


# --- what there is ----------------------------------------------------------------------------------------------------


def _problems(ledger: Ledger, files: LedgerFiles) -> list[Problem]:
    """Returns what is wrong, each with the file that is to be set aside.

    Raises:
        LedgerError: a file is of a newer version.
    """
    found = [_of_manifest(p, files) if p.file == files.name("ledger") else p for p in ledger.problems()]
    try:
        if ledger.study_record() is None:
            found.append(Problem(files.name("study.json"), "is missing; `vitpareto run` the study's file again"))
    except LedgerError as error:
        found.append(Problem(files.name("study.json"), str(error).partition(" ")[2]))
    newer = [f"{p.file}: {p.reason}" for p in found if p.newer]
    if newer:
        raise LedgerError(f"{newer[0]}; repair the study with the vitpareto that wrote it")
    return found


def _of_manifest(problem: Problem, files: LedgerFiles) -> Problem:
    newest = files.manifest_name(files.newest())
    return replace(problem, file=newest) if problem.reason.startswith(newest) else problem


def _manifest(files: LedgerFiles) -> Manifest | None:
    try:
        return files.manifest()
    except LedgerError:
        return None


def _saved(ledger: Ledger, files: LedgerFiles, manifest: Manifest | None) -> _Rows:
    named = {part.id: part for part in (manifest.parts if manifest else ())}
    whole = {i for i, part in named.items() if all(ledger.part_problem(part, kind) is None for kind in KINDS)}
    rows = _Rows([part for i, part in named.items() if i in whole])
    others = [named.get(part.id, part) for part in (*files.all_parts(), *named.values()) if part.id not in whole]
    loose = files.loose([])
    elsewhere = {*loose.attempts["attempt_id"].to_pylist()}
    for part in rows.kept:
        elsewhere.update(_read(files, part, "attempts", ["attempt_id"])["attempt_id"].to_pylist())
    for kind in KINDS:
        intact, damaged = [], []
        for part in {part.id: part for part in others}.values():
            if ledger.part_problem(part, kind) is None:
                intact.append(_read(files, part, kind))
            else:
                table, nulls = salvage(files.storage, files.part(part, kind), kind)
                damaged.append(table)
                rows.nulls |= nulls if len(table) else set()
        table = _without(_once(pa.concat_tables([*intact, *damaged, empty(SCHEMAS[kind])]), kind), elsewhere)
        rows.tables[kind] = table
    of_attempts = pc.is_in(rows.tables["measurements"]["attempt_id"], value_set=_column(rows.tables["attempts"]))
    rows.tables["measurements"] = rows.tables["measurements"].filter(of_attempts)
    return rows


def _read(files: LedgerFiles, part: Part, kind: str, columns: list[str] | None = None) -> pa.Table:
    try:
        return read_parquet(files.storage, files.part(part, kind), kind, columns)
    except PartVanishedError:  # a part of an older generation, of which one file is gone already
        schema = SCHEMAS[kind]
        return empty(schema if columns is None else pa.schema([schema.field(name) for name in columns]))


def _column(attempts: pa.Table) -> pa.Array:
    return attempts["attempt_id"].combine_chunks()


def _once(table: pa.Table, kind: str) -> pa.Table:
    """Returns the first row of each attempt, or of each measurement of it."""
    key = table["attempt_id"]
    if kind == "measurements":
        key = pc.binary_join_element_wise(key, table["position"].cast(pa.string()), ":")
    numbers, count = group_numbers(key)
    return table if count == len(table) else table.take(to_arrow(np.sort(np.unique(numbers, return_index=True)[1])))


def _without(table: pa.Table, attempts: set[str]) -> pa.Table:
    there = pc.is_in(table["attempt_id"], value_set=pa.array(sorted(attempts), pa.string()))
    return table.filter(pc.invert(there))


def _all_attempts(files: LedgerFiles, rows: _Rows) -> pa.Table:
    loose = files.loose([]).attempts
    kept = [_read(files, part, "attempts", _OF_ATTEMPTS) for part in rows.kept]
    return pa.concat_tables([*kept, *(t.select(_OF_ATTEMPTS) for t in (rows.tables["attempts"], loose))])


# --- what is lost -----------------------------------------------------------------------------------------------------


def _named_trials(files: LedgerFiles, manifest: Manifest | None, problems: Sequence[Problem]) -> set[str]:
    """Returns the trials that have ended by what names them: files that were compacted, that are damaged, reports, frontier."""
    rows = [p.file for p in problems if p.hides_rows and not p.file.startswith(files.name("ledger"))]
    reports = files.storage.files(files.name("reports"))
    names = [name.rpartition("/")[2] for name in [*(manifest.sources if manifest else ()), *rows, *reports]]
    found = {m[1] for m in map(_TRIAL.fullmatch, names) if m}
    try:
        members = read_parquet(files.storage, files.name("frontier.parquet"), "frontier", ["trial_id"])
    except (PartVanishedError, PartUnreadableError):
        return found
    return found | {trial for trial in members["trial_id"].to_pylist() if trial is not None}


def _asked(asks: Sequence[dict[str, Any]]) -> set[str]:
    specs = [spec.get("trial_id") for ask in asks for spec in ask.get("specs", ())]
    return {trial for trial in specs if isinstance(trial, str)}


def _without_records(files: LedgerFiles, rows: _Rows, attempts: pa.Table) -> list[str]:
    """Returns the trials with an ok attempt of which no measurement is left."""
    tables = [_read(files, part, "measurements", ["attempt_id"]) for part in rows.kept]
    tables += [t.select(["attempt_id"]) for t in (rows.tables["measurements"], files.loose([]).measurements)]
    measured = {i for table in tables for i in table["attempt_id"].to_pylist()}
    found = attempts.select(["trial_id", "attempt_id", "status"]).to_pylist()
    return sorted({row["trial_id"] for row in found if row["status"] == "ok" and row["attempt_id"] not in measured})


def _asks_of(attempts: pa.Table, asks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the asks whose records are gone, as their attempts remember them."""
    there = {(ask["context"], ask["number"]) for ask in asks}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in attempts.select(["context", "optuna", "spec"]).to_pylist():
        state = {**(json.loads(row["optuna"] or "null") or {}), "context": row["context"]}
        if row["spec"] is None or ask_fault(state) is not None or (row["context"], state["number"]) in there:
            continue
        ask = found.setdefault((row["context"], state["number"]), {**state, "specs": []})
        spec = json.loads(row["spec"])
        if spec not in ask["specs"]:  # which another attempt had
            ask["specs"].append(spec)
    return list(found.values())


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(
    ledger: Ledger,
    files: LedgerFiles,
    rows: _Rows | None,
    asks: Sequence[dict[str, Any]],
    lost: Sequence[str],
    aside: Mapping[str, str],
) -> None:
    """Makes the saved rows the newest generation, then removes the originals of what was copied aside."""
    if rows is not None:
        ledger.rebuild(rows.kept, rows.tables["attempts"], rows.tables["measurements"])
    for ask in asks:
        ledger.write_ask(ask["context"], ask["number"], ask)
    anew = {files.ask(ask["context"], ask["number"]) for ask in asks}
    frontier = files.name("frontier.parquet")
    history = salvage(files.storage, frontier, "frontier")[0] if frontier in aside else None
    for file in aside:
        if file == frontier and history is not None and len(history):
            files.storage.put_atomic(file, parquet_bytes(history))
        elif file not in anew:
            files.storage.delete(file)
    record = ledger.study_record() or {}
    if lost and record.pop("complete", None):  # there is something to run again
        ledger.write_study(record)
