"""How large and how costly the models of a study would be, from their structures alone: what ``plan --landscape`` says."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.frontier.dominance import nondominated
from orchestrator.sampling.suggestions import RandomSuggest
from orchestrator.study.constraints import Constraint, derived
from orchestrator.study.schema import StudyConfig
from orchestrator.study.space import SearchSpace
from orchestrator.words.units import format_value
from workers.metrics import EXACT
from workers.node.storage import Storage
from workers.structure import Structures
from workers.trial import Context, Recipe

SAMPLE = 100
"""Recipes that are looked at; all of them where there are no more."""

TRADED = ("size_bytes", "macs")
"""What the trade-off is told of; weights are bytes before they are packed."""

DRAWS = 20
"""Draws for each recipe of the sample, since some repeat others or cannot be carried out."""


@dataclass(frozen=True)
class Landscape:
    """What is known of some recipes of a space.

    Attributes:
        recipes: that can be carried out, with what is known of each; an empty mapping where nothing is.
        everything: they are all there are, not a sample.
        baseline: what is known of the uncompressed model.
    """

    recipes: Sequence[tuple[Recipe, Mapping[str, float]]]
    everything: bool
    baseline: Mapping[str, float]


def look(config: StudyConfig, context: Context, space: SearchSpace, storage: Storage | None) -> Landscape:
    """Calculates what is known of the recipes of a study, or of a sample that is the same every time."""
    structures = Structures(context, storage, load_data=False)
    everything = space.size() <= SAMPLE
    chosen = list(space.enumerate()) if everything else _drawn(space)
    seed = config.seeds[0]
    known = [(recipe, structures.facts(recipe, seed)) for recipe in chosen if space.fault(recipe) is None]
    return Landscape(known, everything, structures.facts(Recipe(), seed))


def _drawn(space: SearchSpace) -> list[Recipe]:
    """Draws recipes as the random sampler does: every choice of a family alike, hence few combinations of many techniques."""
    suggest, found = RandomSuggest(random.Random(0)), dict[str, Recipe]()
    for _ in range(DRAWS * SAMPLE):
        recipe = space.sample(suggest)
        if space.fault(recipe) is None:
            found[recipe.hash] = recipe
        if len(found) == SAMPLE:
            break
    return list(found.values())


def lines(landscape: Landscape, constraints: Sequence[Constraint]) -> Iterator[str]:
    """Yields what people read of a landscape."""
    known = [(recipe, facts) for recipe, facts in landscape.recipes if facts.keys() >= set(TRADED)]
    of = "all" if landscape.everything else f"{len(landscape.recipes):,} drawn"
    unknown = len(landscape.recipes) - len(known)
    learned = f"; of {unknown:,} more, weights, images or the training decide" if unknown else ""
    yield f"before any training: of {of} recipes {len(known):,} are known by their structure{learned}"
    if not known:
        return
    for name in EXACT:
        values = [facts[name] for _, facts in known]
        low, *quartiles, high = (format_value(name, q) for q in np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))
        own = format_value(name, landscape.baseline.get(name))
        yield f"  {name}: {low} to {high}, quartiles {', '.join(quartiles)}; uncompressed {own}"
    yield from _shares([facts for _, facts in known], landscape.baseline, constraints)
    yield from _trade_off(known)


def _shares(
    known: Sequence[Mapping[str, float]], baseline: Mapping[str, float], constraints: Sequence[Constraint]
) -> Iterator[str]:
    metrics = [derived(facts, baseline) for facts in known]
    judged = [constraint for constraint in constraints if constraint.metric in metrics[0]]
    if not judged:
        return
    met = sum(all(constraint.satisfied(found) for constraint in judged) for found in metrics)
    yield f"  {met / len(known):.0%} of them meet {' and '.join(map(str, judged))}; the others are refused without a trial"


def _trade_off(known: Sequence[tuple[Recipe, Mapping[str, float]]]) -> Iterator[str]:
    values = np.array([[facts[name] for name in TRADED] for _, facts in known])
    best = nondominated(values, ["minimize"] * len(TRADED))
    members = [one for one, member in zip(known, best, strict=True) if member]
    for title, name in (("smallest", "size_bytes"), ("least work", "macs")):
        other = next(one for one in TRADED if one != name)
        recipe, facts = min(members, key=lambda one: (one[1][name], one[1][other]))
        sizes = ", ".join(f"{format_value(one, facts[one])}{' MACs' if one == 'macs' else ''}" for one in TRADED)
        yield f"  {title}: {sizes}: {recipe.label()}"
    yield f"  {len(members):,} of them are not beaten by another in both"
