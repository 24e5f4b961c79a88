"""Reads a study for its report.

Numbers come from :func:`query.candidates`, which pools measurements and knows who is certainly on the frontier; what it
leaves out (other ratios, failures, recipes that break a constraint) comes from the trials table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from orchestrator.frontier import query
from orchestrator.frontier.membership import POSSIBLE
from orchestrator.ledger import Ledger
from orchestrator.ledger.schema import metric_of
from orchestrator.ledger.status import study_status
from orchestrator.ledger.stopped import STOPPED
from orchestrator.report.data import TITLES, Candidate, Metric, Report
from orchestrator.report.outlook import predictions_text, prospects_text
from orchestrator.report.overview import (
    contributions,
    failure_classes,
    history,
    searched_numbers,
    stopped_early,
)
from orchestrator.study.constraints import DROPS
from orchestrator.words.labels import short_label
from orchestrator.words.units import unit_of
from workers.metrics import DETAILS, INTERVALS, OBJECTIVES
from workers.trial import Recipe


def read_report(ledger: Ledger, objectives: Sequence[str] | None = None) -> Report:
    """Reads a study.

    Args:
        objectives: over which the frontier is taken; None: the study's own.

    Raises:
        QueryError: for an objective that does not exist.
    """
    record = ledger.study_record() or {}
    config = record.get("config", {})
    wanted = list(config.get("objectives", ())) if objectives is None else list(objectives)
    kept = query.candidates(ledger, wanted).to_pylist()
    trials = _trials(ledger)
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for trial in (t for t in trials if t["status"] != STOPPED):  # its numbers are not those of an end
        by_recipe.setdefault(trial["recipe_hash"], []).append(trial)
    newest = {recipe: _newest(of_recipe) for recipe, of_recipe in by_recipe.items()}
    feasible = {row["recipe_hash"] for row in kept}
    rows = [*kept, *(_broken(of_recipe) for recipe, of_recipe in newest.items() if recipe not in feasible)]
    reported = _reported(ledger)
    merged = [_with_trials(row, newest.get(row["recipe_hash"], []), reported) for row in rows if row is not None]
    merged.sort(key=lambda row: -1 if row["number"] is None else row["number"])
    metrics = _metrics(merged, wanted)
    searched = config.get("techniques", {})
    base = next((row for row in merged if row["recipe"] == "[]"), None)
    # As query.pareto shows them: where a crowd leaves nobody that much, the most probable ones.
    least = min([POSSIBLE, max((row["probability"] for row in kept), default=POSSIBLE)])
    times = [t["started_at"] for t in trials]
    report = Report(
        study=ledger.study,
        config=config,
        status=study_status(ledger),
        objectives=wanted,
        metrics=metrics,
        candidates=[_candidate(row, metrics, row["recipe_hash"] in feasible, searched, least) for row in merged],
        conditions=base["conditions"] if base else {},
        device_name=_device_name(base, config),
        began=min(times, default=None),
        ended=max((t["ended_at"] for t in trials), default=None),
        parameters=searched_numbers(searched),
        history=history(ledger),
        failures=failure_classes(trials),
        stopped=stopped_early(ledger, searched),
        said_of_data=_said_of_data(record),
        predictions=predictions_text(record),
        prospects=prospects_text(record, searched, ledger.study),
    )
    report.volume, report.techniques = contributions(report)
    return report


def _said_of_data(record: Mapping[str, Any]) -> list[str]:
    """Returns warnings and notes; none where the study is older than these."""
    said = record.get("data")
    found = said if isinstance(said, Mapping) else {}
    return [*(f"Warning: {text}" for text in found.get("warnings", ())), *map(str, found.get("notes", ()))]


# --- candidates -------------------------------------------------------------------------------------------------------

_BOUNDS = [f"{name}_{end}" for name in INTERVALS for end in ("low", "high")]
_RATIOS = [f"{name}_ratio" for name in OBJECTIVES]
_MEASURED = [*OBJECTIVES, *DROPS, *DETAILS]
_OF_TRIALS = ["trial_id", "number", "recipe", "recipe_hash", "seed", "status", "failure", "conditions", "started_at"]
_MORE_OF_TRIALS = ["duration_s", "context", "slower_than_baseline", *_MEASURED, *_RATIOS, *_BOUNDS]

Row = dict[str, Any]


def _trials(ledger: Ledger) -> list[Row]:
    """Returns the trials of the study's context, with ``ended_at`` and parsed conditions."""
    rows = ledger.trials([*_OF_TRIALS, *_MORE_OF_TRIALS]).to_pylist()
    mine = [row for row in rows if row["context"] == ledger.context]
    for row in mine:
        row["conditions"] = json.loads(row["conditions"] or "{}") or {}
        row["ended_at"] = row["started_at"] + timedelta(seconds=row["duration_s"] or 0.0)
    return mine


def _newest(trials: Sequence[Row]) -> list[Row]:
    """Returns the newest trial of each seed of a recipe, by seed."""
    found = {t["seed"]: t for t in sorted(trials, key=lambda t: t["started_at"])}
    return [found[seed] for seed in sorted(found)]


def _mean(trials: Sequence[Row], name: str) -> float | None:
    values = [t[name] for t in trials if t[name] is not None]
    return sum(values) / len(values) if values else None


def _broken(trials: Sequence[Row]) -> Row | None:
    """Returns a recipe that is ok and no candidate, so breaks a constraint, like a row of candidates; None if it failed."""
    if any(t["status"] != "ok" for t in trials):
        return None
    means = {name: _mean(trials, name) for name in _MEASURED}
    standing = {"probability": None, "certain": False, "members": [trials[0]["trial_id"]], "seeds": len(trials)}
    return {name: trials[0][name] for name in _OF_TRIALS} | {"slower_than_baseline": False} | means | standing


def _reported(ledger: Ledger) -> dict[str, dict[str, float]]:
    """Returns trial id to its accuracies on the report split, as columns, with the ends of their intervals."""
    rows = ledger.measurements(["trial_id", "kind", "value", "conditions"]).to_pylist()
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["kind"] == "accuracy_report":
            stated = json.loads(row["conditions"] or "{}")
            name, bounds = (
                f"report_{metric_of(stated)}",
                map(_number, map(stated.get, ("wilson_low_pct", "wilson_high_pct"))),
            )
            columns = dict(zip((name, f"{name}_low", f"{name}_high"), (row["value"], *bounds), strict=True))
            found.setdefault(row["trial_id"], {}).update(columns)
    return found


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None


def _with_trials(row: Row, trials: Sequence[Row], reported: Mapping[str, Mapping[str, float]]) -> Row:
    """Completes a candidate with what only its trials say."""
    done = row | {name: _mean(trials, name) for name in DETAILS}
    done["conditions"] = trials[0]["conditions"] if trials else {}
    for name in OBJECTIVES if trials else ():
        stored, ratio = _mean(trials, name), _mean(trials, f"{name}_ratio")
        # The candidate's value may be pooled with later measurements; then its ratio is, too.
        scale = done[name] / stored if stored and done.get(name) is not None else 1.0
        done.setdefault(f"{name}_ratio", None if ratio is None else ratio * scale)
    if len(trials) == 1:
        done = {name: trials[0][name] for name in _BOUNDS} | done
    return {**done, **reported.get(row["trial_id"], {})}


def _metrics(rows: Iterable[Mapping[str, Any]], objectives: Sequence[str]) -> list[Metric]:
    """Returns the metrics that somebody has a number for, objectives first."""
    rows = list(rows)
    names = [*objectives, *(name for name in TITLES if name not in objectives)]
    return [
        Metric(name, TITLES.get(name, name), unit_of(name), OBJECTIVES.get(name), name in objectives)
        for name in names
        if name in objectives or any(row.get(name) is not None for row in rows)
    ]


def _candidate(
    row: Mapping[str, Any],
    metrics: Sequence[Metric],
    feasible: bool,
    searched: Mapping[str, Any],
    least: float,
) -> Candidate:
    """``least``: probability from which on a candidate may be on the frontier."""
    recipe = Recipe.from_json(row["recipe"])
    members = list(row["members"] or [row["trial_id"]])
    return Candidate(
        id=row["trial_id"],
        number=row["number"],
        label=short_label(recipe, searched),
        steps=[(s.technique, dict(s.config)) for s in recipe.steps],
        value=[row.get(m.name) for m in metrics],
        low=[row.get(f"{m.name}_low") for m in metrics],
        high=[row.get(f"{m.name}_high") for m in metrics],
        ratio=[row.get(f"{m.name}_ratio") for m in metrics],
        standing=_standing(row, members, feasible, least),
        probability=row["probability"] if feasible else None,
        members=members,
        seeds=row["seeds"],
        simulated=bool(row["conditions"].get("simulated")),
        slower=bool(row["slower_than_baseline"]),
    )


def _standing(row: Mapping[str, Any], members: Sequence[str], feasible: bool, least: float) -> str:
    if not feasible:
        return "broken"
    if row["probability"] < least:
        return "dominated"
    if members[0] != row["trial_id"]:
        return "member"
    return "certain" if row["certain"] else "possible"


def _device_name(base: Mapping[str, Any] | None, config: Mapping[str, Any]) -> str:
    stated = (base or {}).get("conditions", {}).get("strong_baseline") or {}
    return str(stated.get("device_name") or config.get("device", ""))
