"""Importance against gradients taken one group at a time, the ranking by hand, and the cut against a masked model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import SwiGLU, SwiGLUPacked

from orchestrator.study.load import load_study
from tests.studies import tiny_study
from tests.workers.artefact.test_artefact import one_thread  # noqa: F401 - a fixture
from tests.workers.techniques.models import images, info, surroundings, vit
from workers import artefact
from workers.measuring.counting import count_macs
from workers.models import model_info
from workers.node.deadline import Deadline
from workers.node.lane import Lane
from workers.node.storage import LocalStorage
from workers.stages.workbench import Workbench
from workers.techniques.pruning.shared_slicing import dimensions, first_layers
from workers.techniques.pruning.taylor_prune import TECHNIQUE, Config, importance
from workers.techniques.pruning.taylor_prune_mac_budget import Queue, Sizes, spend


def sizes(**changes: Any) -> Sizes:
    facts: dict[str, Any] = {"tokens": 17, "channels": 32, "heads": [4] * 3, "head_dims": [8] * 3, "hidden": [64] * 3}
    return Sizes(**{**facts, **changes})


def groups(model: Any) -> dict[tuple[Any, ...], list[tuple[torch.Tensor, tuple[Any, ...]]]]:
    """Every group of the model as (parameter, index) pairs, written down one by one."""
    found: dict[tuple[Any, ...], list[tuple[torch.Tensor, tuple[Any, ...]]]] = {}
    for i, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        H, D = attn.num_heads, attn.head_dim
        for h in range(H):
            rows = [slice((j * H + h) * D, (j * H + h + 1) * D) for j in range(3)]
            found["heads", i, h] = [(attn.qkv.weight, (r,)) for r in rows] + [(attn.qkv.bias, (r,)) for r in rows]
            found["heads", i, h].append((attn.proj.weight, (slice(None), slice(h * D, (h + 1) * D))))
            for d in range(D):
                q, k, v = ((j * H + h) * D + d for j in range(3))
                found["qk", i, h, d] = [(p, (r,)) for p in (attn.qkv.weight, attn.qkv.bias) for r in (q, k)]
                found["v", i, h, d] = [(attn.qkv.weight, (v,)), (attn.qkv.bias, (v,))]
                found["v", i, h, d].append((attn.proj.weight, (slice(None), h * D + d)))
        for m in range(mlp.fc1.out_features):
            found["hidden", i, m] = [
                (mlp.fc1.weight, (m,)), (mlp.fc1.bias, (m,)), (mlp.fc2.weight, (slice(None), m)),
            ]  # fmt: skip
    for c in range(model.embed_dim):
        parts = []
        for name, p in model.named_parameters():
            for axis, size in enumerate(p.shape):
                patch = name.startswith("patch_embed")
                if size == model.embed_dim and (not patch or axis == 0) and not ("qkv" in name and axis == 0):
                    parts.append((p, (*[slice(None)] * axis, c)))
                    break
        found["channels", c] = parts
    return found


@pytest.mark.parametrize("variant", ["class", "distil", "registers", "layerscale"])
def test_importance_is_the_squared_first_order_change(variant: str) -> None:
    """40 channels; the columns of proj are 40 too and are told apart by their axis."""
    model = vit(variant, qkv_bias=True, embed_dim=40, num_heads=4, mlp_ratio=1.2)
    found = importance(model, surroundings(model), 2)
    want: dict[tuple[Any, ...], float] = {}
    for batch, labels in surroundings(model).batches():
        model.zero_grad()
        F.cross_entropy(model(batch), labels).backward()
        for key, parts in groups(model).items():
            change = sum(float((p.detach()[index] * p.grad[index]).double().sum()) for p, index in parts)
            want[key] = want.get(key, 0.0) + change**2
    for key, value in want.items():
        kind, *index = key
        measured = getattr(found, kind)
        for i in index:
            measured = measured[i]
        assert float(measured) == pytest.approx(value, rel=1e-3, abs=1e-9), key


@pytest.mark.parametrize("variant", ["distil", "registers", "average", "layerscale", "qk_norm"])
def test_importance_is_what_the_loss_says_when_a_group_is_scaled(variant: str) -> None:
    """d/ds L(s w) at s = 1 is sum w dL/dw: taken from losses alone, with a step to either side."""
    model = vit(variant, qkv_bias=True).double()
    around = surroundings(model)
    around.batches = lambda: ((x.double(), y) for x, y in surroundings(model).batches())
    found = importance(model, around, 2)

    def slope(parts: list[tuple[torch.Tensor, tuple[Any, ...]]], batch: torch.Tensor, labels: torch.Tensor) -> float:
        losses, step = [], 1e-5
        for factor in (1 + step, 1 - step):
            kept = [p[index].clone() for p, index in parts]
            for (p, index), old in zip(parts, kept, strict=True):
                p[index] = factor * old
            losses.append(float(F.cross_entropy(model(batch), labels)))
            for (p, index), old in zip(parts, kept, strict=True):
                p[index] = old
        return (losses[0] - losses[1]) / (2 * step)

    some = [("heads", 0, 1), ("heads", 2, 3), ("qk", 1, 2, 5), ("v", 2, 0, 7), ("hidden", 1, 40), ("hidden", 0, 63)]
    known = groups(model)
    with torch.no_grad():
        for kind, *index in some:
            want = sum(slope(known[(kind, *index)], *batch) ** 2 for batch in around.batches())
            measured = getattr(found, kind)
            for i in index:
                measured = measured[i]
            assert float(measured) == pytest.approx(want, rel=1e-4, abs=1e-12), (kind, *index)


@pytest.mark.parametrize("mlp", [SwiGLUPacked, SwiGLU], ids=["packed", "apart"])
def test_a_gated_dimension_is_worth_what_the_loss_says(mlp: Any) -> None:
    """d/ds L(s w), w all weights and biases of the dimension and of its gate: their sum of w dL/dw."""
    model: Any = vit()
    generator = torch.Generator().manual_seed(3)
    for block in model.blocks:
        block.mlp = mlp(32, 64)
        for parameter in block.mlp.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.double()
    around = surroundings(model)
    around.batches = lambda: ((x.double(), y) for x, y in surroundings(model).batches())
    found = importance(model, around, 1, ("hidden",)).hidden[1]
    block, (batch, labels) = model.blocks[1].mlp, next(iter(around.batches()))
    hidden, unit, losses = block.fc2.in_features, 7, []
    with torch.no_grad():
        for factor in (1 + 1e-5, 1 - 1e-5):
            scaled = copy.deepcopy(model)
            part = scaled.blocks[1].mlp
            part.fc2.weight[:, unit] *= factor
            for layer in first_layers(part).values():
                for row in range(unit, layer.out_features, hidden):
                    layer.weight[row] *= factor
                    layer.bias[row] *= factor
            losses.append(float(F.cross_entropy(scaled(batch), labels)))
    assert found.shape == (hidden,)
    assert float(found[unit]) == pytest.approx(((losses[0] - losses[1]) / 2e-5) ** 2, rel=1e-4)


def test_the_budget_of_a_gated_model_is_its_macs() -> None:
    model: Any = vit()
    for block in model.blocks:
        block.mlp = SwiGLUPacked(32, 64)
    outside = 16 * 3 * 4 * 4 * 32 + 32 * 5
    sizes = Sizes(17, 32, [4] * 3, [8] * 3, [32] * 3, model_info(model).mlp_matrices)
    assert sizes.macs() == count_macs(model, (1, 3, 16, 16)) - outside
    for ratio in (0.1, 0.2):
        pruned = TECHNIQUE.apply(
            copy.deepcopy(model), Config(ratio=ratio, dimensions="mlp", batches=1), surroundings(model)
        )
        left = (count_macs(pruned.model, (1, 3, 16, 16)) - outside) / sizes.macs()
        assert 1 - ratio - 0.1 < left <= 1 - ratio


def test_measuring_leaves_no_trace() -> None:
    model = vit().train()
    weights = copy.deepcopy(model.state_dict())
    importance(model, surroundings(model), 1)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_first_order_change_predicts_the_loss_without_a_unit() -> None:
    """For a small weight the importance is the square of what the loss really changes by."""
    model = vit().double()
    model.blocks[1].mlp.fc2.weight.data[:, 5] *= 1e-4
    model.blocks[1].mlp.fc1.weight.data[5] = 0
    model.blocks[1].mlp.fc1.bias.data[5] = 1.0
    batch, labels = images(8).double(), torch.arange(8) % 5
    loss = F.cross_entropy(model(batch), labels)
    loss.backward()
    column = model.blocks[1].mlp.fc2.weight
    change = float((column.detach()[:, 5] * column.grad[:, 5]).sum())
    with torch.no_grad():
        column[:, 5] = 0
        less = float(F.cross_entropy(model(batch), labels) - loss)
    assert less == pytest.approx(-change, rel=1e-2)


def test_macs_are_those_of_the_counter() -> None:
    model = vit()
    whole, block_macs = count_macs(model, (1, 3, 16, 16)), sizes().macs()
    # Patch embedding and classifier come on top.
    assert whole - block_macs == 16 * 3 * 16 * 32 + 32 * 5
    changed = sizes(channels=24, heads=[4, 2, 1], head_dims=[8, 4, 8], hidden=[64, 8, 16])
    assert changed.macs() == sum(
        4 * 17 * 24 * a + 2 * 17 * 17 * a + 2 * 17 * 24 * m for a, m in ((32, 64), (8, 8), (8, 16))
    )


@pytest.mark.parametrize(("kind", "block"), [("heads", 1), ("head_dims", 1), ("hidden", 2), ("channels", 0)])
def test_a_unit_saves_what_it_costs(kind: str, block: int) -> None:
    some = sizes(heads=[4, 3, 2], head_dims=[8, 8, 4], hidden=[64, 8, 16])
    before, told = some.macs(), some.saved(kind, block)
    some.remove(kind, block, 1)
    assert before - some.macs() == told


def test_ranking_by_hand() -> None:
    """Two blocks of one head and four dimensions a multiple; a dimension of 100 MACs, block 1's is worth ten times as much."""
    some = Sizes(tokens=1, channels=50, heads=[1, 1], head_dims=[8, 8], hidden=[12, 10])
    first = Queue("hidden", 0, [0, 1, 2, 3, 4, 6, 8, 10, 12, 99, 99, 99, 99], 4)
    second = Queue("hidden", 1, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100], 4)
    assert [first.next(), second.next()] == [4, 2]  # 10 is no multiple of 4: two go first
    start = some.macs()
    spend(some, [first, second], start - 500, 1.0)
    assert (some.hidden, first.taken, second.taken) == ([4, 10], 8, 0)
    spend(some, [first, second], start - 900, 1.0)
    assert some.hidden == [4, 8]
    assert first.next() == 0  # one multiple stays
    spend(some, [first, second], 0, 1.0)
    assert some.hidden == [4, 4]


def test_what_costs_more_goes_first_where_cost_counts() -> None:
    """A head worth 3 saves 2000 MACs, a dimension worth 2 saves 100."""

    def left(cost_weight: float) -> tuple[list[int], list[int]]:
        some = Sizes(tokens=1, channels=50, heads=[2], head_dims=[8], hidden=[2])
        spend(some, [Queue("heads", 0, [0, 3, 9], 1), Queue("hidden", 0, [0, 2, 9], 1)], some.macs() - 1, cost_weight)
        return some.heads, some.hidden

    assert left(0.0) == ([2], [1])
    assert left(1.0) == ([1], [2])


@pytest.mark.parametrize("kinds", ["mlp", "heads+mlp", "heads+head_dims+mlp", "all"])
@pytest.mark.parametrize("steps", [1, 4])
def test_budget_is_met_with_multiples(kinds: str, steps: int) -> None:
    model = vit(qkv_bias=True)
    before = sizes().macs()
    config = Config(ratio=0.35, dimensions=kinds, steps=steps, batches=1, round_to=4)
    assert TECHNIQUE.check(model_info(model), config) is None
    applied = TECHNIQUE.apply(model, config, surroundings(model))
    counts = applied.resolved
    assert applied.changed
    assert counts == dimensions(model)
    assert all(n % 4 == 0 for n in [counts["channels"], *counts["head_dims"], *counts["hidden"]])
    after = sizes(**counts).macs()
    # At most one unit too many a step.
    assert 0.65 - 0.12 < after / before <= 0.65
    assert model(images()).shape == (4, 5)


@pytest.mark.parametrize("kinds", ["heads+mlp", "all"])
def test_macs_and_bytes_fall_as_counted(kinds: str, tmp_path: Path) -> None:
    model, whole = vit(qkv_bias=True), vit(qkv_bias=True)
    config = Config(ratio=0.5, dimensions=kinds, batches=1, round_to=1)
    counts = TECHNIQUE.apply(model, config, surroundings(model)).resolved
    C, widths = counts["channels"], [h * d for h, d in zip(counts["heads"], counts["head_dims"], strict=True)]
    assert len(set(widths)) > 1  # the blocks differ
    assert count_macs(model, (1, 3, 16, 16)) - sizes(**counts).macs() == 16 * 48 * C + 5 * C
    # qkv, proj, fc1 and fc2 with their biases and two norms a block; patches, class token, positions, norm, classifier.
    blocks = sum(
        A * (4 * C + 3) + C + M * (2 * C + 1) + C + 4 * C for A, M in zip(widths, counts["hidden"], strict=True)
    )
    numbers = blocks + 49 * C + C + 17 * C + 2 * C + 5 * C + 5
    spent = []
    for name, some in (("pruned", model), ("whole", whole)):
        files = artefact.pack(some, model_description={}, steps=[])
        data = files[artefact.TENSORS]
        spent.append(len(data) - 8 - int.from_bytes(data[:8], "little"))
        assert json.loads(files[artefact.MANIFEST])["tensors"]["bytes"] == len(data), name
    assert spent == [4 * numbers, 4 * sum(p.numel() for p in whole.parameters())]
    assert spent[0] < 0.65 * spent[1]


def test_blocks_that_do_nothing_lose_most() -> None:
    model = vit(qkv_bias=True)
    for part in (model.blocks[1].attn.proj, model.blocks[1].mlp.fc2):
        part.weight.data *= 1e-3
    counts = TECHNIQUE.apply(model, Config(ratio=0.3, batches=2), surroundings(model)).resolved
    assert counts["heads"][1] == 1
    assert counts["hidden"][1] == 8
    assert counts["heads"][0] + counts["heads"][2] > 6


def test_removing_what_is_never_read_changes_nothing() -> None:
    """Heads and MLP dimensions whose output is not read are found and removed, whatever kind they are."""
    model = vit(qkv_bias=True)
    for block in model.blocks:
        block.attn.proj.weight.data[:, 8:16] = 0
        block.mlp.fc2.weight.data[:, :32] = 0
    dense = copy.deepcopy(model)
    target = 1 - sizes(heads=[3] * 3, hidden=[32] * 3).macs() / sizes().macs()
    config = Config(ratio=int(target * 20) / 20, batches=2, cost_weight=0.0)
    counts = TECHNIQUE.apply(model, config, surroundings(model)).resolved
    assert counts["hidden"] != [64] * 3
    torch.testing.assert_close(model(images()), dense(images()), atol=1e-5, rtol=1e-5)


def test_one_step_and_many_differ_and_each_is_repeatable() -> None:
    def pruned(steps: int) -> Any:
        model = vit(qkv_bias=True)
        config = Config(ratio=0.6, dimensions="all", steps=steps, batches=2, round_to=1)
        return TECHNIQUE.apply(model, config, surroundings(model)).resolved

    assert pruned(4) == pruned(4)
    assert pruned(1) != pruned(4)


def test_a_trial_measures_on_training_images_in_an_order_of_its_seed(tmp_path: Path) -> None:
    context = load_study(tiny_study()).context()

    def shown(seed: int) -> list[torch.Tensor]:
        deadline = Deadline(None)
        lane, device = Lane("cpu", deadline=deadline), torch.device("cpu")
        bench = Workbench(context, seed, LocalStorage(tmp_path), device, lane, deadline, {})
        batches = [x for x, _ in bench.surroundings().batches()]
        want = torch.cat([x for _, x, _ in bench.task.train.batches(64)])
        got = torch.cat(batches)
        assert got.shape == want.shape
        assert sorted(map(tuple, got.flatten(1).tolist())) == sorted(map(tuple, want.flatten(1).tolist()))
        return batches

    first, again, other = shown(0), shown(0), shown(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_check_and_trains() -> None:
    assert TECHNIQUE.check(info(), Config()) is None
    assert TECHNIQUE.check(info(), Config(ratio=0.0)) == "ratio=0 removes nothing"
    assert TECHNIQUE.check(info(), Config(ratio=0.6, dimensions="mlp", round_to=16)) == (
        "ratio=0.6 is out of reach: mlp with round_to=16 are at most 0.33 of the blocks' MACs"
    )
    told = str(TECHNIQUE.check(info(has_qk_norm=True), Config(dimensions="all")))
    assert told.endswith("none of which can be removed; must be mlp or heads+mlp")
    assert TECHNIQUE.trains(Config())
    assert not TECHNIQUE.trains(Config(ratio=0.0))


def test_refusals_of_the_model() -> None:
    normed, pooled = vit("qk_norm"), vit(global_pool="map", class_token=False)
    with pytest.raises(ValueError, match="taylor_prune: head_dims: queries and keys are normalised"):
        TECHNIQUE.apply(normed, Config(dimensions="heads+head_dims+mlp"), surroundings(normed))
    with pytest.raises(ValueError, match="taylor_prune: channels: the model pools by attention"):
        TECHNIQUE.apply(pooled, Config(dimensions="all"), surroundings(pooled))
