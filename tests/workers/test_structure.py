"""What is known before training is what the trial finds: of every technique for images, exactly, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.study.load import load_study
from tests.studies import recipe, tiny_study
from tests.workers.techniques.test_contract import SAMPLES
from workers.metrics import EXACT
from workers.node.storage import LocalStorage, open_storage
from workers.run import run_trial
from workers.structure import Structures
from workers.techniques import versions
from workers.trial import Context, Recipe, TrialSpec, trial_id

WIDE = {"create": {"width": 32, "depth": 3, "heads": 4, "patch": 2, "mlp_ratio": 2.0}}
"""As the contract's models are, whose samples are asked for here."""

LEARNED = {"taylor_prune", "importance_prune", "diffrate", "diffq"}
"""Of these images or the training decide what is left: nothing is known of them before."""

COMBINED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "baseline": [],
    "student, cut and packed": [
        ("distill", {"depth": 0.75, "width": 0.75}),
        ("magnitude_prune", {"head_ratio": 0.0, "mlp_ratio": 0.25}),
        ("weight_only", {"bits": 4, "group_size": 32}),
    ],
    "one projection for all layers": [("linformer", {"k": 8, "sharing": "layers"}), ("weight_only", {"bits": 8})],
    "factors": [("svd", {"keep": 0.4}), ("dynamic_int8", {})],
    "fewer tokens in half the bits": [("tome", {"r": 2}), ("precision", {"dtype": "bf16"})],
    "low rank, calibrated": [("nystrom", {"landmarks": 4}), ("fq_vit", {"images": 64})],
    "conversions in a row": [("precision", {"dtype": "bf16"}), ("weight_only", {"bits": 3, "group_size": 32})],
    "trained in integers": [("magnitude_prune", {"mlp_ratio": 0.25, "head_ratio": 0.0}), ("lsq", {"weight_bits": 8})],
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> LocalStorage:
    return LocalStorage(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def context() -> Context:
    return load_study(tiny_study(model=WIDE)).context()


@pytest.fixture(scope="module")
def untrained(context: Context) -> Structures:
    """Knows of no storage."""
    return Structures(context)


def found(storage: LocalStorage, context: Context, wanted: Recipe) -> dict[str, float]:
    """Runs the trial and returns those of its numbers that may be known before."""
    name = trial_id(wanted, 0, context, versions())
    result = run_trial(TrialSpec("s", name, wanted, 0, context, storage.url, objectives=("size_bytes",)))
    assert result.status == "ok", result.failure
    return {name: result.metrics[name] for name in EXACT}


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in LEARNED])
def test_a_technique_is_known_exactly(
    name: str, storage: LocalStorage, context: Context, untrained: Structures
) -> None:
    wanted = recipe((name, SAMPLES[name]))
    before = untrained.facts(wanted, 0)
    assert before == found(storage, context, wanted)


@pytest.mark.parametrize("steps", COMBINED.values(), ids=list(COMBINED))
def test_a_recipe_is_known_exactly(
    steps: list[tuple[str, dict[str, Any]]], storage: LocalStorage, context: Context, untrained: Structures
) -> None:
    wanted = recipe(*steps)
    before = untrained.facts(wanted, 0)
    assert before == found(storage, context, wanted)


@pytest.mark.parametrize("name", sorted(LEARNED))
def test_what_is_learned_is_known_once_it_is_and_never_before(name: str, tmp_path: Path, context: Context) -> None:
    wanted, packed = recipe((name, SAMPLES[name])), recipe((name, SAMPLES[name]), ("precision", {}))
    storage = LocalStorage(tmp_path)
    assert Structures(context).facts(wanted, 0) == {}
    true = found(storage, context, wanted)
    later = Structures(context, open_storage(storage.url))
    assert later.facts(wanted, 0) == true
    if name != "diffq":  # whose weights are packed, which precision would convert
        assert later.facts(packed, 0) == found(storage, context, packed)


def test_a_cut_that_weights_decide_is_known_from_the_baseline_on(storage: LocalStorage, context: Context) -> None:
    wanted = recipe(
        ("magnitude_prune", {"depth_ratio": 0.3, "head_ratio": 0.0, "mlp_ratio": 0.25}), ("dynamic_int8", {})
    )
    assert Structures(context).facts(wanted, 0) == {}
    found(storage, context, Recipe())
    before = Structures(context, open_storage(storage.url)).facts(wanted, 0)
    assert before == found(storage, context, wanted)


def test_where_only_the_size_is_learned_the_rest_is_known(
    storage: LocalStorage, context: Context, untrained: Structures
) -> None:
    wanted = recipe(("tome", {"r": 2}), ("weight_only", {"bits": "mixed", "mean_bits": 4.0, "group_size": 32}))
    before = untrained.facts(wanted, 0)
    true = found(storage, context, wanted)
    assert before == {"params": true["params"], "macs": true["macs"]}


def test_what_cannot_be_done_is_not_known(untrained: Structures) -> None:
    too_wide = recipe(("linformer", {"k": 256}))
    assert untrained.facts(too_wide, 0) == {}


def test_equal_structures_are_built_and_counted_once(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight of the teacher's word changes nothing that is counted; conversions share the surgery they follow."""
    from workers.measuring import counting

    calls: list[object] = []
    count = counting.count_macs

    def counted(*given: Any) -> int:
        calls.append(given)
        return count(*given)

    monkeypatch.setattr(counting, "count_macs", counted)
    structures = Structures(context)
    conversions: list[list[tuple[str, dict[str, Any]]]] = [[], [("precision", {})], [("weight_only", {"bits": 8})]]
    all_found = [
        structures.facts(recipe(("distill", {"depth": 0.5, "alpha": alpha}), *conversion), 0)
        for alpha in (0.1, 0.5, 0.9)
        for conversion in conversions
    ]
    assert len(calls) == 1
    assert len({tuple(sorted(facts.items())) for facts in all_found}) == 3
