"""Numbers with their intervals for people: ``97.2 % (95.0..98.5)``, ``0.821 ms (0.802..0.840) 1.84x``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from orchestrator.words.units import format_value
from workers.metrics import OBJECTIVES, SPEED_OBJECTIVES


def with_interval(name: str, value: float | None, low: float | None, high: float | None) -> str:
    """Returns ``value`` of the metric ``name`` with its unit, to the digits that its interval leaves, and the interval."""
    text = format_value(name, value).strip()
    if value is None or low is None or high is None:
        return text
    number, _, unit = text.partition(" ")
    stated = float(number.replace(",", ""))
    scale = stated / value if stated and value else 1.0
    scale = 10.0 ** round(math.log10(scale)) if scale > 0 else 1.0  # kilo, mega: the text is rounded
    width = (high - low) * scale
    digits = min(max(0, 1 - math.floor(math.log10(width))), 9) if width > 0 else len(number.partition(".")[2])
    shown, *ends = (f"{v * scale:,.{digits}f}" for v in (value, low, high))
    return f"{shown} {unit}".strip() + f" ({ends[0]}..{ends[1]})"


def metric_text(name: str, row: Mapping[str, Any]) -> str:
    """Returns the metric ``name`` of a row of ``query.pareto``: value, interval, and what a speed is worth.

    That is the speed-up over the strong baseline and ``slower`` where the whole interval says so; ``simulated`` where no
    integer kernel ran and none may be claimed.
    """
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    text = with_interval(name, row[name], low, high)
    ratio = row.get(f"{name}_ratio")
    if name not in SPEED_OBJECTIVES or ratio is None or row[name] is None:
        return text
    if row.get("simulated"):
        return f"{text} simulated"
    less = OBJECTIVES[name] == "minimize"
    best = low if less else high
    slower = best is not None and (best / row[name] * ratio > 1 if less else best / row[name] * ratio < 1)
    return f"{text} {1 / ratio if less else ratio:.2f}x" + (" slower" if slower else "")


def share(value: float) -> str:
    """Returns a small relative difference as ``2.9 %``."""
    return f"{100 * value:.2g} %"
