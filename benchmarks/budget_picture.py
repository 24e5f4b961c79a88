"""The picture of ``bench_budget``: hypervolume over training seconds, a panel for each kind of data, a line a side."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.budget_curves import Run, on_grid, quartiles, share
from orchestrator.report.plots import STYLE

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of Okabe and Ito (Color Universal Design, 2008): stock first."""

FIRST, POINTS = 0.01, 300
"""Share of stock's seconds at which the axis begins, and points of a line."""

_NAMELESS: Mapping[str, dict[str, None]] = {"svg": {"Date": None}, "png": {"Software": None}}


def draw(runs: Sequence[Run], fmt: str, cost: str = "train_s") -> bytes:
    """Draws the median over the seeds and the band between the quartiles; both axes are shares of what stock has at its end.

    Args:
        fmt: ``png`` or ``svg``.

    Raises:
        ValueError: there is no run of stock, or the format is another one.
    """
    if fmt not in _NAMELESS:
        raise ValueError(f"a picture must end in .png or .svg, got .{fmt}")
    kinds = [data for data in dict.fromkeys(run.data for run in runs) if _of(runs, data, "stock")]
    if not kinds:
        raise ValueError("the picture needs runs of stock, which are its unit")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 4.2 * len(kinds), 3.6), dpi=150, layout="constrained")
        for number, data in enumerate(kinds):
            axes = figure.add_subplot(1, len(kinds), number + 1)
            _panel(axes, runs, data, cost)
            axes.set_title(data, loc="left")
            if number == 0:
                axes.set_ylabel("hypervolume / that of stock with 60 recipes")
        sink = io.BytesIO()
        figure.savefig(sink, format=fmt, metadata=_NAMELESS[fmt])
    return sink.getvalue()


def _of(runs: Sequence[Run], data: str, side: str) -> list[Run]:
    return [run for run in runs if (run.data, run.side) == (data, side)]


def _panel(axes: Axes, runs: Sequence[Run], data: str, cost: str) -> None:
    stock = _of(runs, data, "stock")
    unit = share(stock, stock, cost)
    grid = np.geomspace(FIRST, 1.0, POINTS) * unit.stock
    for side, colour in zip(dict.fromkeys(run.side for run in runs if run.data == data), COLOURS, strict=False):
        its = _of(runs, data, side)
        found = on_grid(its, grid, cost)
        whole = ~np.isnan(found).any(axis=0)  # where every seed still runs
        bands = np.array([quartiles(column) for column in found[:, whole].T]) / unit.level
        x = grid[whole] / unit.stock
        axes.fill_between(x, bands[:, 0], bands[:, 2], step="post", color=colour, alpha=0.15, lw=0)
        axes.step(x, bands[:, 1], where="post", color=colour, lw=1.4, label=_label(side, its, stock, cost))
    axes.axhline(1.0, color="0.6", lw=0.8, ls=":")
    axes.axvline(0.1, color="0.6", lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training seconds / those of stock with 60 recipes")
    axes.legend(frameon=False, loc="lower right")


def _label(side: str, its: Sequence[Run], stock: Sequence[Run], cost: str) -> str:
    middle = share(stock, its, cost).of_stock[1]
    if side == "stock":
        return "stock"
    return f"{side}: {middle:.0%}" if math.isfinite(middle) else f"{side}: not reached"
