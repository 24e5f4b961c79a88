"""Whether a trial that was run again agrees with its row: number by number, within the intervals that both state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from workers.metrics import ACCURACIES, DEVICE_BOUND, OBJECTIVES

MISSING = "not recorded"

CODE = ("git_commit", "git_dirty")

COMPARED = (*CODE, "device_name", "driver", "cuda", "cpu_capability", "cpu_flags", "threads", "host", "platform")
"""Keys of a row's provenance that may explain another number, besides the versions."""


@dataclass(frozen=True)
class Run:
    """One run of a trial.

    Attributes:
        device: device kind that it ran on; ``device_name``: product name, None if unknown.
        predictions: accuracy to how right each search example was, as hexadecimal digits; ``logits``: to the logits' digest.
        ways: kind of speed to the uncompressed way that it was timed against.
    """

    status: str
    failure: str | None
    metrics: Mapping[str, float]
    device: str
    device_name: str | None
    predictions: Mapping[str, str]
    logits: Mapping[str, str]
    ways: Mapping[str, str]


@dataclass(frozen=True)
class Verdict:
    """What became of one objective.

    Attributes:
        compared: metric that was compared: of a speed or of memory the ratio to the baseline that was measured beside it.
        row, here: its values, with the ends of their 95 % intervals where they have one.
        verdict: ``equal``, ``inside``, ``outside``, ``not judged``.
        note: why, where that needs a word.
    """

    objective: str
    compared: str
    row: float | None
    row_low: float | None
    row_high: float | None
    here: float | None
    here_low: float | None
    here_high: float | None
    verdict: str
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """Something that a row's provenance and that of now have not in common."""

    what: str
    row: str
    here: str


# --- numbers ----------------------------------------------------------------------------------------------------------


def judge(row: Run, here: Run) -> list[Verdict]:
    """Compares every objective that the row has; nothing where one of the two failed."""
    if row.status != "ok" or here.status != "ok":
        return []
    return [_judge(name, row, here) for name in OBJECTIVES if row.metrics.get(name) is not None]


def _judge(name: str, row: Run, here: Run) -> Verdict:
    compared = f"{name}_ratio" if name in DEVICE_BOUND else name
    before, now = _with_ends(name, compared, row.metrics), _with_ends(name, compared, here.metrics)
    verdict, note = _verdict(name, before, now, row, here)
    return Verdict(name, compared, *before, *now, verdict, note)


Ends = tuple[float | None, float | None, float | None]
"""A value with the lower and the upper end of its interval."""


def _with_ends(name: str, compared: str, metrics: Mapping[str, float]) -> Ends:
    value, own = metrics.get(compared), metrics.get(name)
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    if value is None or own is None or low is None or high is None:
        return value, None, None
    scale = value / own if own else 1.0
    return value, low * scale, high * scale


def _verdict(name: str, before: Ends, now: Ends, row: Run, here: Run) -> tuple[str, str]:
    a, b = before[0], now[0]
    if name in DEVICE_BOUND:
        if reason := _not_comparable(row, here):
            return "not judged", reason
        if a is not None and b is not None:
            return _ratio_verdict(name, before, now, row, here)
    if a is None or b is None:
        return "outside", "the row has no such value" if a is None else "no value here"
    if name in ACCURACIES:
        return _accuracy_verdict(name, before, b, row, here)
    return ("equal", "") if a == b else ("outside", "must be equal")


def _not_comparable(row: Run, here: Run) -> str:
    if row.device != here.device:
        return f"measured on {row.device}, run here on {here.device}"
    if row.device_name and here.device_name and row.device_name != here.device_name:
        return f"measured on {row.device_name}, this is {here.device_name}"
    return ""


def _accuracy_verdict(name: str, before: Ends, now: float, row: Run, here: Run) -> tuple[str, str]:
    known = name in row.predictions
    if known and row.predictions[name] == here.predictions.get(name):
        same = name in row.logits and row.logits[name] == here.logits.get(name)
        return "equal", "the same logits" if same else "the same examples are right"
    _, low, high = before
    if low is None or high is None:
        return ("equal", "") if before[0] == now else ("outside", "the row has no interval")
    return ("inside" if low <= now <= high else "outside"), ""


def _ratio_verdict(name: str, before: Ends, now: Ends, row: Run, here: Run) -> tuple[str, str]:
    """Two noisy ratios agree where the logarithm of their quotient is within the root of the sum of both half widths squared."""
    assert before[0] is not None
    assert now[0] is not None
    if before[0] == now[0]:
        return "equal", ""
    distance = abs(math.log(now[0] / before[0]))
    inside = distance <= math.hypot(half_width(before), half_width(now))
    kind = name.split("_")[0]
    ways = row.ways.get(kind), here.ways.get(kind)
    note = f"the strong baseline was {ways[0]} there, {ways[1]} here" if all(ways) and ways[0] != ways[1] else ""
    return ("inside" if inside else "outside"), note


def half_width(ends: Ends) -> float:
    """Returns half the width of an interval in log space; 0 where the value is exact, infinity where it reaches down to 0."""
    _, low, high = ends
    if low is None or high is None:
        return 0.0
    return (math.log(high) - math.log(low)) / 2 if low > 0 else math.inf


# --- provenance -------------------------------------------------------------------------------------------------------


def differences(row: Mapping[str, Any], here: Mapping[str, Any]) -> list[Difference]:
    """Returns what differs between two records of provenance, versions first; and code that was changed after its commit."""
    before, now = dict(row.get("versions") or {}), dict(here.get("versions") or {})
    found = [
        Difference(name, str(before.get(name, MISSING)), str(now.get(name, MISSING)))
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    return found + list(_other(row, here))


def _other(row: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Difference]:
    for name in COMPARED:
        one, other = (record.get(name, MISSING) for record in (row, here))
        same_commit_changed = name == "git_dirty" and (one is True or other is True)
        if one != other or same_commit_changed:
            yield Difference(name, _text(one), _text(other))


def _text(value: object) -> str:
    if value is None:
        return "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
