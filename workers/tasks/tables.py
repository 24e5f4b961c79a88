"""Reading Parquet files and the Arrow files of Hugging Face's ``save_to_disk``, a block of rows in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.tasks.split_names import is_hidden
from workers.tasks.task_info import TaskError

TABLE_SUFFIXES = (".parquet", ".arrow")


def table_files(path: Path) -> list[Path]:
    """Returns the tables that ``path`` is or holds, Parquet before Arrow; none where it is something else."""
    if path.suffix in TABLE_SUFFIXES and not path.is_dir():
        return [path]
    for suffix in TABLE_SUFFIXES:
        found = sorted(file for file in path.rglob(f"*{suffix}") if _is_table(file, path))
        if found:
            return found
    return []


def _is_table(file: Path, root: Path) -> bool:
    *folders, name = file.relative_to(root).parts
    kept = (suffix := file.suffix) == ".parquet" or not (suffix and name.startswith("cache-"))
    return kept and not name.startswith(".") and not any(map(is_hidden, folders)) and file.is_file()


def schema(file: Path) -> Any:
    """Returns the Arrow schema of a table.

    Raises:
        TaskError: it is no table, or a column stands in it twice.
    """
    import pyarrow.parquet as pq  # a tenth of a second, which other data need not wait for; so below

    with _readable(file, f"must be {'an Arrow' if file.suffix == '.arrow' else 'a Parquet'} file"):
        if file.suffix == ".arrow":
            with _open_arrow(file) as reader:
                found = reader.schema
        else:
            found = pq.read_schema(file)
    twice = next((name for name in found.names if found.names.count(name) > 1), None)
    if twice is not None:
        raise TaskError(
            f"{file}: must have each column once, has {twice!r} {found.names.count(twice)} times; rename one"
        )
    return found


def features(file_schema: Any) -> Mapping[str, Any]:
    """Returns what Hugging Face datasets wrote of the columns: name to a mapping with ``_type``; none where it did not."""
    try:
        found = json.loads((file_schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: one for name, one in found.items() if isinstance(one, Mapping)} if isinstance(found, Mapping) else {}


def blocks(file: Path, columns: Sequence[str], rows: NDArray[np.int64] | None = None) -> Iterator[tuple[int, Any]]:
    """Yields (row of its first, table) of each block of a file that holds some of the ascending ``rows``, or of all.

    Raises:
        TaskError: a block cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def asked(start: int, stop: int) -> bool:
        return rows is None or bool(np.diff(np.searchsorted(rows, (start, stop)))[0])

    start = 0
    if file.suffix != ".arrow":
        with _readable(file), pq.ParquetFile(file) as opened:
            for group in range(opened.num_row_groups):
                stop = start + opened.metadata.row_group(group).num_rows
                if asked(start, stop):
                    with _readable(file, f"rows {start} to {stop - 1} must be readable"):
                        found = opened.read_row_group(group, columns=list(columns))
                    yield start, found
                start = stop
        return
    with _readable(file), _open_arrow(file) as reader:
        batches = (
            reader if hasattr(reader, "read_next_batch") else map(reader.get_batch, range(reader.num_record_batches))
        )
        for batch in batches:
            stop = start + len(batch)
            if asked(start, stop):
                yield start, pa.Table.from_batches([batch]).select(list(columns))
            start = stop


def encoded(cells: Any) -> Any:
    """Returns the encoded images of a column of ``{bytes, path}``; paths, which may be in any encoding, are left alone."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(cells.type) and cells.type.get_field_index("bytes") >= 0:
        return pc.struct_field(cells, "bytes")
    return cells


def texts_of(column: Any) -> list[str]:
    """Returns a column's values as texts, nothing as the empty one; bytes that are no UTF-8 are taken for Latin-1."""
    import pyarrow as pa

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return ["" if one is None else _text(one) if isinstance(one, bytes) else str(one) for one in column.to_pylist()]


def rows_of(file: Path, first: int, block: Any) -> list[dict[str, Any]]:
    """Returns the rows of a block of a file, of which ``first`` is the first.

    Raises:
        TaskError: a text of them is none.
    """
    try:
        found: list[dict[str, Any]] = block.to_pylist()
    except UnicodeDecodeError as error:
        raise TaskError(
            f"{file} rows {first} to {first + len(block) - 1}: texts must be UTF-8: {error}; write them again"
        ) from error
    return found


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _open_arrow(file: Path) -> Any:
    """Opens the streaming format, which ``save_to_disk`` writes, or the file format; both mapped, not read."""
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(pa.memory_map(str(file)))
    except pa.ArrowInvalid:
        return pa.ipc.open_file(pa.memory_map(str(file)))


@contextmanager
def _readable(file: Path, rule: str = "must be readable") -> Iterator[None]:
    """Names the file in what pyarrow says of it."""
    import pyarrow as pa

    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        said = " ".join(str(error).split())
        raise TaskError(f"{file}: {rule}: {said}; write it again, or remove it") from error
