"""Arrow columns as arrays and back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from orchestrator.ledger.columns import booleans, equals, floats, group_numbers, integers, to_arrow


@pytest.mark.parametrize(
    "names",
    [
        ["00ff", "0100", "00ff", "abcd"],
        ["f" * 16, "0" * 16, "f" * 16],
        ["00ff", "00FF", "00ff"],
        ["a", "bb", "a"],
        ["0:", "0;", "0/", "0:"],
        ["é0", "00f", "é0"],
        ["g0", "g1", "g0"],
        ["", "", "a"],
        ["0" * 17, "1" + "0" * 16, "0" * 17],
        [],
    ],
)
def test_equal_names_get_one_number(names):
    chunks = pa.chunked_array([names[:1], names[1:]], pa.string())
    numbers, count = group_numbers(chunks.slice(0))
    assert count == len(set(names))
    assert [names.index(n) for n in names] == [numbers.tolist().index(k) for k in numbers.tolist()]
    if names:
        tail, count = group_numbers(pa.chunked_array([pa.array(names).slice(1)]))
        assert (count, len(tail)) == (len(set(names[1:])), len(names) - 1)


def test_columns_become_arrays_and_back():
    parts = [pa.array([None, 1, 2]), pa.array([3, 4, None, 5]).slice(1), pa.array([], pa.int64())]
    whole = pa.chunked_array(parts, pa.int64())
    assert integers(whole).tolist() == [0, 1, 2, 4, 0, 5]
    reals = floats(whole.cast(pa.float64()))
    assert np.array_equal(reals, [np.nan, 1, 2, 4, np.nan, 5], equal_nan=True)
    assert to_arrow(reals).equals(whole.cast(pa.float64()).combine_chunks())
    flags = pa.chunked_array([pa.array([True] * 9 + [None, False, True]).slice(7), pa.array([None, True])])
    assert booleans(flags).tolist() == [True, True, False, False, True, False, True]
    assert to_arrow(booleans(flags)).to_pylist() == booleans(flags).tolist()
    text = pa.chunked_array(
        [pa.array(["ok", None, "error", "ok"]).slice(1), pa.array(["error"]), pa.array([], pa.string())]
    )
    assert equals(text, "ok").tolist() == [False, False, True, False]
    for empty in (pa.chunked_array([], pa.int64()), pa.chunked_array([pa.array([], pa.int64())])):
        assert len(integers(empty)) == len(floats(empty)) == len(booleans(empty.cast(pa.bool_()))) == 0
