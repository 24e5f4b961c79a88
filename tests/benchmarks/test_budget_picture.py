from __future__ import annotations

import pytest

from benchmarks.budget_picture import draw
from tests.benchmarks.test_budget_curves import run


def test_every_side_is_drawn_with_its_share() -> None:
    runs = [
        run([(50, 98.0, 500.0), (50, 98.0, 300.0)]),
        run([(20, 98.0, 300.0)], "ours"),
        run([(9, 98.0, 900.0)], "tpe"),
    ]
    drawn = draw(runs, "svg")
    for text in (b"made", b"stock", b"ours: 20%", b"tpe: not reached", b"training seconds"):
        assert text in drawn
    assert draw(runs, "svg") == drawn
    assert draw(runs, "png").startswith(b"\x89PNG")


def test_a_picture_needs_stock_and_a_format() -> None:
    with pytest.raises(ValueError, match="stock"):
        draw([run([(20, 98.0, 300.0)], "ours")], "svg")
    with pytest.raises(ValueError, match=r"\.png or \.svg, got \.gif"):
        draw([run([(20, 98.0, 300.0)])], "gif")
