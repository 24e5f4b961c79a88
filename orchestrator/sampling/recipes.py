"""Recipes as a sampler sees them: short keys, their neighbours and crossovers, and the numbers a model is given of them.

A key names a recipe by positions on its axes, so that thousands can be made and compared in an ask: ``(("tome", (1, 0)),
("weight_only", (2,)))`` in the recipe's order. What is absent has no numbers of its own: conditional parameters need no special
case, and recipes share what they have in common.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from orchestrator.sampling.suggestions import RandomSuggest
from orchestrator.study.axes import Axis, Suggest
from workers.trial import Recipe, Step

T = TypeVar("T")

Key = tuple[tuple[str, tuple[int, ...]], ...]
"""Techniques in order, each with the positions of its values on its axes."""

TWO_STEPS = 0.35
"""Share of neighbours that differ in two things."""

NEXT_ON_GRID = 0.6
"""Share of changed ordered values that move to a neighbouring value; the others go anywhere."""

TRIES = 20

KEPT = 10_000
"""Recipes that are kept: candidates come back, and their hash takes longer than all else of them."""


class Space(Protocol):
    """A search space of recipes: :class:`orchestrator.study.space.SearchSpace`, or a table of outcomes."""

    @property
    def max_techniques(self) -> int:
        """Most techniques in one recipe."""

    @property
    def axes(self) -> Mapping[str, Mapping[str, Axis]]:
        """Technique to parameter to what it may be."""

    @property
    def families(self) -> Sequence[tuple[str, tuple[str, ...]]]:
        """Name and techniques of each family, in the order of recipes."""

    def legal_orders(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Returns the orders in which these techniques, in that of their families, may stand."""

    def sample(self, suggest: Suggest) -> Recipe:
        """Draws a recipe."""

    def params_of(self, recipe: Recipe) -> dict[str, Any]:
        """Returns the answers that make :meth:`sample` yield ``recipe``."""

    def enumerate(self) -> Iterator[Recipe]:
        """Yields every recipe once."""

    def size(self) -> int:
        """Returns how many recipes there are."""

    def fault(self, recipe: Recipe) -> str | None:
        """Returns why the recipe cannot be carried out, or None."""


def is_ordered(axis: Axis) -> bool:
    """Says whether an axis is a scale: numbers, each larger than the one before."""
    values = list(axis)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return numbers and all(a < b for a, b in pairwise(values))


class RecipeKeys:
    """The recipes of a space by key.

    Args:
        space: theirs.
        conversions: techniques that need no training.

    Attributes:
        recipe: returns the recipe that a key names.
    """

    def __init__(self, space: Space, conversions: Collection[str] = ()) -> None:
        self.space = space
        self.conversions = frozenset(conversions) & set(space.axes)
        self._axes = {name: tuple(axes.values()) for name, axes in space.axes.items()}
        self.recipe = lru_cache(KEPT)(self._make)
        self._techniques = tuple(self._axes)
        self._sizes = {name: [len(axis) for axis in axes] for name, axes in self._axes.items()}
        self._parameters = {name: tuple(axes) for name, axes in space.axes.items()}
        self._free = {t: [i for i, a in enumerate(axes) if len(a) > 1] for t, axes in self._axes.items()}
        self._ordered = {t: [is_ordered(a) for a in axes] for t, axes in self._axes.items()}
        self._place = {t: (place, i) for place, (_, names) in enumerate(space.families) for i, t in enumerate(names)}
        self._positions = {
            t: [{repr(value): i for i, value in enumerate(a)} for a in axes] for t, axes in self._axes.items()
        }

    # --- there and back -----------------------------------------------------------------------------------------------

    def key(self, recipe: Recipe) -> Key | None:
        """Returns the key of a recipe; None where it is not of this space."""
        steps = []
        for step in recipe.steps:
            if step.technique not in self._axes:
                return None
            places = self._positions[step.technique]
            values = (step.config.get(p) for p in self._parameters[step.technique])
            found = [place.get(repr(value)) for place, value in zip(places, values, strict=True)]
            if None in found:
                return None
            steps.append((step.technique, tuple(i for i in found if i is not None)))
        return tuple(steps)

    def _make(self, key: Key) -> Recipe:
        return Recipe(
            tuple(
                Step(t, {p: a[i] for p, a, i in zip(self._parameters[t], self._axes[t], positions, strict=True)})
                for t, positions in key
            )
        )

    def surgery(self, key: Key) -> Key:
        """Returns the part of a recipe that decides what is trained."""
        return tuple(step for step in key if step[0] not in self.conversions)

    # --- draws --------------------------------------------------------------------------------------------------------

    def draw(self, rng: random.Random) -> Key:
        """Returns a random recipe."""
        key = self.key(self.space.sample(RandomSuggest(rng)))
        assert key is not None  # it is of this space
        return key

    def near(self, rng: random.Random, key: Key) -> Key:
        """Returns a recipe that differs from ``key`` in one thing, or two: a value, a technique, the order."""
        for _ in range(TRIES):
            found = self._step(rng, key)
            if found is None or found == key:
                continue
            second = self._step(rng, found) if rng.random() < TWO_STEPS else None
            return second if second is not None and second != key else found
        return self.draw(rng)

    def cross(self, rng: random.Random, one: Key, other: Key) -> Key:
        """Returns a recipe with techniques and values of both."""
        first, second = dict(one), dict(other)
        chosen: dict[str, tuple[int, ...]] = {}
        for name in {**first, **second}:
            if name in first and name in second:
                pairs = zip(first[name], second[name], strict=True)
                chosen[name] = tuple(a if rng.random() < 0.5 else b for a, b in pairs)
            elif rng.random() < 0.5:
                chosen[name] = first[name] if name in first else second[name]
        while len(chosen) > self.space.max_techniques:
            del chosen[pick(rng, list(chosen))]
        return self._arrange(rng, chosen) or self.near(rng, one)

    def with_techniques(self, rng: random.Random, key: Key, added: Sequence[str]) -> Key | None:
        """Returns a recipe with more techniques, of random values; None where they must not be together."""
        return self._arrange(rng, {**dict(key), **{name: self._config(rng, name) for name in added}})

    def _step(self, rng: random.Random, key: Key) -> Key | None:
        """Returns a recipe one change away; None where the drawn change cannot be made."""
        names, luck = [name for name, _ in key], rng.random()
        if luck < 0.5 or len(self._axes) == 1:
            return self._change_value(rng, key, pick(rng, names))
        chosen = dict(key)
        if luck < 0.65:
            del chosen[pick(rng, names)]
        elif luck < 0.85:
            added = pick(rng, self._techniques)
            if added in chosen:
                return None
            if len(chosen) >= self.space.max_techniques:
                del chosen[pick(rng, names)]
            chosen[added] = self._config(rng, added)
        elif luck < 0.95:
            out = pick(rng, names)
            del chosen[out]
            into = pick(rng, self.space.families[self._place[out][0]][1])
            chosen[into] = self._config(rng, into)
        return self._arrange(rng, chosen)

    def _change_value(self, rng: random.Random, key: Key, name: str) -> Key | None:
        if not self._free[name]:
            return None
        i = pick(rng, self._free[name])
        positions, size = list(dict(key)[name]), self._sizes[name][i]
        if self._ordered[name][i] and rng.random() < NEXT_ON_GRID:
            positions[i] += 1 if rng.random() < 0.5 else -1
            if not 0 <= positions[i] < size:
                return None
        else:
            positions[i] = int(rng.random() * size)
        return tuple((t, tuple(positions) if t == name else old) for t, old in key)

    def _config(self, rng: random.Random, name: str) -> tuple[int, ...]:
        return tuple([int(rng.random() * size) for size in self._sizes[name]])

    def _arrange(self, rng: random.Random, chosen: Mapping[str, tuple[int, ...]]) -> Key | None:
        """Puts techniques into one of their legal orders; None where they must not be together."""
        if not chosen:
            return None
        orders = self.space.legal_orders(tuple(sorted(chosen, key=self._place.__getitem__)))
        return tuple([(t, chosen[t]) for t in pick(rng, orders)]) if orders else None


def pick(rng: random.Random, values: Sequence[T]) -> T:
    """Chooses one: a third of the time of :meth:`random.Random.choice`, and as even as a float."""
    return values[int(rng.random() * len(values))]


class Features:
    """What a model is given of a recipe: a row of numbers, zero for all that is absent.

    A technique is 1 where it is present. A value of a scale with k values is a thermometer of k - 1 numbers of 1 / sqrt(k - 1);
    of other choices one of k numbers is sqrt(1/2): whatever a parameter is, its two farthest values are at squared distance 1.
    Of each two techniques that may stand in either order, a number says which came first.
    """

    def __init__(self, space: Space) -> None:
        self._columns: dict[object, int] = {}
        self._coded: dict[str, list[list[tuple[list[int], float]]]] = {}
        for technique, axes in space.axes.items():
            self._column(technique)
            self._coded[technique] = [self._code(technique, p, axis) for p, axis in axes.items()]
        names = [t for _, members in space.families for t in members]
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                if len(space.legal_orders((first, second))) > 1:
                    self._column((first, second))
                    self._column((second, first))

    def _column(self, name: object) -> int:
        return self._columns.setdefault(name, len(self._columns))

    def _code(self, technique: str, parameter: str, axis: Axis) -> list[tuple[list[int], float]]:
        """Returns for each position on an axis the columns that are not zero, and their value."""
        size = len(axis)
        if size == 1:
            return [([], 0.0)]
        if is_ordered(axis):
            columns = [self._column((technique, parameter, i)) for i in range(size - 1)]
            return [(columns[:i], 1 / math.sqrt(size - 1)) for i in range(size)]
        return [([self._column((technique, parameter, i))], math.sqrt(0.5)) for i in range(size)]

    def __call__(self, keys: Sequence[Key]) -> NDArray[np.float64]:
        """Returns the features of recipes: (recipes, columns)."""
        found = np.zeros((len(keys), len(self._columns)))
        for row, key in zip(found, keys, strict=True):
            for technique, positions in key:
                row[self._columns[technique]] = 1.0
                for codes, position in zip(self._coded[technique], positions, strict=True):
                    columns, value = codes[position]
                    if columns:
                        row[columns] = value
            for i, (first, _) in enumerate(key):
                for second, _ in key[i + 1 :]:
                    column = self._columns.get((first, second))
                    if column is not None:
                        row[column] = 0.5
        return found
