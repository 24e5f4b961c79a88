"""The report in words: what the study found in a sentence or two, and the facts it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import PurePath
from typing import Any

from orchestrator.ledger.status import format_failures
from orchestrator.report.data import TITLES, Candidate, Report
from orchestrator.study.constraints import DROPS
from orchestrator.words.spent_seconds import spent_text
from orchestrator.words.units import format_seconds, format_value
from workers.metrics import METRICS, SPEED_OBJECTIVES, SPEEDS

CLOSE_POINTS = 1.0
"""Percentage points below the baseline that count as close to it."""


def verdict(report: Report) -> tuple[str, str]:
    """Returns who is on the frontier, and what the best recipe close to the baseline gains; the latter may be empty."""
    feasible = [c for c in report.candidates if c.standing != "broken" and not c.is_baseline]
    if not feasible:
        return _nothing(report), ""
    certain = report.frontier("certain")
    possible = [c for c in report.frontier("possible") if not c.is_baseline]
    recipes = sum(not c.is_baseline for c in certain)
    who = _count(recipes, "recipe") if recipes else ""
    if len(certain) > recipes:
        who = f"{who} and the uncompressed baseline" if who else "Only the uncompressed baseline"
    verb = "is" if len(certain) == 1 else "are"
    text = f"{who or 'No recipe'} {verb if who else 'is'} certainly on the frontier of {_names(report)}"
    if possible:
        text += f", {len(possible)} may be"
    groups = sum(len(c.members) > 1 for c in [*certain, *possible])
    if groups:
        text += "; recipes that noise does not tell apart count once"
    return text + ".", _best(report)


def _nothing(report: Report) -> str:
    broken = sum(c.standing == "broken" and not c.is_baseline for c in report.candidates)
    failed = sum(report.status["failed"].values())
    if not broken and not failed:
        return "No trial has ended yet."
    parts = [f"{failed} failed"] if failed else []
    if broken:
        limits = " or ".join(f"not {c}" for c in report.config.get("constraints", ()))
        parts.append(f"{broken} {'breaks' if broken == 1 else 'break'} a constraint of the study ({limits})")
    return f"No recipe is feasible: {' and '.join(parts)}."


def best_close(report: Report) -> dict[str, tuple[Candidate, float]]:
    """Returns objective to the frontier's best recipe for it within a point of the baseline, and how many times better.

    Certain members first; a possible one only where no certain one gains. A gain counts only where its whole interval
    is better than the baseline; a simulated recipe gains no speed.
    """
    found: dict[str, tuple[Candidate, float]] = {}
    for standing in ("certain", "possible"):
        close = [c for c in report.frontier(standing) if not c.is_baseline and _is_close(report, c)]
        for name in report.objectives:
            gains = [(gain, c) for c in close if (gain := _gain(report, c, name)) is not None]
            if gains and name not in found:
                gain, candidate = max(gains, key=lambda pair: pair[0])
                found[name] = (candidate, gain)
    return found


def _best(report: Report) -> str:
    if not _drops(report):
        return ""
    close = [c for c in report.frontier("certain", "possible") if not c.is_baseline and _is_close(report, c)]
    if not close:
        return f"None of them is within {CLOSE_POINTS:g} point of the baseline's accuracy."
    by_recipe: dict[str, tuple[Candidate, list[str]]] = {}
    for name, (candidate, gain) in best_close(report).items():
        by_recipe.setdefault(candidate.id, (candidate, []))[1].append(METRICS[name].gain.format(gain))
    if not by_recipe:
        return f"None within {CLOSE_POINTS:g} point of the baseline gains anything that is beyond the noise."
    parts = [f"{_join(gains)} ({c.label})" for c, gains in by_recipe.values()]
    return f"Within {CLOSE_POINTS:g} point of the baseline's accuracy, the best {' or '.join(parts)}."


def _is_close(report: Report, candidate: Candidate) -> bool:
    drops = [candidate.value[where] for where in _drops(report)]
    return bool(drops) and all(drop is not None and drop <= CLOSE_POINTS for drop in drops)


def _drops(report: Report) -> list[int]:
    """Returns where the drops of accuracies stand that the study has."""
    return [where for where, metric in enumerate(report.metrics) if metric.name in DROPS]


def _gain(report: Report, candidate: Candidate, name: str) -> float | None:
    """Returns how many times better than the baseline a candidate is, None where that is not beyond doubt."""
    where = report.position(name)
    if name not in METRICS or not METRICS[name].gain or where is None:
        return None
    ratio, value = candidate.ratio[where], candidate.value[where]
    less = report.metrics[where].better == "minimize"
    worst = candidate.high[where] if less else candidate.low[where]
    if not ratio or not value:
        return None
    if name in SPEED_OBJECTIVES and (candidate.simulated or candidate.slower):
        return None
    bound = ratio if worst is None else ratio * worst / value
    gains = bound < 1 if less else bound > 1
    return (1 / ratio if less else ratio) if gains else None


def _names(report: Report) -> str:
    return _join([TITLES.get(name, name).split(",")[0] for name in report.objectives])


def _join(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# --- facts ------------------------------------------------------------------------------------------------------------


def facts(report: Report, made_at: datetime, version: str) -> list[tuple[str, str]]:
    """Returns what the numbers rest on, as names and texts."""
    status, config = report.status, report.config
    limits = config.get("constraints") or []
    found = [
        ("Model", model_text(config.get("model", {}))),
        ("Weights", "; ".join(report.conditions.get("weights") or ())),
        ("Data", _data_text(config.get("data", {}), report.conditions)),
        ("Of the data", "; ".join(report.said_of_data)),
        ("Device", report.device_name),
        ("Trials", f"{status['done']} of {status['budget']} done, failed: {format_failures(status['failed'])}"),
        ("Stopped early", _stopped_text(status)),
        ("Constraints", ", ".join(limits) or "none"),
        ("Run", _when(report)),
        ("Time", _spent(report)),
        *_baseline_facts(report.conditions.get("strong_baseline") or {}),
        ("Report", f"vitpareto {version}, {made_at:%Y-%m-%d %H:%M} UTC"),
    ]
    return [(name, text) for name, text in found if text]


def _stopped_text(status: Mapping[str, Any]) -> str:
    if not status["paused"]:
        return ""
    cost = f"{status['paused_epochs']:.3g} epochs of recovery and {format_seconds(status['paused_s'])} in all"
    counts = ", ".join(f"{count} at {rung} of the recovery" for rung, count in status["paused"].items())
    return f"{counts}; they cost {cost}"


_FAMILIES = {"vilt": "ViLT", "meter": "METER"}


def model_text(model: dict[str, Any]) -> str:
    """Returns a study's model in a few words: family, name, the settings that the study changes, and whose weights it has."""
    made, family = model.get("create") or {}, model.get("family", "timm")
    weights = f"weights of {PurePath(model['checkpoint']).name}" if model.get("checkpoint") else ""
    changed = [f"{key} {value}" for key, value in (model.get("options") or {}).items()]
    if family not in ("timm", "hf_vit"):
        changed = [f"{key} {value}" for key, value in made.items()]
        parts = [_FAMILIES.get(family, family), model.get("name"), *changed]
    elif made:
        shape = f"width {made['width']}, depth {made['depth']}, {made['heads']} heads, patch {made['patch']}"
        parts = ["ViT", shape, *changed, weights]
    else:
        name = "ViT of transformers" if family == "hf_vit" else model.get("name")
        parts = [name, *changed, "pretrained" if model.get("pretrained") else weights]
    return ", ".join(part for part in parts if part)


def _data_text(data: dict[str, Any], conditions: Any) -> str:
    size = conditions.get("resolution") or data.get("image_size")
    parts = [str(data.get("kind", ""))]
    if data.get("path"):
        parts.append(str(data["path"]))
    if size:
        parts.append(f"{size} px")
    if conditions.get("search_images"):
        parts.append(f"{conditions['search_images']} search images")
    return ", ".join(parts)


def _when(report: Report) -> str:
    if report.began is None or report.ended is None:
        return ""
    lasted = format_seconds((report.ended - report.began).total_seconds())
    return f"{report.began:%Y-%m-%d %H:%M} UTC, over {lasted}"


def _spent(report: Report) -> str:
    text, taken = spent_text(report.status["seconds"]), report.status["speeds_taken_over"]
    return f"{text}; {_count(taken, 'speed')} taken over from equal structures" if text and taken else text


def _baseline_facts(strong: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns what speed-ups are measured against, and how far two runs of one artefact lie apart."""
    found = []
    for kind in [k for k in SPEEDS if k in strong]:
        best = strong[kind]
        batch = f", batch {best['batch']}" if best.get("batch") else ""
        text = f"{format_value(SPEEDS[kind], best['value'])} as {best['way']}{batch}"
        noise = (strong.get("noise") or {}).get(kind) or {}
        if noise.get("sigma") is not None:
            text += f"; A/A noise σ {100 * noise['sigma']:.1f} %"
        found.append((f"Baseline {kind}", text))
    return found
