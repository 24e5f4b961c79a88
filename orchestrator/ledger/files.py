"""The files of a ledger: their names, the loose records, and the manifest that says which Parquet parts count."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from orchestrator.ledger.parquet_files import Content, PartVanishedError, Problem
from orchestrator.ledger.records import ask_fault, report_fault, row_fault
from orchestrator.ledger.schema import SCHEMA_VERSION, attempts_table, measurements_table
from workers.node.storage import Storage
from workers.trial import digest

_MANIFEST = re.compile(r"manifest-(\d{6,})\.json")
_PART = re.compile(r"(attempts|measurements)-((\d{6,})-[0-9a-f]{8})\.parquet")
_ID = re.compile(r"[A-Za-z0-9_-]+")
_PART_ID = re.compile(r"\d{6,}-[0-9a-f]{8}")
_ATTEMPT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.json")
_REPORT = re.compile(r"([A-Za-z0-9_-]+)(\.[0-9a-f]{8})?\.json")
_ROWS = {"attempts": _ATTEMPT, "reports": _REPORT}
"""Folders whose files are rows that answers rest on, and how those are named."""

_FOREIGN = (pa.ArrowException, TypeError, ValueError, LookupError, AttributeError, OverflowError)
"""What a JSON object of another shape may raise when it is put into a table."""


class LedgerError(Exception):
    """The ledger cannot be used as it stands; nothing was changed."""


class NewerLedgerError(LedgerError):
    """The manifest is of a later version than this one reads."""


class LedgerWarning(UserWarning):
    """An answer was given without rows that are known to be missing: the text names the file, the reason and the remedy."""


@dataclass(frozen=True)
class Part:
    """A compacted pair of Parquet files. ``id`` is ``<generation>-<random>``; ``rows`` counts attempts (0: not known);
    ``contents`` says of each kind what was written (empty: it was before that was recorded)."""

    id: str
    rows: int
    contents: Mapping[str, Content] = field(default_factory=dict)

    @property
    def generation(self) -> int:
        """The generation that made it."""
        return int(self.id.partition("-")[0])


@dataclass(frozen=True)
class Manifest:
    """One generation of the ledger: its parts, oldest first, and the loose files that its compaction took in."""

    generation: int
    parts: tuple[Part, ...]
    sources: tuple[str, ...]

    def to_json(self) -> bytes:
        """Returns what :meth:`LedgerFiles.manifest` reads."""
        parts = [asdict(part) for part in self.parts]
        values = {"schema_version": SCHEMA_VERSION, "parts": parts, "sources": list(self.sources)}
        return json.dumps({**values, "digest": digest(values)}).encode()


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

    def ask(self, context: str, number: int) -> str:
        """Returns the storage name of what was handed out as Optuna's trial ``number`` of a context."""
        return self.name("asks", f"{context}.{number:08d}.json")

    def part(self, part: Part, kind: str) -> str:
        """Returns the storage name of the Parquet file of ``kind``, attempts or measurements."""
        return self.name("ledger", f"{kind}-{part.id}.parquet")

    def manifest_name(self, generation: int) -> str:
        """Returns the storage name of a generation's manifest."""
        return self.name("ledger", f"manifest-{generation:06d}.json")

    def records(self, folder: str, problems: list[Problem], prefix: str = "") -> list[tuple[str, dict[str, Any]]]:
        """Returns (storage name, object) of a folder's JSON files; what is no JSON object goes to ``problems``.

        Raises:
            StorageFault: the storage does not answer.
        """
        files = [file for file in self.storage.files(self.name(folder)) if file.startswith(prefix)]
        return self._records([self.name(folder, file) for file in files], problems)

    def _records(
        self, names: Sequence[str], problems: list[Problem], gone: type[Exception] | None = None
    ) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for name in names:
            try:
                record = json.loads(self.storage.read(name)) if name.endswith(".json") else None
            except FileNotFoundError:
                if gone is not None:
                    raise gone(name) from None
                continue  # cleared since it was listed
            except (ValueError, RecursionError) as error:
                problems.append(self._bad(name, f"is truncated or not JSON: {error}"))
                continue
            if isinstance(record, dict):
                found.append((name, record))
            else:
                problems.append(self._bad(name, "is not a record of vitpareto"))
        return found

    def _bad(self, name: str, reason: str, record: Mapping[str, Any] | None = None) -> Problem:
        """Says what is wrong with a JSON file; rows are missing with it where its name is that of a row's file."""
        folder, _, file = name.removeprefix(f"{self.study}/").partition("/")
        version = (record or {}).get("schema_version")
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        return Problem(name, reason, folder in _ROWS and _ROWS[folder].fullmatch(file) is not None, newer)

    def attempts(self) -> list[str]:
        """Returns the storage names of the attempt files."""
        return [self.name("attempts", file) for file in self.storage.files(self.name("attempts"))]

    def loose(self, problems: list[Problem], names: Sequence[str] | None = None) -> Loose:
        """Reads attempt files (None: all there are); those that are not attempts go to ``problems``.

        Raises:
            PartVanishedError: one of ``names`` is gone since it was listed.
        """
        found = []
        gone = None if names is None else PartVanishedError
        for name, row in self._records(self.attempts() if names is None else names, problems, gone):
            fault = row_fault(row) or self._misplaced(name, row)
            if fault is None:
                found.append((name, row))
            else:
                problems.append(self._bad(name, fault, row))
        try:
            return _tables(found)
        except _FOREIGN:
            return _tables([pair for pair in found if self._fits(*pair, problems)])

    def _fits(self, name: str, row: dict[str, Any], problems: list[Problem]) -> bool:
        try:
            _tables([(name, row)])
        except _FOREIGN as error:
            problems.append(self._bad(name, f"is not an attempt record: {error}"))
            return False
        return True

    def reports(self, problems: list[Problem]) -> pa.Table:
        """Returns what was measured after trials had ended; there is little of it, so it is never compacted."""
        tables = [measurements_table([])]
        for name, record in self.records("reports", problems):
            fault = report_fault(record)
            if fault is not None:
                problems.append(self._bad(name, fault, record))
                continue
            try:
                tables.append(measurements_table([record]))
            except _FOREIGN as error:
                problems.append(self._bad(name, f"is not a report of vitpareto: {error}"))
        return pa.concat_tables(tables)

    def asks(self, problems: list[Problem], prefix: str = "") -> list[dict[str, Any]]:
        """Returns what was handed out, by number; what cannot have been goes to ``problems``."""
        found = []
        for name, record in self.records("asks", problems, prefix):
            fault = ask_fault(record)
            if fault is None and name != self.ask(record["context"], record["number"]):
                fault = f"holds what was asked as {record['context']}.{record['number']}"
            if fault is None:
                found.append(record)
            else:
                problems.append(self._bad(name, fault))
        return found

    def running(self, problems: list[Problem]) -> dict[str, dict[str, Any]]:
        """Returns trial id to whereabouts; marks that are none go to ``problems``."""
        found = {}
        for name, record in self.records("running", problems):
            trial, started = record.get("trial_id"), record.get("started_at", 0.0)
            if name == self.name("running", f"{trial}.json") and isinstance(started, int | float):
                found[str(trial)] = record
            else:
                problems.append(self._bad(name, "is not the mark of a running trial"))
        return found

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
            StorageFault: the storage does not answer.
        """
        while True:
            files = self.storage.files(self.name("ledger"))
            generation = _newest(files)
            later = [m[0] for m in map(_PART.fullmatch, files) if m and int(m[3]) > generation + 1]
            if later and self.newest() == generation:
                raise LedgerError(f"{later[-1]} is newer than the newest manifest; was a manifest removed?")
            found = self.manifest_of(generation)
            if found is not None:
                return found  # or a newer one replaced it

    def manifest_of(self, generation: int) -> Manifest | None:
        """Returns the manifest of a generation, None where there is none; 0 is that of an empty ledger.

        Raises:
            LedgerError: it is damaged or newer than this version.
        """
        name = self.manifest_name(generation)
        try:
            return _parse(name, generation, json.loads(self.storage.read(name))) if generation else Manifest(0, (), ())
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LedgerError(f"{name} is damaged: {error}") from None

    def newest(self) -> int:
        """Returns the generation of the newest manifest, 0 where there is none."""
        return _newest(self.storage.files(self.name("ledger")))

    def parts(self, problems: list[Problem]) -> tuple[list[Part], frozenset[str] | None]:
        """Returns the parts to read, and the attempt files that they hold.

        Without a usable manifest every part counts: then None, and they may repeat attempts.
        """
        try:
            manifest = self.manifest()
        except LedgerError as error:
            problems.append(Problem(self.name("ledger"), str(error), True, isinstance(error, NewerLedgerError)))
            return self.all_parts(), None
        more = self.unnamed(manifest)
        return [*manifest.parts, *more], None if more else frozenset(manifest.sources)

    def all_parts(self) -> list[Part]:
        """Returns every part that is there, in use or not, oldest first; one of its two files may be missing."""
        found = {m[2] for m in map(_PART.fullmatch, self.storage.files(self.name("ledger"))) if m}
        return [Part(part, 0) for part in sorted(found)]

    def unnamed(self, manifest: Manifest | None = None) -> list[Part]:
        """Returns the parts with both files that are newer than the newest manifest: of a compaction that goes on, or was
        killed, or whose manifest somebody removed (None: all parts). All they hold are attempts, so reading them is never
        wrong."""
        files = set(self.storage.files(self.name("ledger")))
        after = -1 if manifest is None else manifest.generation
        parts = [part for part in self.all_parts() if part.generation > after]
        return [p for p in parts if {f"attempts-{p.id}.parquet", f"measurements-{p.id}.parquet"} <= files]

    def superseded(self, manifest: Manifest, previous: Manifest) -> tuple[list[str], list[Part]]:
        """Returns the names of the manifests before ``previous`` and of halves of parts, and the parts of up to the newest
        generation that neither of the two names."""
        files = self.storage.files(self.name("ledger"))
        used = {part.id for part in (*manifest.parts, *previous.parts)}
        stale = [m[0] for m in map(_MANIFEST.fullmatch, files) if m and int(m[1]) < previous.generation]
        unused = [m for m in map(_PART.fullmatch, files) if m and m[2] not in used and int(m[3]) <= manifest.generation]
        parts = [Part(m[2], 0) for m in unused if m[1] == "attempts"]
        ids = {part.id for part in parts}
        halves = [m[0] for m in unused if m[2] not in ids]  # of a process killed between the two
        return [self.name("ledger", file) for file in (*stale, *halves)], parts

    def foreign(self) -> list[Problem]:
        """Returns the files of the Parquet folder that are none of ours."""
        files = self.storage.files(self.name("ledger"))
        strange = [f for f in files if not (_MANIFEST.fullmatch(f) or _PART.fullmatch(f))]
        return [Problem(self.name("ledger", f), "is not a file of vitpareto") for f in strange]


def _newest(files: Sequence[str]) -> int:
    return max((int(m[1]) for m in map(_MANIFEST.fullmatch, files) if m), default=0)


def _parse(name: str, generation: int, values: Mapping[str, Any]) -> Manifest:
    if values["schema_version"] > SCHEMA_VERSION:
        raise NewerLedgerError(
            f"{name} has schema version {values['schema_version']}, this vitpareto reads up to {SCHEMA_VERSION}"
        )
    rest = {key: value for key, value in values.items() if key != "digest"}
    if values.get("digest", digest(rest)) != digest(rest):  # older ones have none
        raise ValueError("its digest is not that of its content")
    sources = values["sources"]
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise ValueError("its sources are not names")
    found = Manifest(generation, tuple(map(_part, values["parts"])), tuple(sources))
    if all(part.generation != generation for part in found.parts):
        raise ValueError(f"it names no part of generation {generation}")
    return found


def _part(values: Mapping[str, Any]) -> Part:
    if not _PART_ID.fullmatch(values["id"]):
        raise ValueError(f"no part is called {values['id']!r}")
    contents = {kind: Content(int(c["size_bytes"]), str(c["sha256"])) for kind, c in values.get("contents", {}).items()}
    return Part(values["id"], int(values["rows"]), contents)


def _tables(found: Sequence[tuple[str, dict[str, Any]]]) -> Loose:
    rows = [row for _, row in found]
    return Loose([name for name, _ in found], attempts_table(rows), measurements_table(rows))
