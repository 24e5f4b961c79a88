"""Numbers for people: a metric's unit is in its record, that of any other column in the ending of its name."""

from __future__ import annotations

from workers.metrics import METRICS

_ENDINGS = {
    "_bytes": "bytes",
    "_ms_p50": "ms",
    "_ms_p95": "ms",
    "_images_per_s": "images/s",
    "_pct": "%",
    "_drop": "percentage points",
    "_ratio": "times the baseline",
    "_s": "s",
}
"""How a column ends that is no metric, such as one that SQL named, to its unit; the first that fits."""

_SHOWN = {"bytes": "B", "percentage points": " points", "times the baseline": "x"}
"""How a unit is shown behind a number, where not as itself."""


def unit_of(name: str) -> str:
    """Returns the unit of a metric, on the report split too, or of what a column's name states; "" for a count."""
    metric = METRICS.get(name.removeprefix("report_"))
    if metric is not None:
        return metric.unit
    return next((unit for ending, unit in _ENDINGS.items() if name.endswith(ending)), "")


def format_value(name: str, value: float | None) -> str:
    """Returns a metric's value with its unit, scaled for reading: ``1.24 MB``, ``98.31 %``, ``0.82 ms``, ``1.3 G``."""
    if value is None:
        return "-"
    unit = unit_of(name)
    shown = _SHOWN.get(unit, f" {unit}" if unit else "")
    if unit == "bytes" or (name in METRICS and not unit):
        return (_scaled(value) + shown).strip()
    if unit in ("%", "percentage points"):
        return f"{value:.2f}{shown}"
    return f"{value:,.0f}{shown}" if 9999 <= abs(value) < 1e15 else f"{value:.4g}{shown}"


def _scaled(value: float) -> str:
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}"
    return f"{value:.4g} "


def format_seconds(seconds: float) -> str:
    """Returns ``1.4 s``, ``45 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
