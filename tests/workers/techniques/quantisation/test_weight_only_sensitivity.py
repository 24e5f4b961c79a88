"""Sensitivity tables and mixed widths: the definition, the best allocation by brute force, one measurement a study."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.study.load import load_study
from tests.studies import tiny_study
from tests.workers.techniques.digits import full
from tests.workers.techniques.models import images, surroundings, vit
from workers import artefact
from workers.node.deadline import Deadline
from workers.node.lane import Lane
from workers.node.once import OnceAStudy
from workers.node.storage import LocalStorage
from workers.run import run_trial
from workers.tasks import load
from workers.techniques.quantisation import weight_only, weight_only_sensitivity
from workers.techniques.quantisation.shared_affine import NotQuantisable
from workers.techniques.quantisation.weight_only import Config
from workers.techniques.quantisation.weight_only_sensitivity import WIDTHS, TooFewBits, allocate, mean_width, measure
from workers.trial import Recipe, Step, TrialResult, TrialSpec

MIXED = Config(bits="mixed", mean_bits=3.0)
TABLE = f"sensitivity_weight_only_auto_32_v{weight_only.TECHNIQUE.version}_images32_bits2345678.json"


def rounding(weight: Tensor, bits: int) -> Tensor:
    return weight_only.rounded(weight, MIXED, bits)


# --- allocation -------------------------------------------------------------------------------------------------------


def best(sizes: list[int], costs: list[list[float]], mean_bits: float, widths: tuple[int, ...]) -> float:
    """The least cost, by trying everything."""
    budget = mean_bits * sum(sizes)
    return min(
        sum(costs[i][k] for i, k in enumerate(chosen))
        for chosen in product(range(len(widths)), repeat=len(sizes))
        if sum(size * widths[k] for size, k in zip(sizes, chosen, strict=True)) <= budget
    )


@pytest.mark.parametrize("seed", range(12))
def test_an_allocation_is_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    widths = (2, 3, 4, 6, 8)
    sizes = [draw.choice((3, 9, 12, 12, 7)) * 16 for _ in range(5)]
    costs = [[draw.random() ** 3 * 2.0**-w for w in widths] for _ in sizes]  # falls with the width, not everywhere
    for mean_bits in (2.5, 3.0, 4.5, 7.0, 8.0):
        found = allocate(sizes, costs, mean_bits, widths)
        assert mean_width(sizes, found) <= mean_bits
        cost = sum(c[widths.index(w)] for c, w in zip(costs, found, strict=True))
        assert cost == pytest.approx(best(sizes, costs, mean_bits, widths), rel=1e-12)


def test_sizes_without_a_common_divisor_keep_the_budget_and_come_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only_sensitivity, "UNITS", 2000)
    widths, sizes = (2, 4, 8), [10007, 20011, 5003, 997, 30011]
    costs = [[1.0 / (k + 1) ** 2 / (i + 1) for k in range(3)] for i in range(5)]
    found = allocate(sizes, costs, 4.0, widths)
    assert mean_width(sizes, found) <= 4.0
    cost = sum(c[widths.index(w)] for c, w in zip(costs, found, strict=True))
    assert best(sizes, costs, 4.0, widths) <= cost <= best(sizes, costs, 3.98, widths)


def test_a_budget_below_the_narrowest_width_is_an_error() -> None:
    with pytest.raises(TooFewBits, match=r"mean_bits=1\.5 is too small: the narrowest width has 2 bits"):
        allocate([8, 8], [[1.0] * 7] * 2, 1.5)


def test_of_equal_costs_the_narrower_ones_are_taken() -> None:
    assert allocate([8, 8], [[0.0] * 7] * 2, 8.0) == [2, 2]


# --- table ------------------------------------------------------------------------------------------------------------


def test_the_table_is_the_divergence_with_one_layer_quantised() -> None:
    model = vit()
    around = surroundings(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = measure(model, around.batches, rounding)
    assert {name: len(row) for name, row in table.items()} == dict.fromkeys(table, len(WIDTHS))
    assert len(table) == 13  # four a block, and the head
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    shown = torch.cat([batch for batch, _ in around.batches()])
    for name, bits in (("blocks.1.attn.qkv", 2), ("head", 3), ("blocks.2.mlp.fc2", 6)):
        other: Any = copy.deepcopy(model)
        layer = other.get_submodule(name)
        layer.weight.data = rounding(layer.weight, bits)
        with torch.inference_mode():
            p, q = model(shown).double().log_softmax(1), other(shown).double().log_softmax(1)
        expected = F.kl_div(q, p, log_target=True, reduction="batchmean")
        assert table[name][WIDTHS.index(bits)] == pytest.approx(float(expected), rel=1e-9, abs=1e-15)
    assert table == measure(model, around.batches, rounding)
    narrow, wide = (sum(row[WIDTHS.index(bits)] for row in table.values()) for bits in (2, 8))
    assert wide < 0.01 * narrow


def test_only_the_first_images_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only_sensitivity, "IMAGES", 12)
    model = vit()
    around = surroundings(model)
    assert [len(batch) for batch in weight_only_sensitivity._first(around.batches)] == [8, 4]
    monkeypatch.setattr(weight_only_sensitivity, "IMAGES", 100)
    assert [len(batch) for batch in weight_only_sensitivity._first(around.batches)] == [8, 8]


def test_an_output_that_is_not_finite_is_an_error_with_the_layer_s_name() -> None:
    model = vit()
    with pytest.raises(NotQuantisable, match=r"the output with blocks\.0\.attn\.qkv at 2 bits must be finite"):
        measure(model, surroundings(model).batches, lambda weight, bits: weight * float("nan"))


# --- mixed widths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean_bits", [2.5, 4.0, 8.0])
@pytest.mark.parametrize("skip_head", [False, True])
def test_mixed_widths_keep_their_budget_and_are_rebuilt(mean_bits: float, skip_head: bool) -> None:
    model, config = vit(), Config(bits="mixed", mean_bits=mean_bits, skip_head=skip_head)
    shapes = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    applied = weight_only.TECHNIQUE.apply(model, config, surroundings(model))
    widths, names = applied.resolved["widths"], applied.resolved["linears"]
    assert ("head" in names) != skip_head
    assert mean_width([shapes[n] for n in names], widths) <= mean_bits
    assert (len(set(widths)) > 1) == (mean_bits < 8)
    bits = {name: getattr(model.get_submodule(name), "bits", 8) for name in names}
    assert list(bits.values()) == widths
    skeleton = weight_only.TECHNIQUE.rebuild(vit(device="meta"), applied.resolved)
    skeleton.load_state_dict(model.state_dict(), strict=True, assign=True)
    with torch.inference_mode():
        assert torch.equal(skeleton.eval()(images()), model(images()))


def test_mixed_widths_cost_less_than_one_width() -> None:
    model = vit()
    around = surroundings(model)
    table = measure(model, around.batches, rounding)
    applied = weight_only.TECHNIQUE.apply(model, MIXED, around)
    mixed = sum(table[n][WIDTHS.index(w)] for n, w in zip(applied.changed, applied.resolved["widths"], strict=True))
    assert mixed < sum(row[WIDTHS.index(3)] for row in table.values())


def once(folder: Path, seed: int = 0) -> Any:
    split = load({"kind": "digits", "train_limit": 64}).train
    deadline = Deadline(None)

    def batches() -> Iterator[tuple[Any, torch.Tensor]]:
        for _, shown, labels in split.batches(32, shuffle_seed=0):
            yield shown, labels

    return OnceAStudy(LocalStorage(folder), "stages/b", batches, Lane("test", deadline=deadline), deadline)


def small() -> Any:
    return vit(img_size=8, patch_size=2, in_chans=1)


def test_a_study_measures_its_table_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(*args: Any) -> weight_only_sensitivity.Table:
        nonlocal calls
        calls += 1
        return measure(*args)

    monkeypatch.setattr(weight_only_sensitivity, "measure", counted)
    found = []
    for seed in (0, 1):
        model = small()
        around = replace(surroundings(model, seed), once_a_study=once(tmp_path))
        found.append(weight_only.TECHNIQUE.apply(model, MIXED, around).resolved["widths"])
    assert calls == 1
    assert found[0] == found[1]
    assert (tmp_path / "stages/b" / TABLE).exists()
    model = small()
    around = replace(surroundings(model), once_a_study=once(tmp_path))
    weight_only.TECHNIQUE.apply(model, replace(MIXED, group_size=64), around)  # another rounding is another table
    assert calls == 2
    model = small()
    around = replace(surroundings(model), once_a_study=once(tmp_path))
    model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2 = nn.Linear(32, 40), nn.Linear(40, 32)
    around.batches = once(tmp_path).batches
    weight_only.TECHNIQUE.apply(model, MIXED, around)  # pruned: a table of its own
    assert calls == 3
    assert len(list((tmp_path / "stages/b").glob("*.json"))) == 2


def test_a_table_of_another_version_number_of_images_or_widths_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def counted(*args: Any) -> weight_only_sensitivity.Table:
        nonlocal calls
        calls += 1
        return measure(*args)

    def table(version: int) -> weight_only_sensitivity.Table:
        around = replace(surroundings(model), once_a_study=once(tmp_path))
        return weight_only_sensitivity.table_for(model, around, rounding, name="of_a_test", version=version)

    monkeypatch.setattr(weight_only_sensitivity, "measure", counted)
    model = small()
    first = table(1)
    assert (table(1), calls) == (first, 1)
    assert (table(2), table(2), calls) == (first, first, 2)  # the same numbers, as nothing but the version differs
    monkeypatch.setattr(weight_only_sensitivity, "IMAGES", 16)
    assert table(2) != first
    assert calls == 3
    monkeypatch.setattr(weight_only_sensitivity, "WIDTHS", (2, 4))
    assert {len(row) for row in table(2).values()} == {2}
    assert calls == 4


def test_a_trial_with_mixed_widths(tmp_path: Path) -> None:
    context = load_study(
        tiny_study(
            objectives=["top1_pct", "size_bytes"],
            techniques={"weight_only": {"bits": [8, "mixed"], "mean_bits": [3, 5]}},
        )
    ).context()
    storage, sizes, seen = LocalStorage(tmp_path), [], []
    for mean_bits in (3.0, 5.0):
        step = full("weight_only", bits="mixed", mean_bits=mean_bits)
        result = run_trial(TrialSpec("s", "t", Recipe((step,)), 0, context, storage.url))
        assert result.status == "ok", result.failure
        assert result.conditions["simulated"] is True
        assert result.conditions["parity_exact"]
        sizes.append(result.metrics["size_bytes"])
        found = list((tmp_path / "stages" / result.stages[0].key).glob("sensitivity_*.json"))
        seen.append([(path.name, path.stat().st_mtime_ns) for path in found])
    assert sizes[0] < sizes[1]
    assert seen[0] == seen[1]  # measured once, and found again
    assert [name for name, _ in seen[0]] == [TABLE]


def test_a_recipe_that_cannot_be_quantised_is_infeasible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand-made ones: a second quantiser, and a budget below the narrowest width, as nine layers of a unit each have."""
    context = load_study(tiny_study(objectives=["top1_pct", "size_bytes"])).context()
    storage = LocalStorage(tmp_path)

    def run(*steps: Step) -> TrialResult:
        return run_trial(TrialSpec("s", "t", Recipe(steps), 0, context, storage.url))

    twice = run(full("weight_only"), full("gptq"))
    monkeypatch.setattr(weight_only_sensitivity, "UNITS", 8)
    tight = run(full("weight_only", bits="mixed", mean_bits=2.5))
    assert [result.status for result in (twice, tight)] == ["infeasible", "infeasible"]
    assert str(twice.failure).startswith("NotQuantisable: blocks.0.attn.qkv is a Int8Linear already; quantise a model")
    assert str(tight.failure).startswith("TooFewBits: mean_bits=2.5 is too small: the narrowest width has 2 bits\n")


def test_mixed_widths_survive_the_artefact(tmp_path: Path) -> None:
    from tests.workers.techniques.quantisation.test_weight_only import DATA, MODEL, build
    from workers import models

    model = build()
    around = surroundings(model)
    around.batches = once(tmp_path).batches
    applied = weight_only.TECHNIQUE.apply(model, replace(MIXED, mean_bits=4.5), around)
    steps = [{"technique": "weight_only", "version": 1, "resolved": applied.resolved}]
    artefact.save(model, tmp_path / "a", model_description=models.describe(MODEL, DATA), steps=steps)
    shown = torch.randn(3, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(artefact.load(tmp_path / "a")(shown), model(shown))
