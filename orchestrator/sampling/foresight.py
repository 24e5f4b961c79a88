"""How well a search predicted what it then ran, and what it expects of going on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import TrialState
from scipy.stats import spearmanr

from orchestrator.sampling.recipe_sampler import PREDICTED, RecipeSampler

FEWEST = 5
"""Predictions of which a rank correlation is told."""

PROSPECTS = 5
"""Recipes of which is told what is expected of them."""


def foresight(study: Study, sampler: BaseSampler, objectives: Sequence[str]) -> dict[str, Any]:
    """Returns plain values about what a search expected.

    Returns:
        ``predictions``: objective to ``count`` of recipes of which a value was predicted when they were asked for, none of which the
        model had seen, and ``rank_correlation`` (Spearman's) with what they then gave; ``prospects``: ``recipe`` (JSON),
        ``expected`` (objective to mean and standard deviation) and ``gain`` (share of the hypervolume) of the recipes that would come
        next, each given those before it. Empty where the sampler predicts nothing.
    """
    if not isinstance(sampler, RecipeSampler):
        return {}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        for name, (mean, _) in trial.system_attrs.get(PREDICTED, {}).items():
            pairs.setdefault(name, []).append((mean, trial.values[list(objectives).index(name)]))
    predictions = {
        name: {"count": len(found), "rank_correlation": _correlation(found)}
        for name, found in pairs.items()
        if len(found) >= FEWEST
    }
    prospects = [
        {"recipe": one.recipe.to_json(), "expected": {k: list(v) for k, v in one.expected.items()}, "gain": one.gain}
        for one in sampler.outlook(study, PROSPECTS)
    ]
    return {"predictions": predictions, "prospects": prospects}


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Returns Spearman's rank correlation, None where one side is always the same."""
    first, second = zip(*pairs, strict=True)
    if len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(spearmanr(first, second).statistic)
