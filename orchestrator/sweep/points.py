"""What the running search has found, in numbers for progress and history: points, reference point, hypervolume."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from orchestrator.frontier import dominance
from orchestrator.study import constraints
from orchestrator.study.schema import StudyConfig
from orchestrator.sweep.searcher import Proposer
from orchestrator.words.labels import short_label


def feasible(
    config: StudyConfig, proposer: Proposer, baseline: Mapping[str, float] | None
) -> list[tuple[str | None, Mapping[str, float]]]:
    """Returns (recipe hash, metrics) of the baseline, which comes first as None, and of every feasible ok trial, seeds averaged."""
    if baseline is None:
        return []
    limits = config.parsed_constraints()
    found: list[tuple[str | None, Mapping[str, float]]] = [(None, baseline)]
    for recipe, metrics in proposer.outcomes.items():
        if metrics is None:
            continue
        values = constraints.derived(metrics, baseline) if limits else metrics
        if all(c.satisfied(values) for c in limits):
            found.append((recipe, metrics))
    return found


def best(config: StudyConfig, proposer: Proposer, baseline: Mapping[str, float] | None) -> dict[str, tuple[float, str]]:
    """Returns objective to the best feasible value so far and the label of the recipe that has it; the baseline is none."""
    found = feasible(config, proposer, baseline)[1:]
    values: dict[str, tuple[float, str]] = {}
    for name, direction in config.objectives.items():
        pick = max if direction == "maximize" else min
        if found:
            recipe, metrics = pick(found, key=lambda point: point[1][name])
            values[name] = (metrics[name], short_label(proposer.recipes[str(recipe)], config.techniques))
    return values


def reference(config: StudyConfig, baseline: Mapping[str, float] | None) -> list[float]:
    """Returns the reference point in the objectives' own units: the study's where it gives one, else the stated one."""
    names, directions = list(config.objectives), list(config.objectives.values())
    base = [baseline.get(n, 0.0) if baseline else 0.0 for n in names]
    stated = dominance.default_reference(base, directions) if min(base) > 0 else np.zeros(len(base))
    return [(config.reference_point or {}).get(n, float(v)) for n, v in zip(names, stated, strict=True)]


def hypervolume(config: StudyConfig, proposer: Proposer, baseline: Mapping[str, float] | None) -> float | None:
    """Returns the hypervolume of the feasible points in multiples of the baseline's values, None where one is zero."""
    names, directions = list(config.objectives), list(config.objectives.values())
    if baseline is None or min(baseline.get(n, 0.0) for n in names) <= 0:
        return None
    base = np.array([baseline[n] for n in names])
    values = np.array([[m[n] for n in names] for _, m in feasible(config, proposer, baseline)])
    return dominance.hypervolume(values / base, directions, np.array(reference(config, baseline)) / base)
