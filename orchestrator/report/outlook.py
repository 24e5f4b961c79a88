"""What the report says of the search itself: how well it predicted, and what it expects of going on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.words.labels import short_label
from orchestrator.words.units import format_value
from workers.trial import Recipe


def predictions_text(record: Mapping[str, Any]) -> str:
    """Returns how the values that were expected of recipes rank with those they gave; empty where none were.

    Args:
        record: of the study, as its driver left it.
    """
    found = _part(record, "predictions", dict)
    parts = [
        f"{name} {told['rank_correlation']:.2f} ({told['count']})"
        for name, told in found.items()
        if isinstance(told, Mapping) and isinstance(told.get("rank_correlation"), float)
    ]
    if not parts:
        return ""
    return (
        f"rank correlation of what was expected of recipes before they were run with what they gave: {', '.join(parts)}"
    )


def prospects_text(record: Mapping[str, Any], searched: Mapping[str, Any], study: str) -> str:
    """Returns what the best recipes that were not run are expected to give, and how to have them run; empty where nothing is.

    Args:
        record: of the study, as its driver left it.
        searched: ``techniques`` of the study.
        study: its name.
    """
    try:
        found = [
            (short_label(Recipe.from_json(p["recipe"]), searched), p["expected"], float(p["gain"]))
            for p in _part(record, "prospects", list)
        ]
        texts = [
            f"{label} ({', '.join(_expected(name, *told) for name, told in expected.items())})"
            for label, expected, _ in found
        ]
    except (KeyError, TypeError, ValueError, AttributeError):  # a damaged record says nothing
        return ""
    if not found:
        return ""
    more = sum(gain for *_, gain in found)
    going_on = f"`vitpareto resume {study} --trials +{len(found)}` is expected to add {more:.1%} to the hypervolume"
    return f"{texts[0]} would be next; {going_on}"


def _expected(name: str, mean: float, spread: float) -> str:
    text = format_value(name, mean)
    return f"{text} \u00b1 {format_value(name, spread)}" if spread else text


def _part(record: Mapping[str, Any], name: str, kind: type) -> Any:
    told = record.get("foresight")
    found = told.get(name) if isinstance(told, Mapping) else None
    return found if isinstance(found, kind) else kind()
