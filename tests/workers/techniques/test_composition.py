"""The composition table: symmetric, total, with a reason for each rule, and METHODS section 6 row by row."""

from __future__ import annotations

from itertools import combinations, permutations, product

import pytest

from tests.workers.techniques.models import info
from workers.techniques import composition as table
from workers.techniques import registry
from workers.techniques.composition import fault, legal_orders, verdict
from workers.techniques.record import FAMILIES

KNOWN = tuple(table.FAMILY_OF)


def in_family(family: str) -> tuple[str, ...]:
    return tuple(n for n, f in table.FAMILY_OF.items() if f == family)


REDUCERS = tuple(n for n in in_family("token_reduction") if n != "resolution")
LOW_RANK = in_family("low_rank_attention")
QUANTISERS = in_family("quantisation")
PRUNERS = in_family("pruning")


def test_verdicts_are_symmetric_and_have_reasons() -> None:
    for a, b in product(KNOWN, repeat=2):
        for model_family in ("timm", "vilt", "meter"):
            v = verdict(a, b, model_family)
            assert v == verdict(b, a, model_family)
            assert v.kind in table.KINDS
            assert v.reason


def test_every_rule_speaks_of_known_things_and_has_a_reason() -> None:
    for rule in table.RULES:
        assert rule.reason
        assert rule.kind in table.KINDS
        assert set(rule.one + rule.other) <= {*KNOWN, *FAMILIES}
    assert all(reason for *_, reason in table.FREE + table.DEVICE_RULES)
    assert all(p.reason for p in table.PRECEDENCES)


def test_every_rule_decides_some_pair() -> None:
    def deciding(a: str, b: str) -> set[int]:
        return {next((i for i, r in enumerate(table.RULES) if r.matches(a, b, f)), -1) for f in ("timm", "meter")}

    used = set().union(*(deciding(a, b) for a, b in combinations(KNOWN, 2)))
    assert used >= set(range(len(table.RULES)))


def test_every_two_families_have_an_order_and_a_reason() -> None:
    for one, other in combinations(FAMILIES, 2):
        assert [p for p in table.PRECEDENCES if one in p.first and other in p.then], (one, other)
        assert not [p for p in table.PRECEDENCES if other in p.first and one in p.then], (one, other)


def test_registered_techniques_have_the_family_of_the_table() -> None:
    for name, technique in registry().items():
        assert table.family_of(name) == technique.family
    for a, b in combinations(registry(), 2):
        assert verdict(a, b).kind in table.KINDS


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
        if pruner == "importance_prune" and other in table.TRAINED_QUANTISERS:
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
    for name in ("evit", "dynamicvit"):  # they protect the distillation token, which METHODS asks for
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
