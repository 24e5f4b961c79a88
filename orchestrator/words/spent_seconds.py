"""Where the time of trials went, as a text."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.words.units import format_seconds

_NAMES = {
    "train": "training",
    "evaluate": "evaluating",
    "measure": "measuring",
    "lane_wait": "waiting for the lane",
    "stage_wait": "waiting for another's stage",
    "other": "the rest",
}
"""Entries of ``seconds`` of a row, in the order in which they are told. The lane is what lets a measurement be alone on its device."""


def spent_text(seconds: Mapping[str, float]) -> str:
    """Returns sums as ``1m 38s in trials: training 42 %, measuring 26 %``; "" where nothing was spent.

    Args:
        seconds: sums of the rows' entries; what is less than a half per cent is left out.
    """
    total = sum(seconds.values())
    if total <= 0:
        return ""
    order = [*_NAMES, *sorted(seconds.keys() - _NAMES)]
    shares = [(name, 100 * seconds.get(name, 0.0) / total) for name in order]
    told = ", ".join(f"{_NAMES.get(name, name)} {share:.0f} %" for name, share in shares if share >= 0.5)
    return f"{format_seconds(total)} in trials: {told}"
