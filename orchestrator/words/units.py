"""Numbers for people: the unit is in the name of the metric."""

from __future__ import annotations

_SUFFIXES = (
    ("_bytes", "B"),
    ("_ms_p50", " ms"),
    ("_ms_p95", " ms"),
    ("_images_per_s", " images/s"),
    ("_pct", " %"),
    ("_drop", " points"),
    ("_ratio", "x"),
    ("_s", " s"),
)
_COUNTS = ("params", "macs")


def unit_of(name: str) -> str:
    """Returns the unit that a metric's name states, "" for a count."""
    found = next((unit for suffix, unit in _SUFFIXES if name.endswith(suffix)), "")
    return {"B": "bytes", "x": "times the baseline", " points": "percentage points"}.get(found, found.strip())


def format_value(name: str, value: float | None) -> str:
    """Returns a metric's value with its unit, scaled for reading: ``1.24 MB``, ``98.31 %``, ``0.82 ms``, ``1.3 G``."""
    if value is None:
        return "-"
    unit = next((unit for suffix, unit in _SUFFIXES if name.endswith(suffix)), "")
    if unit == "B" or name in _COUNTS:
        return (_scaled(value) + unit).strip()
    if unit in (" %", " points"):
        return f"{value:.2f}{unit}"
    return f"{value:,.0f}{unit}" if 9999 <= abs(value) < 1e15 else f"{value:.4g}{unit}"


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
