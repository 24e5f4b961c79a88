"""Draws a study's frontier from its ledger: two objectives as axes, a third as colour.

Usage: python docs/plot_frontier.py NAME --storage DIR --out FILE.png [--x size_bytes --y top1_pct --colour METRIC]

A point is a feasible recipe (means over its seeds). Frontier members (over all objectives of the study) are large and
labelled, dominated recipes faint; the star is the uncompressed baseline. The line joins what only x and y decide.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

from orchestrator import query
from orchestrator.frontier import nondominated
from orchestrator.studies import StudyNotFound, open_ledger
from orchestrator.units import format_value
from workers.protocol import OBJECTIVES

TITLES = {
    "top1_pct": "top-1 accuracy on the search split (%)",
    "size_bytes": "size of the artefact",
    "throughput_images_per_s_ratio": "throughput (times the baseline's)",
    "latency_ms_p50_ratio": "latency (times the baseline's)",
}
REACH_PX = (18, 24, 34, 46, 60, 76, 94)
"""Distances of a label from its point that are tried, nearest first."""


def read(name: str, storage: str) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """Returns (feasible recipes, baseline, hashes of the frontier's recipes)."""
    try:
        ledger = open_ledger(name, storage)
    except StudyNotFound as error:
        raise SystemExit(str(error)) from None
    objectives = (ledger.study_record() or {})["config"]["objectives"]
    members = query.pareto(ledger, list(objectives))["recipe_hash"].to_pylist()
    means = ", ".join(f"avg({name}) AS {name}" for name in _numbers())
    rows = query.sql(
        ledger,
        f"SELECT recipe_hash, any_value(recipe) AS recipe, bool_or(is_baseline) AS is_baseline, {means} FROM trials "
        f"WHERE context = '{ledger.context}' AND feasible GROUP BY recipe_hash ORDER BY recipe_hash",
    ).to_pylist()
    baseline = next(r for r in rows if r["is_baseline"])
    return [r for r in rows if not r["is_baseline"]], baseline, members


def _numbers() -> list[str]:
    return [*OBJECTIVES, *(f"{name}_ratio" for name in OBJECTIVES)]


def labels(rows: list[dict[str, Any]]) -> list[str]:
    """Returns a short text for each recipe: its techniques, and where others share them what sets them apart."""
    recipes = [json.loads(r["recipe"]) for r in rows]
    alike: dict[tuple[str, ...], list[Any]] = {}
    for steps in recipes:
        alike.setdefault(tuple(s["technique"] for s in steps), []).append(steps)

    def line(steps: list[Any], at: int) -> str:
        group = [other[at]["config"] for other in alike[tuple(s["technique"] for s in steps)]]
        config = steps[at]["config"]
        apart = ", ".join(f"{p} {v}" for p, v in config.items() if any(other[p] != v for other in group))
        return str(steps[at]["technique"]) + (f" ({apart})" if apart else "")

    return ["\n+ ".join(line(steps, at) for at in range(len(steps))) for steps in recipes]


def place(axes: Axes, points: npt.NDArray[np.float64], others: npt.NDArray[np.float64], texts: list[str]) -> None:
    """Writes each text beside its point (n, 2) where it covers no other text or point, and inside the axes."""
    figure = axes.figure
    figure.canvas.draw()
    every = axes.transData.transform(np.vstack([points, others]))
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in every]
    inside = axes.get_window_extent()
    for at, text in zip(points, texts, strict=True):
        best: tuple[float, Any, Bbox] | None = None
        for reach in REACH_PX:
            for angle in np.deg2rad([0, 180, 90, 270, 45, 135, 225, 315, 20, 160, 200, 340]):
                dx, dy = reach * np.cos(angle), reach * np.sin(angle)
                side = "left" if dx > 1 else "right" if dx < -1 else "center"
                note = axes.annotate(
                    text,
                    at,
                    xytext=(dx * 72 / figure.dpi, dy * 72 / figure.dpi),
                    textcoords="offset points",
                    ha=side,
                    va="center" if abs(dy) < 12 else "bottom" if dy > 0 else "top",
                    fontsize=8.5,
                    linespacing=1.15,
                    zorder=2,
                    path_effects=[Stroke(linewidth=3, foreground="white"), Normal()],
                    arrowprops={"arrowstyle": "-", "color": "0.45", "lw": 0.7, "shrinkA": 1, "shrinkB": 6},
                )
                box = note.get_window_extent()
                note.remove()
                cost = reach + 1e3 * sum(box.padded(2).overlaps(t) for t in taken)
                cost += 1e6 * (not (inside.x0 <= box.x0 and box.x1 <= inside.x1))
                cost += 1e6 * (not (inside.y0 <= box.y0 and box.y1 <= inside.y1))
                if best is None or cost < best[0]:
                    best = (cost, note, box)
        assert best is not None
        axes.add_artist(best[1])
        taken.append(best[2].padded(2))


def staircase(points: npt.NDArray[np.float64], x: str, y: str) -> npt.NDArray[np.float64]:
    """Returns the corners of the line that bounds what the points (n, 2) dominate, from left to right."""
    front = points[nondominated(points, [OBJECTIVES[x], OBJECTIVES[y]])]
    front = front[front[:, 0].argsort()]
    corners = [front[1:, 0], front[:-1, 1]] if OBJECTIVES[x] == "minimize" else [front[:-1, 0], front[1:, 1]]
    return np.vstack([front[:1], *np.stack([np.column_stack(corners), front[1:]], axis=1)])


def draw(name: str, storage: str, x: str, y: str, colour: str, out: str) -> None:
    """Draws the frontier of a study into ``out``."""
    rows, baseline, members = read(name, storage)
    if any(r[colour] is None for r in rows):
        colour = "macs_ratio"
    front = [r for r in rows if r["recipe_hash"] in members]
    rest = [r for r in rows if r["recipe_hash"] not in members]
    figure, axes = plt.subplots(figsize=(9.2, 5.4), dpi=150, layout="constrained")
    values = [r[colour] for r in [*rows, baseline]]
    shade = {"cmap": "viridis", "vmin": min(values), "vmax": max(values)}

    def points(of: list[dict[str, Any]]) -> npt.NDArray[np.float64]:
        return np.array([[r[x], r[y]] for r in of], dtype=float).reshape(-1, 2)

    def scatter(of: list[dict[str, Any]], **style: Any) -> Any:
        where = points(of)
        return axes.scatter(where[:, 0], where[:, 1], c=[r[colour] for r in of], **style, **shade)

    line = staircase(points(front), x, y)
    axes.plot(line[:, 0], line[:, 1], color="0.75", lw=1.2, zorder=1)
    scatter(rest, s=38, alpha=0.35, lw=0, zorder=5)  # over the labels, which would hide them
    dots = scatter(front, s=110, edgecolors="black", lw=1.1, zorder=3)
    scatter([baseline], marker="*", s=250, edgecolors="black", zorder=3)
    _describe(axes, x, y, points([*rows, baseline])[:, 0])
    axes.set_title(
        f"Study {name}: {len(front)} recipes on the frontier, {len(rest)} dominated", loc="left", fontsize=11
    )
    figure.colorbar(dots, ax=axes, label=TITLES.get(colour, colour), format=_format(colour), pad=0.02, shrink=0.85)
    between = [np.linspace(one, two, 30) for one, two in pairwise(line)]
    place(axes, points([*front, baseline]), np.vstack([points(rest), *between]), [*labels(front), "baseline"])
    figure.savefig(out, metadata={"Software": None})


def _format(metric: str) -> FuncFormatter:
    return FuncFormatter(lambda value, _: format_value(metric, value))


def _describe(axes: Axes, x: str, y: str, xs: npt.NDArray[np.float64]) -> None:
    """Names the axes and makes x logarithmic, with ticks in the metric's own unit."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_format(x))
    axes.xaxis.set_minor_formatter(NullFormatter())
    powers = 10.0 ** np.arange(np.floor(np.log10(xs.min())), np.ceil(np.log10(xs.max())) + 1)
    axes.set_xticks([t for t in np.outer(powers, [1, 1.5, 2, 3, 5, 7]).flat if xs.min() / 1.5 <= t <= xs.max() * 1.5])
    axes.margins(x=0.12, y=0.12)
    axes.grid(color="0.92", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(TITLES.get(x, x))
    axes.set_ylabel(TITLES.get(y, y))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="name of the study")
    parser.add_argument("--storage", default="results", help="folder or fsspec URL of the results")
    parser.add_argument("--out", required=True, help="image file to write")
    parser.add_argument("--x", default="size_bytes", choices=OBJECTIVES)
    parser.add_argument("--y", default="top1_pct", choices=OBJECTIVES)
    parser.add_argument("--colour", default="throughput_images_per_s_ratio", choices=_numbers())
    arguments = parser.parse_args()
    draw(arguments.name, arguments.storage, arguments.x, arguments.y, arguments.colour, arguments.out)


if __name__ == "__main__":
    main()
