"""The frontier of a study as a figure for a paper, on matplotlib: text stays text, and everybody can tell the colours apart.

Colours are those of Okabe and Ito (Color Universal Design, 2008); where a third objective is coloured, viridis.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from orchestrator.frontier.dominance import nondominated
from orchestrator.report.data import Candidate, Metric, Report
from orchestrator.words.units import format_value

Points = npt.NDArray[np.float64]

MEMBER, BASELINE, DOMINATED = "#0072B2", "#D55E00", "#888888"

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a dollar in a label is a dollar
    "svg.fonttype": "none",
    "svg.hashsalt": "vitpareto",  # the same study gives the same file
    "pdf.fonttype": 42,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

SIZE_INCHES, DPI = (6.6, 4.3), 200

MOST_LABELS = 14
"""Frontier members that are named in the figure; where there are more, only the certain ones are, or none."""

LOG_FROM = 4.0
"""Ratio of the largest to the smallest value from which on an axis is logarithmic."""

MOST_BARS = 60
"""Possible members that have error bars; where there are more, only the certain ones have."""

REACH_POINTS = (9, 13, 18, 26, 36, 48, 62)
"""Distances of a label from its point that are tried, nearest first."""

ANGLES_DEGREES = (0, 180, 90, 270, 45, 135, 225, 315, 20, 160, 200, 340)

_NAMELESS: dict[str, dict[str, Any]] = {
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
    "png": {"Software": None},
}
"""Metadata of a file that changes only when the study does."""


class NothingToDraw(ValueError):
    """The study has no point for the figure; the message says why."""


def frontier_figure(report: Report, fmt: str) -> bytes:
    """Draws the first objective over the second, with the third, where there is one, as colour.

    Filled: certainly on the frontier; hollow: may be; faint: dominated; star: the uncompressed baseline. Bars are 95 %
    intervals. The line bounds what the certain members dominate in the two objectives.

    Args:
        fmt: ``svg``, ``pdf`` or ``png``.

    Raises:
        NothingToDraw: fewer than two objectives, or no recipe has both.
    """
    if len(report.objectives) < 2:
        named = ", ".join(report.objectives)
        raise NothingToDraw(f"a figure needs two objectives, got {named}; name them: --objectives top1_pct,size_bytes")
    y, x, *rest = report.metrics[: len(report.objectives)]
    shown = [c for c in report.candidates if c.standing != "broken" and None not in (c.value[0], c.value[1])]
    if not shown:
        raise NothingToDraw(f"study {report.study} has no feasible recipe with {y.name} and {x.name} yet")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        _describe(axes, x, y, _points(shown))
        line = staircase(_points(report.frontier("certain")), [x.better or "", y.better or ""])
        axes.plot(line[:, 0], line[:, 1], color="0.6", lw=0.9, zorder=1)
        _draw(axes, shown, rest[0] if rest else None)
        _name_members(figure, axes, shown, line)
        sink = io.BytesIO()
        figure.savefig(sink, format=fmt, metadata=_NAMELESS[fmt])
    return sink.getvalue()


def staircase(points: Points, directions: Sequence[str]) -> Points:
    """Returns the corners (k, 2) of the line that bounds what the points (n, 2) dominate, from left to right."""
    if not len(points):
        return points
    front = np.unique(points[nondominated(points, directions)], axis=0)
    corners = [front[1:, 0], front[:-1, 1]] if directions[0] == "minimize" else [front[:-1, 0], front[1:, 1]]
    return np.vstack([front[:1], *np.stack([np.column_stack(corners), front[1:]], axis=1)])


def _points(candidates: Sequence[Candidate]) -> Points:
    """Returns (n, 2): second objective, first objective."""
    return np.array([[c.value[1], c.value[0]] for c in candidates], dtype=np.float64).reshape(-1, 2)


# --- points -----------------------------------------------------------------------------------------------------------


def _draw(axes: Axes, shown: Sequence[Candidate], third: Metric | None) -> None:
    colours = _Colours(axes, shown, third)
    plain = [c for c in shown if not c.is_baseline]
    for standing, text in (("certain", "certainly on the frontier"), ("possible", "may be on the frontier")):
        members = [c for c in plain if c.standing == standing]
        if not members:
            continue
        filled, shades = standing == "certain", colours.of(members)
        if filled or len(members) <= MOST_BARS:
            _bars(axes, members, MEMBER)
        outlined = filled and third is not None
        style = {"facecolors": shades if filled else "white", "edgecolors": "black" if outlined else shades}
        _scatter(axes, members, s=34, lw=0.6 if outlined else 1.2, zorder=4 if filled else 3, **style)
        axes.plot([], [], "o", ms=5, color=MEMBER, markerfacecolor=MEMBER if filled else "white", label=text)
    faint = [c for c in plain if c.standing == "dominated"]  # of a group, one point is enough
    if faint:
        _scatter(axes, faint, s=12, c=DOMINATED, alpha=0.4, lw=0, zorder=2, label="dominated")
    star = [c for c in shown if c.is_baseline]
    if star:
        _bars(axes, star, BASELINE)
        _scatter(axes, star, marker="*", s=120, c=BASELINE, lw=0, zorder=5, label="uncompressed baseline")
    axes.figure.legend(loc="outside upper left", ncols=4, frameon=False, handletextpad=0.3, columnspacing=1.4)


def _scatter(axes: Axes, members: Sequence[Candidate], **style: Any) -> None:
    where = _points(members)
    axes.scatter(where[:, 0], where[:, 1], **style)


def _bars(axes: Axes, members: Sequence[Candidate], colour: str) -> None:
    """Draws the intervals; a value without one is exact."""
    where = _points(members)
    ends = []
    for at, k in ((0, 1), (1, 0)):
        low = np.array([c.value[k] if c.low[k] is None else c.low[k] for c in members], dtype=np.float64)
        high = np.array([c.value[k] if c.high[k] is None else c.high[k] for c in members], dtype=np.float64)
        ends.append(np.maximum(0.0, np.stack([where[:, at] - low, high - where[:, at]])))
    style: dict[str, Any] = {"fmt": "none", "ecolor": colour, "elinewidth": 0.6, "alpha": 0.4, "zorder": 1}
    axes.errorbar(where[:, 0], where[:, 1], xerr=ends[0], yerr=ends[1], **style)


class _Colours:
    """Colours of the members: one for all, or a scale over the third objective."""

    def __init__(self, axes: Axes, shown: Sequence[Candidate], third: Metric | None) -> None:
        known = [v for c in shown if third is not None and (v := c.value[2]) is not None]
        self.scale = None
        if third is not None and known:
            self.scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(min(known), max(known)), "viridis")
            style: dict[str, Any] = {"pad": 0.02, "shrink": 0.8, "aspect": 30}
            bar = axes.figure.colorbar(self.scale, ax=axes, label=_title(third), format=_format(third), **style)
            bar.outline.set_visible(False)

    def of(self, members: Sequence[Candidate]) -> list[Any]:
        """Returns one colour a member."""
        if self.scale is None:
            return [MEMBER] * len(members)
        return [MEMBER if c.value[2] is None else tuple(self.scale.to_rgba(np.array([c.value[2]]))[0]) for c in members]


# --- axes and labels --------------------------------------------------------------------------------------------------


def _title(metric: Metric) -> str:
    return metric.title + (f" ({metric.unit})" if metric.unit not in ("", "bytes") else "")


def _format(metric: Metric) -> FuncFormatter:
    scaled = metric.unit in ("", "bytes")
    return FuncFormatter(lambda value, _: format_value(metric.name, value) if scaled else f"{value:,.6g}")


def _describe(axes: Axes, x: Metric, y: Metric, points: Points) -> None:
    """Names the axes, and makes one logarithmic whose values span much, with ticks in the metric's own unit."""
    axes.margins(0.08)
    axes.grid(color="0.92", lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(_title(x))
    axes.set_ylabel(_title(y))
    for name, metric, values in (("x", x, points[:, 0]), ("y", y, points[:, 1])):
        axis = getattr(axes, f"{name}axis")
        low, high = float(values.min()), float(values.max())
        if low > 0 and high / low > LOG_FROM:
            axes.set(**{f"{name}scale": "log"})
            powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
            ticks = np.outer(powers, [1, 2, 5]).ravel()
            axis.set_ticks(ticks[(low / 1.3 <= ticks) & (ticks <= high * 1.3)])
            axis.set_minor_locator(NullLocator())
            axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(_format(metric))


def _name_members(figure: Figure, axes: Axes, shown: Sequence[Candidate], line: Points) -> None:
    """Writes the recipes of the frontier beside their points, where they are few."""
    certain, possible = ([c for c in shown if c.standing == s and not c.is_baseline] for s in ("certain", "possible"))
    members = [*certain, *possible]  # in this order, for the last ones may find no room
    if len(members) > MOST_LABELS:
        members = certain
    if not members or len(members) > MOST_LABELS:
        return
    others = [c for c in shown if c not in members]
    between = [np.linspace(one, two, 20) for one, two in pairwise(line)]
    _place(figure, axes, _points(members), np.vstack([_points(others), *between]), short_texts(members))


def short_texts(members: Sequence[Candidate]) -> list[str]:
    """Returns a text for each recipe: its techniques, and where others share them what sets them apart."""
    alike: dict[tuple[str, ...], list[Candidate]] = {}
    for member in members:
        alike.setdefault(tuple(technique for technique, _ in member.steps), []).append(member)

    def step(member: Candidate, at: int) -> str:
        technique, config = member.steps[at]
        group = [other.steps[at][1] for other in alike[tuple(name for name, _ in member.steps)]]
        apart = ", ".join(f"{p} {v}" for p, v in config.items() if any(other[p] != v for other in group))
        return technique + (f" ({apart})" if apart else "")

    return ["\n+ ".join(step(member, at) for at in range(len(member.steps))) for member in members]


def _place(figure: Figure, axes: Axes, points: Points, others: Points, texts: Sequence[str]) -> None:
    """Writes each text beside its point (n, 2) where it covers no other text or point, and inside the axes."""
    figure.canvas.draw()  # the layout decides where points are, and texts beside them are not to change it
    figure.set_layout_engine("none")
    pixel = figure.dpi / 72  # of a typographic point
    every = axes.transData.transform(np.vstack([points, others]))
    taken = [Bbox.from_bounds(x - 4 * pixel, y - 4 * pixel, 8 * pixel, 8 * pixel) for x, y in every]
    inside = axes.get_window_extent()
    for text, point, (x, y) in zip(texts, points, every, strict=False):
        note = axes.text(0, 0, text, fontsize=7, linespacing=1.1, transform=None, zorder=3)
        size = note.get_window_extent()
        best: tuple[float, float, float] = (np.inf, 0.0, 0.0)
        for reach in REACH_POINTS:
            for angle in np.deg2rad(ANGLES_DEGREES):
                dx, dy = reach * pixel * np.cos(angle), reach * pixel * np.sin(angle)
                left = x + dx - (0.0 if dx > 1 else size.width if dx < -1 else size.width / 2)
                low = y + dy - (size.height / 2 if abs(dy) < 6 * pixel else 0.0 if dy > 0 else size.height)
                box = Bbox.from_bounds(left, low, size.width, size.height)
                hits = sum(bool(box.padded(pixel).overlaps(t)) for t in taken)
                leaves = not (
                    inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
                )
                best = min(best, (reach + 1e3 * hits + 1e6 * leaves, left, low))
        note.remove()
        if best[0] < 1e3:  # otherwise it would cover something: the reader has the table
            taken.append(Bbox.from_bounds(best[1], best[2], size.width, size.height))
            _write(axes, text, point, (best[1] + size.width / 2 - x) / pixel, (best[2] + size.height / 2 - y) / pixel)


def _write(axes: Axes, text: str, point: Points, right: float, up: float) -> None:
    """Writes a text whose centre lies that many typographic points off ``point`` (2,), with a line to it."""
    axes.annotate(
        text,
        (point[0], point[1]),
        xytext=(right, up),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=7,
        linespacing=1.1,
        zorder=3,
        path_effects=[Stroke(linewidth=2, foreground="white"), Normal()],
        arrowprops={"arrowstyle": "-", "color": "0.5", "lw": 0.5, "shrinkA": 0, "shrinkB": 3},
    )
