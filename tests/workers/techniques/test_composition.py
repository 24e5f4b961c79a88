"""What goes together: symmetric, total, with a reason for each rule, by how specific it is, and the survey's findings row by row."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations, permutations, product
from typing import Any

import pytest

from tests.probes import technique as probe
from tests.workers.techniques.models import info
from workers.techniques import NAMES, registry
from workers.techniques import composition as table
from workers.techniques.composition import fault, legal_orders, verdict
from workers.techniques.families import FAMILIES, KINDS, Family, Rule
from workers.techniques.record import Technique
from workers.techniques.rules import Table

MODEL_FAMILIES = ("timm", "vilt", "meter")


def in_family(family: str) -> tuple[str, ...]:
    return tuple(name for name in NAMES if table.family_of(name) == family)


REDUCERS = tuple(n for n in in_family("token_reduction") if n != "resolution")
LOW_RANK = in_family("low_rank_attention")
QUANTISERS = in_family("quantisation")
PRUNERS = in_family("pruning")
TRAINED_QUANTISERS = ("qat", "lsq", "diffq")


def builtin() -> dict[str, Technique]:
    return {name: registry()[name] for name in NAMES}


def added(name: str, family: str | Family = "token_reduction", *rules: Rule, **more: Any) -> dict[str, Technique]:
    """The built-in techniques and one of a package of its own."""
    new = family if isinstance(family, Family) else None
    record = replace(probe(), name=name, family=new.name if new else family, new_family=new, rules=rules, **more)
    return {**builtin(), name: record}


def verdicts(techniques: Mapping[str, Technique]) -> dict[tuple[str, str, str], Any]:
    made = Table(techniques)
    return {(a, b, f): made.verdict(a, b, f) for a, b in combinations(sorted(techniques), 2) for f in MODEL_FAMILIES}


def test_verdicts_are_symmetric_and_have_reasons() -> None:
    for a, b in product(NAMES, repeat=2):
        for model_family in MODEL_FAMILIES:
            v = verdict(a, b, model_family)
            assert v == verdict(b, a, model_family)
            assert v.kind in KINDS
            assert v.reason


def test_every_rule_speaks_of_known_things() -> None:
    known = {*NAMES, *FAMILIES}
    for holder in (*builtin().values(), *FAMILIES.values()):
        assert {name for rule in holder.rules for name in rule.others} <= known, holder.name
    for technique in builtin().values():
        assert set(technique.either_order) <= known
        assert set(technique.not_on) <= {"cpu", "cuda"}
        assert all((*technique.either_order.values(), *technique.not_on.values()))


def test_every_rule_decides_some_pair() -> None:
    whole = verdicts(builtin())
    for name, technique in builtin().items():
        for rule in technique.rules:
            less = replace(technique, rules=tuple(r for r in technique.rules if r is not rule))
            assert verdicts({**builtin(), name: less}) != whole, (name, rule)


def test_every_two_families_have_an_order_and_a_reason() -> None:
    for one, other in combinations(FAMILIES.values(), 2):
        assert other.after[one.name]
        assert other.name not in one.after


def test_every_technique_has_a_family() -> None:
    for name, technique in registry().items():
        assert table.family_of(name) == technique.family
    assert list(Table(builtin()).families) == list(FAMILIES)
    assert {technique.family for technique in builtin().values()} == set(FAMILIES)


def test_no_verdict_depends_on_the_order_in_which_rules_are_listed() -> None:
    whole = verdicts(builtin())
    for seed in range(3):
        shuffled = random.Random(seed)
        techniques = {
            name: replace(technique, rules=tuple(shuffled.sample(technique.rules, len(technique.rules))))
            for name, technique in builtin().items()
        }
        listed = shuffled.sample(list(techniques.items()), len(techniques))
        kinds = {pair: v.kind for pair, v in verdicts(dict(listed)).items()}
        assert kinds == {pair: v.kind for pair, v in whole.items()}


def test_the_most_specific_rule_decides() -> None:
    forbidden = Rule(("token_reduction",), "forbidden", "with the family")
    allowed = Rule(("tome",), "allowed", "with this one")
    limited = Rule(("tome",), "experimental", "on these models", only_on=("meter",))
    for rules in permutations((forbidden, allowed, limited)):
        made = Table(added("mine", "pruning", *rules))
        assert made.verdict("mine", "tome", "timm").reason == "with this one"
        assert made.verdict("tome", "mine", "meter").reason == "on these models"
        assert made.verdict("mine", "evit", "meter").reason == "with the family"
        assert made.verdict("mine", "fp8", "timm").reason == "no rule against it"


def test_a_technique_of_a_family_that_excludes_its_kind_may_be_an_exception() -> None:
    assert not Table(added("mine")).verdict("mine", "tome", "timm").allowed
    rule = Rule(("token_reduction",), "allowed", "it works between two of them")
    assert Table(added("mine", "token_reduction", rule)).verdict("mine", "tome", "timm").allowed


def test_rules_that_contradict_one_another_are_an_error_that_names_both() -> None:
    rule = Rule(("linformer",), "forbidden", "no")
    Table(added("mine", "token_reduction", rule))  # more specific than what linformer says of the family
    low_rank = Rule(("low_rank_attention",), "allowed", "it goes with all")
    with pytest.raises(ValueError, match="neither is more specific") as caught:
        Table(added("mine", "token_reduction", low_rank))
    for part in ("mine says that", "it goes with all", "linformer that it is", "tied to token positions"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="contradict"):
        Table(added("mine", "pruning", Rule(("tome",), "allowed", "yes"), Rule(("tome",), "forbidden", "no")))


@pytest.mark.parametrize(
    ("after", "before", "place"),
    [
        ({"pruning": "x"}, {"token_reduction": "x"}, 2),
        ({}, {"quantisation": "x"}, 6),
        ({}, {}, 7),
        ({"quantisation": "x"}, {"no such family": "x"}, 7),
    ],
)
def test_a_new_family_says_its_place(after: dict[str, str], before: dict[str, str], place: int) -> None:
    family = Family("adapters", "small layers beside the large ones", "two adapters", after, before)
    techniques = added("lora", family) | {"other": replace(added("lora", family)["lora"], name="other")}
    made = Table(techniques)
    assert list(made.families) == [*list(FAMILIES)[:place], "adapters", *list(FAMILIES)[place:]]
    assert made.verdict("lora", "other", "timm").reason == "two adapters"
    for name in NAMES:
        earlier = list(FAMILIES).index(table.family_of(name)) < place
        order = [(name, "lora")] if earlier else [("lora", name)]
        assert made.orders(["lora", name]) == made.orders([name, "lora"]) == order
        assert made.order_reason(*order[0])


@pytest.mark.parametrize(
    ("techniques", "message"),
    [
        (lambda: added("mine", "tokens"), "family must be one of distillation, "),
        (lambda: added("mine", Family("pruning", "another")), "differs from that of a built-in family"),
        (lambda: added("pruning", "token_reduction"), "must not be that of another family"),
        (
            lambda: added("mine", Family("a", "b", after={"quantisation": "x"}, before={"pruning": "x"})),
            "whose order goes in a circle: .*a",
        ),
    ],
)
def test_records_that_fit_with_nothing(techniques: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table(techniques())


def test_a_record_refuses_rules_that_say_nothing() -> None:
    with pytest.raises(ValueError, match="kind must be one of"):
        Rule(("tome",), "never", "why")
    with pytest.raises(ValueError, match="tuples of names"):
        Rule("tome", "forbidden", "why")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a reason"):
        Rule(("tome",), "forbidden", "")
    with pytest.raises(ValueError, match="must be the name of new_family"):
        replace(probe(), new_family=Family("other", "doc"))


def test_no_technique_twice() -> None:
    assert not verdict("tome", "tome").allowed
    assert legal_orders(["tome", "tome"]) == []
    assert fault(["precision", "precision"]) == "precision + precision: precision twice in one recipe"


@pytest.mark.parametrize("family", [REDUCERS, LOW_RANK, QUANTISERS], ids=["reducers", "low_rank", "quantisers"])
def test_two_of_these_families_are_forbidden(family: tuple[str, ...]) -> None:
    for a, b in combinations(family, 2):
        assert verdict(a, b).kind == "forbidden"
        assert legal_orders([a, b]) == []


def test_low_rank_attention_has_no_attention_map() -> None:
    for a, b in product(LOW_RANK, ("evit", "dynamicvit", "diffrate", "pumer")):
        assert verdict(a, b).kind == "forbidden"


def test_low_rank_attention_and_merging() -> None:
    assert verdict("nystrom", "tome").kind == "experimental"
    assert not verdict("nystrom", "tome").allowed
    assert (
        fault(["tome", "nystrom"]) == "tome + nystrom: sound only with landmarks weighted by token size (experimental)"
    )
    assert verdict("performer", "tome").allowed
    assert legal_orders(["performer", "tome"]) == [("tome", "performer")]


def test_linformer_is_tied_to_positions() -> None:
    for other in (*REDUCERS, "resolution"):
        assert verdict("linformer", other).kind == "forbidden"


def test_a_smaller_image_goes_with_a_token_reducer() -> None:
    for other in REDUCERS:
        assert legal_orders([other, "resolution"]) == [("resolution", other)]


def test_prune_before_token_reduction_and_before_quantisation() -> None:
    for pruner, other in product(PRUNERS, (*REDUCERS, *QUANTISERS)):
        if pruner == "importance_prune" and other in TRAINED_QUANTISERS:
            assert "both end with the same training" in str(fault([pruner, other]))
            continue
        if pruner == "semi_structured_prune" and other in QUANTISERS:
            assert verdict(pruner, other).kind == "experimental"
            continue
        assert fault([pruner, other]) is None
        assert str(fault([other, pruner])).startswith(f"{pruner} must come before {other}: ")


def test_factors_come_after_what_they_factorise_and_before_what_rounds_them() -> None:
    for before, after in product(("magnitude_prune", "taylor_prune"), ("svd",)):
        assert legal_orders([after, before]) == [(before, after)]
    for other in ("precision", *QUANTISERS):
        assert legal_orders([other, "svd"]) == [("svd", other)]
    for other in (*REDUCERS, *LOW_RANK):
        assert legal_orders(["svd", other]) == [(other, "svd")]
    assert verdict("importance_prune", "svd").kind == "forbidden"
    assert verdict("semi_structured_prune", "svd").kind == "experimental"


def test_sparse_weights_are_made_of_what_pruning_left() -> None:
    for pruner in ("magnitude_prune", "taylor_prune"):
        assert legal_orders(["semi_structured_prune", pruner]) == [(pruner, "semi_structured_prune")]
    assert verdict("importance_prune", "semi_structured_prune").kind == "forbidden"
    assert legal_orders(["precision", "semi_structured_prune"]) == [("semi_structured_prune", "precision")]


def test_fq_vit_with_proportional_attention() -> None:
    assert verdict("fq_vit", "tome").allowed
    assert "before the logits are quantised" in verdict("fq_vit", "tome").reason


def test_tome_in_the_image_tower_of_meter_only() -> None:
    assert verdict("tome", "pumer", "meter").allowed
    assert verdict("tome", "pumer", "vilt").kind == "forbidden"
    assert legal_orders(["pumer", "tome"], "meter") == [("tome", "pumer")]
    assert legal_orders(["pumer", "tome"]) == []


def test_device_rules() -> None:
    assert table.environment_fault(["dynamic_int8"], info(device="cuda"))
    assert table.environment_fault(["dynamic_int8"], info(device="cpu")) is None
    for name in ("evit", "dynamicvit"):  # they protect the distillation token, as they do every prefix token
        assert table.environment_fault([name], info(has_distil_token=True)) is None
    assert table.environment_fault(["tome", "weight_only"], info(device="cuda", has_distil_token=True)) is None


def test_both_orders_of_a_free_pair_are_offered() -> None:
    assert legal_orders(["weight_only", "precision"]) == [("precision", "weight_only"), ("weight_only", "precision")]
    assert legal_orders(["precision", "dynamic_int8"]) == []


def test_orders_of_a_long_recipe() -> None:
    names = ["precision", "weight_only", "tome", "distill", "magnitude_prune"]
    assert legal_orders(names) == [
        ("distill", "magnitude_prune", "tome", "precision", "weight_only"),
        ("distill", "magnitude_prune", "tome", "weight_only", "precision"),
    ]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4])
def test_legal_orders_are_those_without_a_fault(size: int) -> None:
    for names in combinations(registry(), size):
        assert set(legal_orders(names)) == {p for p in permutations(names) if fault(p) is None}


def test_distillation_comes_first() -> None:
    assert fault(["magnitude_prune", "distill"]) == (
        "distill must come before magnitude_prune: the student is chosen first, everything else changes the student"
    )
