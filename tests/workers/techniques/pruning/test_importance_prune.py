"""Gates by hand, masked against cut, and what becomes of them in a training beside other techniques."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orchestrator.study.load import load_study
from tests.studies import tiny_study
from tests.workers.artefact.test_artefact import one_thread  # noqa: F401 - a fixture
from tests.workers.techniques.models import VARIANTS, images, info, surroundings, vit
from tests.workers.techniques.test_contract import SAMPLES
from workers import artefact, evaluation, models, tasks
from workers.measuring.counting import count_macs
from workers.models import model_info
from workers.node.storage import LocalStorage
from workers.run import run_trial
from workers.techniques import registry
from workers.techniques.composition import legal_orders
from workers.techniques.pruning.importance_prune import CLOSE_AT, TECHNIQUE, Config
from workers.techniques.pruning.importance_prune_gates import Gate, HeadGates, open_gates
from workers.techniques.record import LossInputs, Technique, make_config
from workers.training import loop
from workers.trial import Recipe, Step, TrialSpec

ALL = Config(head_ratio=0.5, mlp_ratio=0.5, head_dim_ratio=0.5, round_to=4)
NORMED = Config(head_ratio=0.5, mlp_ratio=0.5, round_to=4)

Steps = list[tuple[Technique, Any]]


def gated(variant: str = "class", config: Config = ALL, **changes: Any) -> Any:
    model = vit(variant, qkv_bias=True, **changes)
    return TECHNIQUE.apply(model, config, surroundings(model)).model


def shaken(model: Any, seed: int = 0) -> Any:
    """Gives every gate a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    for gate in {m for m in model.modules() if isinstance(m, Gate)}:
        gate.weight.data = 0.3 + torch.rand(gate.weight.shape, generator=generator)
    return model


def train(model: Any, steps: Steps, count: int = 4, teacher: Any = None) -> None:
    """A training as the recovery does it, on a few images of noise."""
    model.train()
    own = [g for t, c in steps if t.parameter_groups for g in t.parameter_groups(model, c)]
    claimed = {id(p) for g in own for p in g["params"]}
    rest = [p for p in model.parameters() if id(p) not in claimed]
    optimizer = torch.optim.AdamW([{"params": rest}, *own], lr=1e-3)
    batch, labels = images(8), torch.arange(8) % 5
    for step in range(count):
        for technique, config in steps:
            if technique.on_progress is not None:
                technique.on_progress(model, config, step / count)
        logits = model(batch)
        logits = logits[0] if isinstance(logits, tuple) else logits
        told = torch.zeros(8, 5) if teacher is not None else None
        inputs = LossInputs(model, batch, logits, labels, told, step / count, teacher=teacher)
        terms = [t.loss(inputs, c) for t, c in steps if t.loss is not None]
        optimizer.zero_grad()
        (F.cross_entropy(logits, labels) + sum(term.extra for term in terms)).backward()
        optimizer.step()
    model.eval()


def test_gates_above_one_threshold_stay_open() -> None:
    scores = [torch.tensor([0.9, 0.1, 0.8, 0.2]), torch.tensor([0.7, 0.3, 0.05, 0.04])]
    assert [m.tolist() for m in open_gates(scores, 0.5, 1)] == [[True, False, True, False], [True, True, False, False]]
    scores[1] *= 0.1
    assert [int(m.sum()) for m in open_gates(scores, 0.5, 1)] == [4, 1]  # never none
    assert [int(m.sum()) for m in open_gates(scores, 0.25, 1)] == [4, 2]
    assert [int(m.sum()) for m in open_gates(scores, 0.25, 4)] == [4, 4]
    assert [int(m.sum()) for m in open_gates(scores, 0.0, 4)] == [4, 4]


def test_counts_of_a_block_are_multiples() -> None:
    scores = [torch.arange(20.0), 20 + torch.arange(20.0), torch.arange(5.0)]
    masks = open_gates(scores, 0.4, 8)
    assert [int(m.sum()) for m in masks] == [8, 20, 5]  # 7, 20 and 0 above the threshold
    assert masks[0].nonzero()[:, 0].tolist() == list(range(12, 20))


@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_thresholds_are_those_of_a_slow_ranking(round_to: int) -> None:
    """Every gate in one list, best first; then each block by hand."""
    generator = torch.Generator().manual_seed(round_to)
    for ratio in (0.1, 0.35, 0.6, 0.9):
        scores = [torch.rand(n, generator=generator) * scale for n, scale in ((24, 1.0), (16, 0.6), (20, 1.5))]
        everything = sorted((float(s), i) for i, block in enumerate(scores) for s in block)[::-1]
        best = everything[: round(60 * (1 - ratio))]
        for i, (block, mask) in enumerate(zip(scores, open_gates(scores, ratio, round_to), strict=True)):
            above = sum(of == i for _, of in best)
            wanted = {k * round_to for k in range(1, 25)} | {len(block)}
            allowed = [n for n in wanted if n <= len(block)]
            nearest = min(abs(n - above) for n in allowed)
            left = int(mask.sum())
            assert left in allowed
            assert abs(left - above) == nearest or (left == round_to and above < round_to)
            assert not block[~mask].numel() or block[mask].min() > block[~mask].max()


def test_factors_are_soft_in_training_and_hard_otherwise() -> None:
    gate = Gate(3)
    gate.weight.data = torch.tensor([0.5, 2.0, 1.0])
    gate.is_open[0] = False
    assert gate.train()(torch.ones(3)).tolist() == [0.5, 2.0, 1.0]
    assert gate.eval()(torch.ones(3)).tolist() == [0.0, 2.0, 1.0]
    gate.closed = True
    assert gate.train()(torch.ones(3)).tolist() == [0.0, 2.0, 1.0]


def test_values_are_multiplied_by_both_gates() -> None:
    heads, dims = Gate(2), Gate(3)
    heads.weight.data = torch.tensor([2.0, 3.0])
    dims.weight.data = torch.tensor([1.0, 10.0, 100.0])
    out = HeadGates(heads, dims, 2)(torch.ones(1, 1, 6))
    assert out.flatten().tolist() == [2, 20, 200, 3, 30, 300]


@pytest.mark.parametrize("variant", VARIANTS)
def test_open_gates_of_one_change_nothing_in_training(variant: str) -> None:
    config = NORMED if variant == "qk_norm" else ALL
    model = gated(variant, config).train()
    torch.testing.assert_close(model(images()), vit(variant, qkv_bias=True)(images()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kinds", ["all", "heads", "dims", "mlp"])
def test_the_cut_changes_nothing_that_is_computed(variant: str, kinds: str) -> None:
    """Closed gates, open ones of other values than 1, biases, and what is left is smaller."""
    config = {
        "all": NORMED if variant == "qk_norm" else ALL,
        "heads": Config(head_ratio=0.5, mlp_ratio=0.0),
        "dims": Config(head_ratio=0.0, mlp_ratio=0.0, head_dim_ratio=0.5, round_to=4),
        "mlp": Config(head_ratio=0.0, mlp_ratio=0.5),
    }[kinds]
    if variant == "qk_norm" and kinds == "dims":
        with pytest.raises(ValueError, match="queries and keys are normalised"):
            gated(variant, config)
        return
    model = shaken(gated(variant, config))
    assert TECHNIQUE.on_progress is not None
    assert TECHNIQUE.finalise is not None
    TECHNIQUE.on_progress(model, config, 0.4)
    masked, before = model(images()), sum(p.numel() for p in model.parameters())
    resolved = TECHNIQUE.finalise(model, config)
    torch.testing.assert_close(model(images()), masked, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < 0.9 * before
    assert not [m for m in model.modules() if isinstance(m, Gate | HeadGates)]
    assert resolved["gates"] is None
    assert len(set(resolved["heads"])) > 1 or sum(resolved["heads"]) == (6 if config.head_ratio else 12)
    skeleton = TECHNIQUE.rebuild(vit(variant, qkv_bias=True, device="meta"), json.loads(json.dumps(resolved)))
    skeleton.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, strict=True, assign=True)
    assert torch.equal(skeleton.eval()(images()), model(images()))


def test_blocks_keep_different_numbers() -> None:
    model = gated(config=NORMED)
    assert TECHNIQUE.on_progress is not None
    assert TECHNIQUE.finalise is not None
    for i, block in enumerate(model.blocks):
        block.attn.norm.heads.weight.data = torch.tensor([1.0, 0.9, 0.8, 0.7]) - 0.5 * i
        block.mlp.norm.weight.data = torch.linspace(1.0, 0.5, 64) * (1 - 0.4 * i)
    TECHNIQUE.on_progress(model, NORMED, 0.0)
    resolved = TECHNIQUE.finalise(model, NORMED)
    assert resolved["heads"] == [4, 2, 1]  # 6 of 12 by the threshold, and none loses all
    assert resolved["hidden"] == [64, 32, 4]
    assert model_info(model).num_heads == (4, 2, 1)
    assert model(images()).shape == (4, 5)


def test_negative_gates_count_by_their_size() -> None:
    model = gated(config=NORMED)
    assert TECHNIQUE.on_progress is not None
    gate = model.blocks[0].mlp.norm
    gate.weight.data[:32] = -2.0
    TECHNIQUE.on_progress(model, NORMED, 0.0)
    assert bool(gate.is_open[:32].all())


def test_penalty_is_the_sum_of_all_gates_and_ends() -> None:
    model = shaken(gated()).train()
    assert TECHNIQUE.loss is not None
    logits = model(images())

    def extra(progress: float) -> torch.Tensor:
        assert TECHNIQUE.loss is not None
        return TECHNIQUE.loss(LossInputs(model, images(), logits, torch.arange(4), None, progress), ALL).extra

    total = sum(m.weight.abs().sum() for m in set(model.modules()) if isinstance(m, Gate))
    torch.testing.assert_close(extra(0.0), 1e-4 * total)
    assert float(extra(CLOSE_AT)) == 0.0
    extra(0.0).backward()
    torch.testing.assert_close(model.blocks[0].mlp.norm.weight.grad, torch.full((64,), 1e-4))


def test_gates_have_their_own_group_and_learn() -> None:
    model = gated()
    assert TECHNIQUE.parameter_groups is not None
    (group,) = TECHNIQUE.parameter_groups(model, ALL)
    assert {id(p) for p in group["params"]} == {id(m.weight) for m in model.modules() if isinstance(m, Gate)}
    assert group["weight_decay"] == 0.0
    train(model, [(TECHNIQUE, ALL)])
    assert all(bool((p != 1).any()) for p in group["params"])


def test_gate_gradient_is_that_of_a_finite_difference() -> None:
    model = shaken(gated()).double().train()
    labels = torch.arange(4)
    loss = F.cross_entropy(model(images().double()), labels)
    loss.backward()
    for gate in (model.blocks[0].attn.norm.heads, model.blocks[1].attn.norm.dims, model.blocks[2].mlp.norm):
        told, step = float(gate.weight.grad[1]), 1e-6
        with torch.no_grad():
            gate.weight[1] += step
            more = float(F.cross_entropy(model(images().double()), labels))
            gate.weight[1] -= 2 * step
            less = float(F.cross_entropy(model(images().double()), labels))
            gate.weight[1] += step
        assert (more - less) / (2 * step) == pytest.approx(told, rel=1e-4, abs=1e-8)


def test_what_is_closed_stays_closed_while_the_rest_is_trained() -> None:
    model = shaken(gated())
    assert TECHNIQUE.on_progress is not None
    TECHNIQUE.on_progress(model, ALL, 0.49)
    mask = model.blocks[0].mlp.norm.is_open.clone()
    TECHNIQUE.on_progress(model, ALL, 0.5)
    model.blocks[0].mlp.norm.weight.data = 1 - mask.float()  # would be the other way round
    TECHNIQUE.on_progress(model, ALL, 0.9)
    assert torch.equal(model.blocks[0].mlp.norm.is_open, mask)
    model.train()
    model(images()).sum().backward()
    closed = ~model.blocks[0].mlp.norm.is_open
    assert not model.blocks[0].mlp.fc2.weight.grad[:, closed].any()
    assert model.blocks[0].mlp.norm.closed


def test_a_training_that_goes_on_elsewhere_is_the_same() -> None:
    """What the second half needs lies in the state dict: the gates that are open."""
    model = shaken(gated())
    assert TECHNIQUE.on_progress is not None
    TECHNIQUE.on_progress(model, ALL, 0.4)
    other = gated()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    for m in (model, other):
        TECHNIQUE.on_progress(m, ALL, 0.6)
        m.train()
    torch.testing.assert_close(model(images()), other(images()), rtol=0, atol=0)


DIGITS = {"kind": "digits", "train_limit": 640, "search_limit": 200}
CREATE = {"patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 4, "pos_embed_std": 0.5}
SETTINGS = {
    "epochs": 6, "batch_size": 32, "lr": 3e-3, "weight_decay": 0.05, "warmup_fraction": 0.1,
    "optimizer": "adamw", "schedule": "one_cycle",
}  # fmt: skip


def test_gates_fall_under_the_penalty_and_the_cut_model_has_learnt() -> None:
    """Digits. The harder the penalty, the smaller the gates; what is cut is what was evaluated, smaller and as trained."""
    task = tasks.load(DIGITS)
    torch.manual_seed(0)
    baseline: Any = models.build({"family": "timm", "name": None, "create": CREATE}, task.info)
    loop.train(baseline, task.train, SETTINGS, seed=0, device="cpu")

    def correct(model: Any) -> int:
        return evaluation.evaluate(model, task.search, device="cpu").correct

    assert correct(baseline) > 120
    gates = []
    for l1 in (0.0, 1e-3):
        model = copy.deepcopy(baseline)
        config = Config(head_ratio=0.5, mlp_ratio=0.5, l1=l1)
        TECHNIQUE.apply(model, config, surroundings(model))
        before = correct(model)
        loop.train(model, task.train, {**SETTINGS, "epochs": 3}, seed=0, device="cpu", steps=[(TECHNIQUE, config)])
        found = [block.mlp.norm for block in model.blocks]
        weights, is_open = (torch.cat([getattr(gate, n).detach() for gate in found]) for n in ("weight", "is_open"))
        gates.append(float(weights.abs().mean()))
        assert weights[is_open].abs().mean() > weights[~is_open].abs().mean()
        recovered = correct(model)
        assert recovered > before + 10
        assert TECHNIQUE.finalise is not None
        counts = TECHNIQUE.finalise(model, config)
        assert correct(model) == recovered
        assert sum(counts["heads"]) == 4
        assert sum(counts["hidden"]) <= 0.5 * 256 + 8
        C, widths, N = 32, [8 * h for h in counts["heads"]], 17
        told = sum(4 * N * C * A + 2 * N * N * A + 2 * N * C * M for A, M in zip(widths, counts["hidden"], strict=True))
        assert count_macs(model, (1, 1, 8, 8)) == told + 16 * 4 * C + C * 10
    assert gates[0] > 1.1 * gates[1]


def test_a_trial_cuts_what_its_gates_close(tmp_path: Path) -> None:
    """Through all stages: the artefact of the recovery is that of a smaller model and holds no gate."""
    context = load_study(tiny_study(objectives=["top1_pct", "size_bytes"])).context()
    storage = LocalStorage(tmp_path)
    given = {
        "taylor_prune": {"ratio": 0.2, "dimensions": "mlp", "batches": 2, "round_to": 4},
        "importance_prune": {"head_ratio": 0.5, "mlp_ratio": 0.4, "round_to": 4},
        "tome": {"r": 1},
        "dynamic_int8": {},
    }
    recipe = Recipe(tuple(Step(name, asdict(registry()[name].Config(**c))) for name, c in given.items()))
    result = run_trial(TrialSpec("s", "t", recipe, 0, context, storage.url))
    assert result.status == "ok", result.failure
    assert result.conditions["parity_exact"]
    assert [s.kind for s in result.stages] == ["baseline", "surgery", "recovery", "conversion"]
    folders = {s.kind: tmp_path / "stages" / s.key for s in result.stages}
    steps = {s["technique"]: s["resolved"] for s in artefact.manifest(folders["recovery"])["steps"]}
    taylor, own = steps["taylor_prune"], steps["importance_prune"]
    assert own["gates"] is None
    assert sum(own["heads"]) == 2
    assert sum(own["hidden"]) < sum(taylor["hidden"]) < 64
    sizes = {kind: artefact.size_bytes(folder) for kind, folder in folders.items()}
    assert sizes["conversion"] < sizes["recovery"] < sizes["baseline"]
    loaded: Any = artefact.load(folders["conversion"])
    assert [block.attn.num_heads for block in loaded.blocks] == own["heads"]
    assert not [m for m in loaded.modules() if isinstance(m, Gate | HeadGates)]


def partners() -> list[str]:
    return [
        name
        for name, technique in registry().items()
        if name in SAMPLES
        and name != "importance_prune"
        and technique.stage == "surgery"
        and legal_orders(("importance_prune", name))
    ]


def test_most_techniques_are_partners() -> None:
    assert {"distill", "magnitude_prune", "taylor_prune", "tome", "nystrom", "performer"} <= set(partners())


@pytest.mark.parametrize("partner", partners())
def test_trained_and_cut_beside_another_technique(partner: str) -> None:
    """As a recipe does it: apply both, train with the hooks of both, finalise, and build the structure again from the record."""
    names = legal_orders(("importance_prune", partner))[0]
    model, teacher, steps, records = vit(qkv_bias=True), vit(qkv_bias=True), [], []
    for name in names:
        technique = registry()[name]
        config = make_config(technique.Config, SAMPLES[name])
        if name == "importance_prune":
            config = ALL
        around = surroundings(model)
        applied = technique.apply(model, config, around)
        model = applied.model
        steps.append((technique, config))
        records.append(applied.resolved)
    train(model, steps, teacher=teacher)
    before = model(images())
    for i, (technique, config) in enumerate(steps):
        if technique.finalise is not None:
            records[i] = {**records[i], **technique.finalise(model, config)}
    skeleton: nn.Module = vit(qkv_bias=True, device="meta")
    for (technique, _), resolved in zip(steps, records, strict=True):
        skeleton = technique.rebuild(skeleton, json.loads(json.dumps(resolved)))
    skeleton.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, strict=True, assign=True)
    assert torch.equal(skeleton.eval()(images()), model.eval()(images()))
    counts = next(r for (t, _), r in zip(steps, records, strict=True) if t is TECHNIQUE)
    assert sum(counts["hidden"]) < sum(b.mlp.fc1.out_features for b in teacher.blocks)
    if partner not in ("diffrate", "evit"):  # they set or weigh tokens anew by what is left
        torch.testing.assert_close(model(images()), before, atol=1e-4, rtol=1e-4)


def test_check_and_trains() -> None:
    assert TECHNIQUE.check(info(), Config()) is None
    assert TECHNIQUE.trains(Config())
    assert not TECHNIQUE.trains(Config(head_ratio=0.0, mlp_ratio=0.0))
    nothing = Config(head_ratio=0.0, mlp_ratio=0.0, head_dim_ratio=0.5)
    assert TECHNIQUE.check(info(), nothing) == (
        "head_ratio=0, head_dim_ratio=0.5, mlp_ratio=0 (round_to=8) remove nothing from 4 heads of 8 and 64 MLP "
        "dimensions a block"
    )
    assert TECHNIQUE.check(info(head_dim=16), nothing) is None
    reason = "queries and keys are normalised over the dimensions of a head, none of which can be removed"
    assert TECHNIQUE.check(info(has_qk_norm=True), ALL) == f"head_dim_ratio=0.5: {reason}; must be 0"
    assert TECHNIQUE.check(info(has_qk_norm=True), NORMED) is None
