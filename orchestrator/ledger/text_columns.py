"""Columns of texts made from Python lists, without pandas: see :mod:`orchestrator.ledger.columns`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def strings(values: Sequence[str]) -> pa.Array:
    """Returns a string array."""
    encoded = [value.encode() for value in values]
    text = pa.py_buffer(b"".join(encoded))
    return pa.Array.from_buffers(pa.string(), len(values), [None, _offsets(encoded), text])


def string_lists(values: Sequence[Sequence[str]]) -> pa.Array:
    """Returns an array of lists of strings."""
    inner = strings([text for one in values for text in one])
    return pa.Array.from_buffers(pa.list_(pa.string()), len(values), [None, _offsets(values)], children=[inner])


def _offsets(values: Sequence[Sequence[object]] | Sequence[bytes]) -> pa.Buffer:
    return pa.py_buffer(np.cumsum([0, *(len(value) for value in values)], dtype=np.int32))
