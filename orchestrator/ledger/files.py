"""The files of a ledger: their names, the loose records, and the manifest that says which Parquet parts count."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from orchestrator.ledger.schema import SCHEMA_VERSION, attempts_table, measurements_table, row_fault
from workers.node.storage import Storage

_MANIFEST = re.compile(r"manifest-(\d{6,})\.json")
_PART = re.compile(r"(attempts|measurements)-((\d{6,})-[0-9a-f]{8})\.parquet")
_ID = re.compile(r"[A-Za-z0-9_-]+")
_FOREIGN = (pa.ArrowException, TypeError, ValueError, LookupError, AttributeError, OverflowError)
"""What a JSON object of another shape may raise when it is put into a table."""


class LedgerError(Exception):
    """The ledger cannot be used as it stands; nothing was changed."""


@dataclass(frozen=True)
class Problem:
    """A file of the study that cannot be used; the rest is read without it."""

    file: str
    reason: str


@dataclass(frozen=True)
class Part:
    """A compacted pair of Parquet files. ``id`` is ``<generation>-<random>``; ``rows`` counts attempts (0: not
    known)."""

    id: str
    rows: int


@dataclass(frozen=True)
class Manifest:
    """One generation of the ledger: its parts, oldest first, and the loose files that its compaction took in."""

    generation: int
    parts: tuple[Part, ...]
    sources: tuple[str, ...]

    def to_json(self) -> bytes:
        """Returns what :meth:`LedgerFiles.manifest` reads."""
        parts = [{"id": p.id, "rows": p.rows} for p in self.parts]
        return json.dumps({"schema_version": SCHEMA_VERSION, "parts": parts, "sources": self.sources}).encode()


@dataclass(frozen=True)
class Loose:
    """Attempt files that are not compacted yet: storage names and their content, in the same order."""

    names: list[str]
    attempts: pa.Table
    measurements: pa.Table


class LedgerFiles:
    """Names and reads the files under ``<study>/`` in ``storage``."""

    def __init__(self, storage: Storage, study: str) -> None:
        self.storage, self.study = storage, study

    def name(self, *path: str) -> str:
        """Returns the storage name of a file or folder of the study."""
        return "/".join((self.study, *path))

    def attempt(self, row: Mapping[str, Any]) -> str:
        """Returns the storage name of an attempt; raises ValueError for an id that is no part of a file name."""
        for key in ("trial_id", "attempt_id"):
            if not _ID.fullmatch(row[key]):
                raise ValueError(f"attempt row: {key} must be letters, digits, '-' or '_', got {row[key]!r}")
        return self.name("attempts", f"{row['trial_id']}.{row['attempt_id']}.json")

    def part(self, part: Part, kind: str) -> str:
        """Returns the storage name of the Parquet file of ``kind``, attempts or measurements."""
        return self.name("ledger", f"{kind}-{part.id}.parquet")

    def manifest_name(self, generation: int) -> str:
        """Returns the storage name of a generation's manifest."""
        return self.name("ledger", f"manifest-{generation:06d}.json")

    def records(self, folder: str, problems: list[Problem], prefix: str = "") -> list[tuple[str, dict[str, Any]]]:
        """Returns (storage name, object) of a folder's JSON files; what is no JSON object goes to ``problems``."""
        found = []
        for file in self.storage.files(self.name(folder)):
            if not file.startswith(prefix):
                continue
            name = self.name(folder, file)
            try:
                record = json.loads(self.storage.read(name)) if file.endswith(".json") else None
            except FileNotFoundError:
                continue  # compacted or cleared since it was listed
            except (OSError, ValueError) as error:
                problems.append(Problem(name, f"is truncated or not JSON: {error}"))
                continue
            if isinstance(record, dict):
                found.append((name, record))
            else:
                problems.append(Problem(name, "is not a record of vitpareto"))
        return found

    def loose(self, problems: list[Problem]) -> Loose:
        """Reads the attempt files; those that are not attempts go to ``problems``."""
        found = []
        for name, row in self.records("attempts", problems):
            fault = row_fault(row) or self._misplaced(name, row)
            if fault is None:
                found.append((name, row))
            else:
                problems.append(Problem(name, fault))
        try:
            return _tables(found)
        except _FOREIGN:
            return _tables([pair for pair in found if _fits(*pair, problems)])

    def reports(self, problems: list[Problem]) -> pa.Table:
        """Returns what was measured after trials had ended; there is little of it, so it is never compacted."""
        tables = [measurements_table([])]
        for name, record in self.records("reports", problems):
            try:
                if record["schema_version"] > SCHEMA_VERSION:
                    raise ValueError(f"schema version {record['schema_version']} is newer than {SCHEMA_VERSION}")
                tables.append(measurements_table([record]))
            except _FOREIGN as error:
                problems.append(Problem(name, f"is not a report of vitpareto: {error}"))
        return pa.concat_tables(tables)

    def _misplaced(self, name: str, row: Mapping[str, Any]) -> str | None:
        try:
            expected = self.attempt(row)
        except ValueError as error:
            return str(error)
        return None if name == expected else f"holds the attempt of {expected}"

    def manifest(self) -> Manifest:
        """Returns the newest manifest.

        Raises:
            LedgerError: it is damaged or newer than this version, or it is gone while its parts are there.
        """
        while True:
            files = self.storage.files(self.name("ledger"))
            generation = _newest(files)
            later = [m[0] for m in map(_PART.fullmatch, files) if m and int(m[3]) > generation + 1]
            if later and self.newest() == generation:
                raise LedgerError(f"{later[-1]} is newer than the newest manifest; was a manifest removed?")
            if not generation:
                return Manifest(0, (), ())
            name = self.manifest_name(generation)
            try:
                return _parse(name, generation, json.loads(self.storage.read(name)))
            except FileNotFoundError:
                continue  # a newer one replaced it
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise LedgerError(f"{name} is damaged: {error}") from None

    def newest(self) -> int:
        """Returns the generation of the newest manifest, 0 where there is none."""
        return _newest(self.storage.files(self.name("ledger")))

    def parts(self, problems: list[Problem]) -> tuple[list[Part], bool]:
        """Returns the parts to read, and whether they may repeat attempts: without a usable manifest every part
        counts."""
        try:
            return list(self.manifest().parts), False
        except LedgerError as error:
            problems.append(Problem(self.name("ledger"), str(error)))
        found = map(_PART.fullmatch, self.storage.files(self.name("ledger")))
        return [Part(m[2], 0) for m in found if m and m[1] == "attempts"], True

    def superseded(self, manifest: Manifest) -> list[str]:
        """Returns the names of manifests and parts of up to this generation that it does not use."""
        used = {part.id for part in manifest.parts}
        old = []
        for file in self.storage.files(self.name("ledger")):
            stale = (m := _MANIFEST.fullmatch(file)) and int(m[1]) < manifest.generation
            unused = (m := _PART.fullmatch(file)) and m[2] not in used and int(m[3]) <= manifest.generation
            if stale or unused:
                old.append(self.name("ledger", file))
        return old

    def foreign(self) -> list[Problem]:
        """Returns the files of the Parquet folder that are none of ours."""
        files = self.storage.files(self.name("ledger"))
        strange = [f for f in files if not (_MANIFEST.fullmatch(f) or _PART.fullmatch(f))]
        return [Problem(self.name("ledger", f), "is not a file of vitpareto") for f in strange]


def _newest(files: Sequence[str]) -> int:
    return max((int(m[1]) for m in map(_MANIFEST.fullmatch, files) if m), default=0)


def _parse(name: str, generation: int, values: Mapping[str, Any]) -> Manifest:
    if values["schema_version"] > SCHEMA_VERSION:
        raise LedgerError(
            f"{name} has schema version {values['schema_version']}, this vitpareto reads up to {SCHEMA_VERSION}"
        )
    return Manifest(generation, tuple(Part(p["id"], int(p["rows"])) for p in values["parts"]), tuple(values["sources"]))


def _tables(found: Sequence[tuple[str, dict[str, Any]]]) -> Loose:
    rows = [row for _, row in found]
    return Loose([name for name, _ in found], attempts_table(rows), measurements_table(rows))


def _fits(name: str, row: dict[str, Any], problems: list[Problem]) -> bool:
    try:
        _tables([(name, row)])
    except _FOREIGN as error:
        problems.append(Problem(name, f"is not an attempt record: {error}"))
        return False
    return True
