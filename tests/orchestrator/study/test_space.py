"""The search space: nothing forbidden is drawn, counting is exact, and drawing has an inverse."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.study.axes import Choices, Grid, axis
from orchestrator.study.space import SearchSpace
from workers.techniques import composition
from workers.techniques.record import ModelInfo
from workers.trial import Recipe, Step

# Names that the composition table knows; without a model no technique is loaded, so they need not be built.
TECHNIQUES: dict[str, dict[str, Any]] = {
    "distill": {"alpha": {"low": 0.1, "high": 0.9, "step": 0.2}, "kind": ["soft", "hard"]},
    "magnitude_prune": {"ratio": {"low": 0.1, "high": 0.3, "step": 0.1}},
    "taylor_prune": {"ratio": [0.25]},
    "tome": {"r": {"low": 1, "high": 4, "step": 1}, "proportional": [True, False]},
    "nystrom": {"landmarks": {"low": 8, "high": 16, "step": 4}},
    "precision": {"dtype": ["bf16"]},
    "dynamic_int8": {"per_channel": [True, False]},
    "weight_only": {"bits": [4, 8]},
}


class Recorded:
    """Answers at random and keeps names with their options."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.asked: dict[str, tuple[Any, ...]] = {}
        self.answers: dict[str, Any] = {}

    def _note(self, name: str, options: tuple[Any, ...], value: Any) -> Any:
        assert name not in self.answers
        self.asked[name], self.answers[name] = options, value
        return value

    def categorical(self, name: str, choices: Sequence[Any]) -> Any:
        assert len(choices) > 1, "a question with one answer must not be asked"
        return self._note(name, tuple(choices), self.random.choice(choices))

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        assert all(isinstance(x, int) for x in (low, high, step))
        return int(self._note(name, (low, high, step), self.random.randrange(low, high + 1, step)))

    def floating(self, name: str, low: float, high: float, step: float) -> float:
        steps = self.random.randint(0, round((high - low) / step))
        return float(self._note(name, (low, high, step), low + steps * step))  # with the error that addition brings


def brute_force(techniques: dict[str, dict[str, Any]], most: int) -> int:
    """Counts by trying every ordered tuple of techniques."""
    from itertools import permutations
    from math import prod

    total = 0
    for n in range(1, most + 1):
        for names in permutations(techniques, n):
            if composition.fault(names) is None:
                total += prod(len(axis(spec)) for t in names for spec in techniques[t].values())
    return total


def subset(*names: str) -> dict[str, dict[str, Any]]:
    return {name: TECHNIQUES[name] for name in names}


@pytest.mark.parametrize("most", [1, 2, 3])
def test_size_is_exact_and_enumeration_yields_each_recipe_once(most: int) -> None:
    space = SearchSpace(TECHNIQUES, max_techniques=most)
    hashes = [recipe.hash for recipe in space.enumerate()]
    assert len(hashes) == len(set(hashes)) == space.size() == brute_force(TECHNIQUES, most)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**9), most=st.integers(1, 4), names=st.sets(st.sampled_from(sorted(TECHNIQUES)), min_size=1)
)
def test_draws_are_legal_and_have_an_inverse(seed: int, most: int, names: set[str]) -> None:
    space = SearchSpace(subset(*sorted(names)), max_techniques=most)
    suggest = Recorded(seed)
    recipe = space.sample(suggest)
    assert 1 <= len(recipe.steps) <= most
    assert composition.fault(recipe.techniques) is None
    assert all(set(step.config) == set(TECHNIQUES[step.technique]) for step in recipe.steps)
    found = space.params_of(recipe)
    assert found.keys() == suggest.answers.keys()
    assert found == pytest.approx(suggest.answers)
    assert space.sample(Answers(found)) == recipe


class Answers:
    """Answers from a dict, as a sampler does with an enqueued trial."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def categorical(self, name: str, choices: Sequence[Any]) -> Any:
        assert self.values[name] in choices
        return self.values[name]

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        return int(self.values[name])

    def floating(self, name: str, low: float, high: float, step: float) -> float:
        return float(self.values[name])


def test_every_recipe_of_the_space_survives_the_round_trip() -> None:
    space = SearchSpace(TECHNIQUES, max_techniques=2)
    for recipe in space.enumerate():
        assert space.sample(Answers(space.params_of(recipe))).hash == recipe.hash
        assert Recipe.from_json(recipe.to_json()).hash == recipe.hash


def test_a_name_always_comes_with_the_same_options() -> None:
    space = SearchSpace(TECHNIQUES, max_techniques=3)
    seen: dict[str, tuple[Any, ...]] = {}
    for seed in range(2000):
        suggest = Recorded(seed)
        space.sample(suggest)
        for name, options in suggest.asked.items():
            assert seen.setdefault(name, options) == options


def test_options_depend_on_what_was_drawn_before() -> None:
    space = SearchSpace(subset("tome", "nystrom", "weight_only"))
    seen = set()
    for seed in range(50):
        suggest = Recorded(seed)
        space.sample(suggest)
        seen |= {name for name in suggest.asked if "|" in name}
    # after tome there is no question about low-rank attention: nystrom is experimental beside it
    assert seen == {
        "token_reduction|none,tome",
        "low_rank_attention|none,nystrom",
        "quantisation|none,weight_only",
    }


def test_the_last_family_has_no_none_where_nothing_was_drawn() -> None:
    space = SearchSpace(subset("dynamic_int8", "weight_only"))
    suggest = Recorded(0)
    space.sample(suggest)
    assert suggest.asked["quantisation|dynamic_int8,weight_only"] == ("dynamic_int8", "weight_only")


def test_a_free_order_is_asked_for_and_both_orders_are_drawn() -> None:
    space = SearchSpace(subset("precision", "weight_only"))
    drawn = {space.sample(Recorded(seed)).techniques for seed in range(60)}
    assert drawn == {("precision",), ("weight_only",), ("precision", "weight_only"), ("weight_only", "precision")}


def test_several_techniques_of_one_family_where_composition_allows() -> None:
    space = SearchSpace(subset("magnitude_prune", "taylor_prune"))
    drawn = {space.sample(Recorded(seed)).techniques for seed in range(60)}
    assert ("magnitude_prune", "taylor_prune") in drawn
    assert ("taylor_prune", "magnitude_prune") in drawn


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([Step("tome", {"r": 9, "proportional": True})], "tome.r is 9"),
        ([Step("tome", {"r": 2})], "has no tome.proportional"),
        ([Step("tome", {"r": 2, "proportional": True}), Step("nystrom", {"landmarks": 8})], "outside"),
        ([Step("evit", {"keep": 0.7})], "outside"),
        ([Step("precision", {"dtype": "fp16"})], "outside"),
        ([], "outside"),
    ],
)
def test_a_recipe_outside_the_space_is_refused(steps: list[Step], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SearchSpace(TECHNIQUES).params_of(Recipe(tuple(steps)))


def test_grid_points_are_one_float_each() -> None:
    grid = Grid(0.1, 0.7, 0.2)
    assert list(grid) == [0.1, 0.3, 0.5, 0.7]
    assert list(Grid(2, 8, 3)) == [2, 5, 8]
    assert all(isinstance(value, int) for value in Grid(2, 8, 3))
    assert axis([4, 8]) == Choices((4, 8))
    assert axis({"low": 1, "high": 3, "step": 1}) == Grid(1, 3, 1)


def test_a_large_space_is_counted_without_enumerating() -> None:
    wide = {name: {f"p{i}": {"low": 0, "high": 99, "step": 1} for i in range(5)} for name in ("tome", "weight_only")}
    assert SearchSpace(wide).size() == 10**20 + 2 * 10**10
    assert next(SearchSpace(wide).enumerate()).techniques == ("weight_only",)


def test_excluded_pairs_have_reasons() -> None:
    excluded = dict(SearchSpace(TECHNIQUES).excluded())
    assert "landmarks" in excluded["tome", "nystrom"]
    assert "two weight quantisers" in excluded["dynamic_int8", "weight_only"]
    assert ("distill", "tome") not in excluded


# --- with a model -----------------------------------------------------------------------------------------------------


def tiny(device: str = "cpu", num_tokens: int = 17) -> ModelInfo:
    return ModelInfo(
        family="timm",
        name="vit",
        depth=4,
        embed_dim=64,
        head_dim=16,
        num_heads=(4,) * 4,
        mlp_hidden=(128,) * 4,
        num_tokens=num_tokens,
        num_prefix_tokens=1,
        has_class_token=True,
        has_distil_token=False,
        image_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        params=100_000,
        device=device,
    )


def study_techniques(**given: Any) -> dict[str, dict[str, Any]]:
    from orchestrator.study.techniques import resolve_techniques

    resolved, faults = resolve_techniques(given)
    assert not faults
    return resolved


def test_a_technique_infeasible_on_the_device_is_excluded() -> None:
    techniques = study_techniques(dynamic_int8=None, tome={"r": [2, 4]})
    space = SearchSpace(techniques, tiny("cuda"))
    assert {recipe.techniques for recipe in space.enumerate()} == {("tome",)}
    assert "CPU only" in dict(space.excluded())[("dynamic_int8",)]


def test_a_technique_infeasible_in_part_stays_and_its_values_are_judged() -> None:
    techniques = study_techniques(nystrom={"landmarks": [8, 16, 64], "iterations": 6})
    space = SearchSpace(techniques, tiny())
    reasons = {recipe.steps[0].config["landmarks"]: space.fault(recipe) for recipe in space.enumerate()}
    assert reasons[8] is None
    assert reasons[64] is not None
    assert space.count_infeasible() == sum(reason is not None for reason in reasons.values())
    assert space.count_infeasible(limit=1) is None


def test_what_a_model_takes_of_a_technique_in_part_is_told_with_the_commonest_reason() -> None:
    techniques = study_techniques(
        magnitude_prune={"head_ratio": {"low": 0.0, "high": 0.6, "step": 0.2}, "mlp_ratio": [0.25]}, svd=None, tome=None
    )
    rotary = replace(tiny(), block="eva.EvaBlock", attention="eva.EvaAttention")
    (found,) = SearchSpace(techniques, rotary).hindered()
    assert (found.technique, found.infeasible, found.tried) == ("magnitude_prune", 3, 4)
    said = "head_ratio=0.2: heads can be removed from timm's Attention only; here the blocks have eva.EvaAttention; must be 0"
    assert found.reason == said
    assert SearchSpace(techniques, tiny()).hindered() == []


def test_a_technique_infeasible_in_every_value_is_excluded() -> None:
    space = SearchSpace(study_techniques(nystrom={"landmarks": [64, 96]}), tiny())
    assert space.size() == 0
    assert "every other value searched" in dict(space.excluded())[("nystrom",)]
    with pytest.raises(ValueError, match="empty"):
        space.sample(Recorded(0))
