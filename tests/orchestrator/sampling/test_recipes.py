"""Recipes as keys: there and back, neighbours, crossovers, features."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from orchestrator.sampling.recipes import Features, Key, RecipeKeys, is_ordered
from orchestrator.study.axes import Choices, Grid
from orchestrator.study.space import SearchSpace

TECHNIQUES: dict[str, Any] = {
    "magnitude_prune": {"head_ratio": [0.0, 0.25, 0.5], "mlp_ratio": {"low": 0.1, "high": 0.5, "step": 0.1}},
    "tome": {"r": {"low": 1, "high": 4, "step": 1}, "schedule": ["constant", "decreasing"]},
    "nystrom": {"landmarks": {"low": 4, "high": 12, "step": 4}},
    "dynamic_int8": {},
    "weight_only": {"bits": [2, 4, 8]},
}


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace(TECHNIQUES, max_techniques=3)


@pytest.fixture(scope="module")
def keys(space: SearchSpace) -> RecipeKeys:
    return RecipeKeys(space, ["dynamic_int8", "weight_only"])


@pytest.fixture(scope="module")
def everything(space: SearchSpace, keys: RecipeKeys) -> set[Key]:
    found = {keys.key(recipe) for recipe in space.enumerate()}
    assert None not in found
    return {key for key in found if key is not None}


def test_every_recipe_has_a_key_of_its_own_and_comes_back(space: SearchSpace, keys: RecipeKeys) -> None:
    recipes = list(space.enumerate())
    found = [keys.key(recipe) for recipe in recipes]
    assert len(set(found)) == space.size() == len(recipes)
    assert [keys.recipe(key).hash for key in found if key is not None] == [recipe.hash for recipe in recipes]


def test_what_is_of_another_space_has_no_key(keys: RecipeKeys) -> None:
    other = SearchSpace({"tome": {"r": [7], "schedule": ["constant"]}, "svd": {"keep": [0.5]}}, max_techniques=2)
    assert [keys.key(recipe) for recipe in other.enumerate()] == [None] * other.size()


def test_draws_neighbours_and_crossovers_are_recipes_of_the_space(keys: RecipeKeys, everything: set[Key]) -> None:
    rng = random.Random(0)
    drawn = [keys.draw(rng) for _ in range(300)]
    near = [keys.near(rng, key) for key in drawn]
    crossed = [keys.cross(rng, *rng.sample(drawn, 2)) for _ in range(300)]
    assert {*drawn, *near, *crossed} <= everything
    same = [key for key, other in zip(drawn, near, strict=True) if key == other]
    assert len(same) <= 3, same  # where no step could be made a draw may come back to the same


def test_every_recipe_can_be_reached_by_neighbours(keys: RecipeKeys, everything: set[Key]) -> None:
    rng, seen, to_do = random.Random(1), set[Key](), [keys.draw(random.Random(2))]
    while to_do:
        key = to_do.pop()
        new = {keys.near(rng, key) for _ in range(60)} - seen
        seen |= new
        to_do += new
    assert seen == everything


def test_a_surgery_is_what_decides_the_training(keys: RecipeKeys) -> None:
    rng = random.Random(3)
    for key in (keys.draw(rng) for _ in range(200)):
        surgery = keys.surgery(key)
        assert [t for t, _ in surgery] == [t for t, _ in key if t not in ("dynamic_int8", "weight_only")]
        assert surgery == tuple(step for step in key if step in surgery)


@pytest.mark.parametrize(
    ("axis", "ordered"),
    [
        (Grid(1, 4, 1), True),
        (Choices((0.0, 0.25, 0.5)), True),
        (Choices((2, 8, 4)), False),
        (Choices((True, False)), False),
        (Choices(("a", "b")), False),
    ],
)
def test_what_counts_as_a_scale(axis: Grid | Choices, ordered: bool) -> None:
    assert is_ordered(axis) == ordered


def test_features_tell_all_recipes_apart_and_know_distances(space: SearchSpace, keys: RecipeKeys) -> None:
    features, found = Features(space), [key for r in space.enumerate() if (key := keys.key(r)) is not None]
    rows = features(found)
    assert len(np.unique(rows.round(9), axis=0)) == len(found)
    by_key = dict(zip(found, rows, strict=True))

    def distance(one: Key, other: Key) -> float:
        return float(((by_key[one] - by_key[other]) ** 2).sum())

    tome = [(("tome", (r, 0)),) for r in range(4)]
    assert [distance(tome[0], other) for other in tome] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert distance(tome[0], (("tome", (0, 1)),)) == pytest.approx(1)
    ends = [distance((("weight_only", (a,)),), (("weight_only", (b,)),)) for a, b in combinations(range(3), 2)]
    assert ends == pytest.approx([0.5, 1, 0.5])
    assert distance(tome[0], (("dynamic_int8", ()),)) == pytest.approx(1 + 1 + 0.5)


def test_an_order_that_may_be_either_is_a_feature() -> None:
    space = SearchSpace({"tome": {"r": [1]}, "magnitude_prune": {"mlp_ratio": [0.5]}}, max_techniques=2)
    orders = space.legal_orders(("magnitude_prune", "tome"))
    keys, features = RecipeKeys(space), Features(space)
    pairs = [key for r in space.enumerate() if len(key := keys.key(r) or ()) == 2]
    assert len(pairs) == len(orders)
    assert len(np.unique(features(pairs), axis=0)) == len(orders)
