"""Recipes as short texts for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.trial import Recipe


def short_label(recipe: Recipe, searched: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the recipe without the parameters that its study fixes: ``tome(r=2) + weight_only(bits=4)``.

    Args:
        searched: ``techniques`` of the study, technique to parameter to what is searched; a list of one value is fixed.
    """
    return " + ".join(_step(s.technique, s.config, searched.get(s.technique, {})) for s in recipe.steps) or "baseline"


def _step(technique: str, config: Mapping[str, Any], searched: Mapping[str, Any]) -> str:
    fixed = {name for name, domain in searched.items() if isinstance(domain, list) and len(domain) == 1}
    values = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in config.items() if k not in fixed]
    return f"{technique}({', '.join(values)})" if values else technique
