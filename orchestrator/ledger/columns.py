"""Arrow columns as numpy arrays and back, without pandas.

``to_numpy``, ``pa.array`` and most of ``pyarrow.compute`` import pandas to look at their arguments, which takes a
quarter of a second: more than a command that only reads needs for everything else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]

_HEXADECIMAL = np.full(256, 255, np.uint8)
_HEXADECIMAL[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
"""Character to value; 255 for what is no digit."""


def empty(schema: pa.Schema) -> pa.Table:
    """Returns a table without rows."""
    return pa.Table.from_batches([], schema)


def to_arrow(values: npt.NDArray[Any]) -> pa.Array:
    """Returns int64, float64 (NaN becomes null) or Boolean values as an Arrow array."""
    if values.dtype == np.bool_:
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, _bits(values)])
    if values.dtype == np.int64:
        return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])
    data = pa.py_buffer(np.ascontiguousarray(values, dtype=np.float64))
    return pa.Array.from_buffers(pa.float64(), len(values), [_bits(~np.isnan(values)), data])


def _bits(values: Mask) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))


def floats(column: pa.ChunkedArray) -> Floats:
    """Returns a float64 column; null is NaN."""
    return np.concatenate([_values(chunk, np.float64, np.nan) for chunk in column.chunks] or [np.empty(0)])


def integers(column: pa.ChunkedArray) -> Numbers:
    """Returns an int64 or time column, times in their own unit; null is 0."""
    return np.concatenate([_values(chunk, np.int64, 0) for chunk in column.chunks] or [np.empty(0, np.int64)])


def booleans(column: pa.ChunkedArray) -> Mask:
    """Returns a Boolean column; null is False."""
    found = [_unpacked(c.buffers()[1], c) & _valid(c) for c in column.chunks if len(c)]
    return np.concatenate(found or [np.empty(0, np.bool_)])


def _values(chunk: pa.Array, dtype: npt.DTypeLike, null: float) -> npt.NDArray[Any]:
    if not len(chunk):
        return np.empty(0, dtype)
    found = np.frombuffer(chunk.buffers()[1], dtype)[chunk.offset : chunk.offset + len(chunk)]
    return np.where(_valid(chunk), found, null).astype(dtype) if chunk.null_count else found


def _valid(chunk: pa.Array) -> Mask:
    return _unpacked(chunk.buffers()[0], chunk) if chunk.null_count else np.ones(len(chunk), np.bool_)


def _unpacked(bits: pa.Buffer, chunk: pa.Array) -> Mask:
    flags = np.unpackbits(np.frombuffer(bits, np.uint8), count=chunk.offset + len(chunk), bitorder="little")
    return flags[chunk.offset :].astype(np.bool_)


def equals(column: pa.ChunkedArray, text: str) -> Mask:
    """Says where a column of few different strings is ``text``."""
    found = [np.empty(0, np.bool_)]
    for chunk in column.chunks:
        encoded = chunk.dictionary_encode()
        values = encoded.dictionary.to_pylist()
        number = values.index(text) if text in values else -1
        found.append((_values(encoded.indices, np.int32, -2) == number) if len(chunk) else found[0])
    return np.concatenate(found)


def group_few(names: pa.ChunkedArray) -> tuple[Numbers, int]:
    """Does what :func:`group_numbers` does, faster for a column of few different strings; null is -1."""
    encoded = names.combine_chunks().dictionary_encode()
    return _values(encoded.indices, np.int32, -1).astype(np.int64), len(encoded.dictionary)


def group_numbers(names: pa.ChunkedArray) -> tuple[Numbers, int]:
    """Numbers equal strings alike, from 0; returns the number of each row and how many there are.

    Ids of up to 16 hexadecimal digits, as all of ours are, are compared as integers: ten times faster than as strings.
    """
    parts = [_hexadecimal(chunk) for chunk in names.chunks if len(chunk)]
    known = [keys for keys, _ in parts if keys is not None]
    if len(known) < len(parts) or len({length for _, length in parts}) > 1:
        return group_few(names)
    keys = np.concatenate([*known, np.empty(0, np.uint64)])
    ordered = np.sort(keys)
    if (ordered[1:] != ordered[:-1]).all():
        return np.arange(len(keys)), len(keys)
    unique, numbers = np.unique(keys, return_inverse=True)
    return numbers, len(unique)


def _hexadecimal(names: pa.StringArray) -> tuple[npt.NDArray[np.uint64] | None, int]:
    """Returns strings of one length of up to 16 lower-case hexadecimal digits as integers, and the length.

    None in place of the integers for any other strings.
    """
    offsets = np.frombuffer(names.buffers()[1], np.int32)[names.offset : names.offset + len(names) + 1]
    length = int(offsets[1] - offsets[0])
    if names.null_count or not 0 < length <= 16 or (np.diff(offsets) != length).any():
        return None, length
    digit = _HEXADECIMAL[np.frombuffer(names.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]]
    if (digit > 15).any():
        return None, length
    found = np.zeros(len(names), np.uint64)
    for column in digit.reshape(-1, length).T:
        found = (found << np.uint64(4)) | column
    return found, length
