"""Compaction of a ledger: loose attempt files become Parquet parts, a generation after the other.

Compaction writes new parts, reads them back, then creates the next manifest and reads that back: whether this process or
another one made the generation is what the manifest says, not what the storage answered. A manifest is created, never
replaced, so of two processes that compact at once exactly one wins. Deleting is a generation late: what manifest n replaces
is deleted once n + 1 is there and n's parts hold it, so that the last generation before the newest can always be read. A
reader lists the loose files before it looks for the manifest, and reads those that the manifest has not taken in.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.ledger.columns import empty
from orchestrator.ledger.files import LedgerError, LedgerFiles, Manifest, Part
from orchestrator.ledger.parquet_files import (
    KINDS,
    Content,
    PartUnreadableError,
    PartVanishedError,
    parquet_bytes,
    read_parquet,
    verify,
)
from orchestrator.ledger.schema import ATTEMPTS, MEASUREMENTS, conform

LARGEST_MERGED_ROWS = 250_000
"""A part with more rows than this is not rewritten any more."""


class Compaction:
    """Makes the generations of one ledger."""

    def __init__(self, files: LedgerFiles) -> None:
        self.files = files

    def covers(
        self, parts: Sequence[Part], there: Iterable[Part], taken: Collection[str], damaged: Collection[str]
    ) -> bool:
        """Says whether what can be read holds as many attempts as ``parts`` were written with: damaged files are no loss where
        what they were made of is still there."""
        whole = [p for p in there if not any(self.files.part(p, kind) in damaged for kind in KINDS)]
        held = set(self.attempt_ids(whole)[0].to_pylist())
        present = set(taken).intersection(self.files.attempts())
        held |= {name.rsplit(".", 2)[-2] for name in present}
        return all(part.rows for part in parts) and len(held) >= sum(part.rows for part in parts)

    def compact(self, min_rows: int = 1) -> int:
        """Moves the loose attempts into Parquet and returns how many. Being killed at any point loses and repeats
        nothing.

        Args:
            min_rows: with fewer loose attempts nothing is done.

        Raises:
            LedgerError: the manifest is damaged, newer or missing; loose attempts stay as they are and stay readable.
        """
        manifest, listed = self.files.manifest(), self.files.attempts()
        try:
            self._sweep(manifest)  # what a compaction that was killed left
            good, bad = self._sorted(manifest)
            known = self.attempt_ids(good)[0]
            loose = self.files.loose([], sorted(set(listed).difference(() if bad else manifest.sources)))
            unnamed = self.files.unnamed(None if bad else manifest)
            damaged = {self.files.part(part, kind) for part in bad for kind in KINDS}
            if bad and self.covers(manifest.parts, unnamed, manifest.sources, damaged):
                manifest = replace(manifest, parts=tuple(part for part in manifest.parts if part not in bad))
            if len(loose.names) < max(min_rows, 1) and not unnamed:
                return 0
            fresh = [self._new_rows([loose.attempts, loose.measurements], known)]
            for part in unnamed:
                known = pa.concat_arrays([known, fresh[-1][0]["attempt_id"].combine_chunks()])
                with suppress(PartUnreadableError):
                    fresh.append(self._new_rows(self._read(part), known))
        except PartVanishedError:
            return 0  # another process compacts
        attempts, measurements = (pa.concat_tables(tables) for tables in zip(*fresh, strict=True))
        return len(loose.names) if self._commit(manifest, attempts, measurements, loose.names) else 0

    def _sorted(self, manifest: Manifest) -> tuple[list[Part], list[Part]]:
        """Returns the parts that are what was written, and those that are not. The last two generations are read whole: only what
        these were made of is still there."""
        good: list[Part] = []
        bad: list[Part] = []
        for part in manifest.parts:
            try:
                if part.generation >= manifest.generation - 1:
                    for kind in KINDS:
                        verify(self.files.storage, self.files.part(part, kind), kind, part.contents.get(kind))
                else:
                    self._ids(part)
            except PartUnreadableError:
                bad.append(part)  # stays in the manifest and in problems()
            else:
                good.append(part)
        return good, bad

    def _ids(self, part: Part) -> pa.ChunkedArray:
        name = self.files.part(part, "attempts")
        return read_parquet(self.files.storage, name, "attempts", ["attempt_id"])["attempt_id"]

    def _read(self, part: Part) -> list[pa.Table]:
        return [read_parquet(self.files.storage, self.files.part(part, k), k) for k in KINDS]

    @staticmethod
    def _new_rows(tables: Sequence[pa.Table], known: pa.Array) -> list[pa.Table]:
        return [table.filter(pc.invert(pc.is_in(table["attempt_id"], value_set=known))) for table in tables]

    def append(self, attempts: pa.Table, measurements: pa.Table | None = None) -> None:
        """Adds tables of new attempts past the loose files, for imports and benchmarks.

        Raises:
            LedgerError: another process compacted at the same time, or the manifest is unusable.
        """
        more = empty(MEASUREMENTS) if measurements is None else conform(measurements, MEASUREMENTS)
        if not self._commit(self.files.manifest(), conform(attempts, ATTEMPTS), more, []):
            raise LedgerError(f"{self.files.study}: another process compacted at the same time; append again")

    def rebuild(self, kept: Sequence[Part], attempts: pa.Table, measurements: pa.Table) -> None:
        """Makes a generation of these parts and rows the newest one; what else lies in the folder counts no more.

        Raises:
            LedgerError: another process compacted at the same time.
        """
        newest = max([self.files.newest(), *(part.generation for part in self.files.all_parts())])
        if not self._commit(Manifest(newest, tuple(kept), ()), attempts, measurements, []):
            raise LedgerError(f"{self.files.study}: another process compacted at the same time; repair again")

    def attempt_ids(self, parts: Iterable[Part]) -> tuple[pa.Array, list[Part]]:
        """Returns the attempts that parts hold, and the parts that could not be read."""
        found, bad = [pa.chunked_array([], pa.string())], []
        for part in parts:
            try:
                found.append(self._ids(part))
            except PartUnreadableError:
                bad.append(part)
        return pa.chunked_array([c for array in found for c in array.chunks], pa.string()).combine_chunks(), bad

    def _commit(self, manifest: Manifest, attempts: pa.Table, measurements: pa.Table, sources: Sequence[str]) -> bool:
        """Writes the next generation with the new rows; False, with nothing changed, if another process was first.

        Raises:
            LedgerError: a part that was just written reads as something else; no manifest names it.
            StorageFault: whether the generation was made is not known; nothing was deleted.
        """
        generation = manifest.generation + 1
        kept, attempts, measurements = self._merge(list(manifest.parts), attempts, measurements)
        # A part counts when its attempts are there, so they come last.
        data = {"measurements": parquet_bytes(measurements), "attempts": parquet_bytes(attempts)}
        contents = {kind: Content.of(written) for kind, written in data.items()}
        part = Part(f"{generation:06d}-{uuid.uuid4().hex[:8]}", len(attempts), contents)
        for kind, written in data.items():
            self._write_part(self.files.part(part, kind), written)
        following = Manifest(generation, (*kept, part), tuple(sources))
        self.files.storage.put_if_absent(self.files.manifest_name(generation), following.to_json())
        newest = self.files.manifest()  # what it says counts, not what the storage answered
        if part in newest.parts:
            self._sweep(newest)
            return True
        # Another process made this generation, or this process was so slow that later ones are there. Then a later compaction
        # may have built on ours, and sweeps what is left of it.
        if newest.generation == generation:
            for kind in KINDS:
                self.files.storage.delete(self.files.part(part, kind))
        return False

    def _write_part(self, name: str, data: bytes) -> None:
        """Writes a part and reads it back: what it replaces is deleted in the end."""
        self.files.storage.put_atomic(name, data)
        if self.files.storage.read(name) != data:
            raise LedgerError(f"{name} reads as something else than was written; the ledger stays as it was")

    def _sweep(self, manifest: Manifest) -> None:
        """Deletes what the generation before the newest one replaced, as far as the newest one's parts hold it: loose files,
        and manifests and parts that neither of the two names."""
        with suppress(LedgerError):  # a damaged one replaces nothing
            previous = self.files.manifest_of(manifest.generation - 1)
            if previous is not None:
                self._delete_replaced(manifest, previous)

    def _delete_replaced(self, manifest: Manifest, previous: Manifest) -> None:
        manifests, parts = self.files.superseded(manifest, previous)
        due = sorted(set(previous.sources).intersection(self.files.attempts()))
        held = set(self.attempt_ids(self._sorted(manifest)[0])[0].to_pylist()) if due or parts else set()
        names = [name for name in due if name.rsplit(".", 2)[-2] in held]
        for part in parts:
            files = [self.files.part(part, kind) for kind in KINDS]
            with suppress(PartVanishedError, PartUnreadableError):  # another process sweeps; what is damaged stays
                ids = read_parquet(self.files.storage, files[0], "attempts", ["attempt_id"])["attempt_id"]
                names += files if held.issuperset(ids.to_pylist()) else []
        for name in [*names, *manifests]:
            self.files.storage.delete(name)

    def _merge(
        self, parts: list[Part], attempts: pa.Table, measurements: pa.Table
    ) -> tuple[list[Part], pa.Table, pa.Table]:
        """Takes small parts in: sizes stay a falling geometric series, so files are few and rows are rewritten log n
        times."""
        while parts and parts[-1].rows <= min(2 * len(attempts), LARGEST_MERGED_ROWS):
            try:
                older = self._read(parts[-1])
            except (PartUnreadableError, PartVanishedError):
                break  # what cannot be read is kept as it is
            attempts, measurements = pa.concat_tables([older[0], attempts]), pa.concat_tables([older[1], measurements])
            parts.pop()
        return parts, attempts, measurements
