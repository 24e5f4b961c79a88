"""Parquet files of a ledger: written in one place, read by columns, verified whole, and what is left of a damaged one."""

from __future__ import annotations

import errno
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.ledger.columns import Mask, empty, to_arrow
from orchestrator.ledger.schema import SCHEMAS, conform, schema_fault
from workers.node.storage import Storage, StorageFault

KINDS = ("attempts", "measurements")
"""Of the files of a part."""

_GONE = frozenset({errno.ENOENT, errno.ESTALE})
_NO_FILE = frozenset({errno.EISDIR, errno.ENOTDIR})
DAMAGE = (OSError, pa.ArrowException, ValueError, TypeError, OverflowError, MemoryError)
"""What reading damaged bytes may raise; a footer may ask for more memory than there is."""


@dataclass(frozen=True)
class Problem:
    """A file of the study that cannot be used; the rest is read without it.

    Attributes:
        hides_rows: rows that answers rest on are known to be missing with it.
        newer: it is whole, but of a later version than this one reads.
    """

    file: str
    reason: str
    hides_rows: bool = False
    newer: bool = False


@dataclass(frozen=True)
class Content:
    """What a file holds, as its writer knew it."""

    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> Self:
        """Returns that of ``data``."""
        return cls(len(data), hashlib.sha256(data).hexdigest())


def parquet_bytes(table: pa.Table) -> bytes:
    """Returns ``table`` as one Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=65_536, write_page_checksum=True)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


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
        StorageFault: the storage does not give it.
    """
    path = storage.local(name)
    try:
        # Not memory-mapped: a mapped file that is deleted on a network file system ends the reader with SIGBUS.
        return _read(name, io.BytesIO(storage.read(name)) if path is None else str(path), kind, columns, keep)
    except DAMAGE as error:
        raise _explained(name, error) from None


def verify(storage: Storage, name: str, kind: str, content: Content | None) -> None:
    """Reads a whole Parquet file: its bytes must be those that were written, or all of its columns keep their checksums.

    Args:
        content: what its manifest says of it; None where that is older than these records.

    Raises:
        PartVanishedError, PartUnreadableError, StorageFault: as :func:`read_parquet` does.
    """
    try:
        data = storage.read(name)
        if content is not None:
            _compare(name, Content.of(data), content)
        _read(name, io.BytesIO(data), kind, ["trial_id"] if content is not None else None, None)
    except DAMAGE as error:
        raise _explained(name, error) from None


def readable_columns(storage: Storage, name: str, kind: str) -> list[dict[str, pa.Array]]:
    """Returns what can be read of a damaged file: of each row group the columns that keep their checksums, whole.

    Raises:
        StorageFault: the storage does not give it.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(storage.read(name)), page_checksum_verification=True)
        if schema_fault(kind, file.schema_arrow):
            return []
        groups = range(file.num_row_groups)
    except StorageFault:
        raise
    except DAMAGE:
        return []
    return [_columns(file, group, kind) for group in groups]


def _columns(file: pq.ParquetFile, group: int, kind: str) -> dict[str, pa.Array]:
    found: dict[str, pa.Array] = {}
    for field in SCHEMAS[kind]:
        try:
            column = file.read_row_group(group, [field.name])[field.name].cast(field.type)
            column.validate(full=True)
            if len(column) == file.metadata.row_group(group).num_rows:
                found[field.name] = column.combine_chunks()
        except (*DAMAGE, LookupError):
            continue
    return found


def _read(name: str, source: io.BytesIO | str, kind: str, columns: Sequence[str] | None, keep: Mask | None) -> pa.Table:
    schema = SCHEMAS[kind]
    wanted = schema if columns is None else pa.schema([schema.field(c) for c in columns])
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        fault = schema_fault(kind, file.schema_arrow)
        if fault:
            raise PartUnreadableError(Problem(name, fault, True, "schema version" in fault))
        present = [c for c in wanted.names if c in file.schema_arrow.names] or file.schema_arrow.names[:1]
        table = file.read(columns=present) if keep is None else _read_some(file, present, keep)
    return conform(table, wanted)


def _read_some(file: pq.ParquetFile, columns: list[str], keep: Mask) -> pa.Table:
    found, start = [empty(file.schema_arrow).select(columns)], 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        if keep[start:stop].any():
            found.append(file.read_row_group(group, columns).select(columns).filter(to_arrow(keep[start:stop])))
        start = stop
    return pa.concat_tables(found)


def _compare(name: str, found: Content, stated: Content) -> None:
    if found.size_bytes != stated.size_bytes:
        reason = f"is damaged: it has {found.size_bytes} bytes, its manifest says {stated.size_bytes}"
    elif found.sha256 != stated.sha256:
        reason = "is damaged: its bytes are not those that were written (SHA-256)"
    else:
        return
    raise PartUnreadableError(Problem(name, reason, True))


def _explained(name: str, error: Exception) -> Exception:
    """Returns what an error in reading means: gone, damaged, or that the storage does not answer."""
    if isinstance(error, StorageFault):
        return error
    if isinstance(error, OSError) and (isinstance(error, FileNotFoundError) or error.errno in _GONE):
        return PartVanishedError(name)
    if isinstance(error, OSError) and error.errno is not None and error.errno not in _NO_FILE:
        return StorageFault(error.errno, error.strerror or str(error), name)
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return PartUnreadableError(Problem(name, f"is damaged: {reason[:200]}", True))
