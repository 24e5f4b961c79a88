"""DiffRate: costs, counts and chances in closed form, masking against removing, the model against a slow one, and a training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.study.load import load_study
from tests import threads
from tests.studies import tiny_study
from tests.workers.techniques.digits import SETTINGS, digits, full, learned
from tests.workers.techniques.models import VARIANTS, images, info, surroundings, vit
from workers.measuring.counting import count_macs
from workers.node.storage import LocalStorage
from workers.run import run_trial
from workers.techniques.record import LossInputs
from workers.techniques.tokens.diffrate import (
    COST_WEIGHT,
    TECHNIQUE,
    Config,
    Cost,
    RatedBlocks,
    block_cost,
    chain,
    even_schedule,
    expected,
    flattest,
    scaled_counts,
    share,
    stays,
)
from workers.training.loop import train
from workers.trial import Recipe, TrialSpec

one_thread = threads.one_thread

COUNTS = [(13, 11), (10, 10), (9, 5)]
"""Patch tokens of three blocks after pruning, and after merging too; both kinds in one block, and one alone."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fixed(variant: str = "class", counts: list[tuple[int, int]] = COUNTS, **changes: Any) -> Any:
    """A model with given counts, as a finished training leaves it."""
    model = vit(variant, **changes)
    resolved = {
        "patches": 16,
        "counts": [list(pair) for pair in counts],
        "asking": {"average": 0, "distil": 2}.get(variant, 1),
        "prefix": model.num_prefix_tokens,
        "pool": variant == "average",
    }
    return TECHNIQUE.rebuild(model, resolved)


def rated(variant: str = "class", **config: Any) -> Any:
    model = vit(variant)
    return TECHNIQUE.apply(model, Config(**config), surroundings(model)).model


def point(patches: int, count: float) -> Tensor:
    """Logits whose expected count is ``count`` because that candidate has nearly all of the probability."""
    return -40.0 * (torch.arange(1, patches + 1) - count).abs()


def costs() -> list[Cost]:
    return [block_cost(32, 32, 64)] * 3


# --- cost and counts --------------------------------------------------------------------------------------------------


def test_cost_is_what_the_counter_counts() -> None:
    model = fixed()
    without = 16 * 48 * 32 + 32 * 5  # patch embedding, head
    whole = count_macs(vit(), (1, 3, 16, 16)) - without
    ranking = sum(n * 32 for n in (17, 12, 11))  # the class token's row of the map, beside fused attention
    merging = (2 * 11 + 4 * 5) * 8  # cosines of the merged with those that stay
    blocks = count_macs(model, (1, 3, 16, 16)) - without - ranking - merging
    assert share([11, 10, 5], costs(), 16, 1) == pytest.approx(blocks / whole)
    assert share([16, 16, 16], costs(), 16, 1) == 1


def test_cost_by_hand() -> None:
    """Two blocks of 1 n + 1 n^2 + 2 m on 3 patch tokens and one other; 2 and then 1 stay."""
    got = share([2, 1], [Cost(1, 1, 2)] * 2, 3, 1)
    assert got == pytest.approx((4 + 16 + 2 * 3 + 3 + 9 + 2 * 2) / (2 * (4 + 16 + 8)))


def test_gradient_of_the_cost() -> None:
    logits = [random(6, seed=i).double().requires_grad_() for i in range(3)]

    def spent(*rates: Tensor) -> Tensor:
        counts = [(rate.softmax(0) * torch.arange(1, 7)).sum() for rate in rates]
        return share(counts, costs(), 6, 1)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(spent, logits)
    counts = [expected(rate.detach()) for rate in logits]
    assert share(counts, costs(), 6, 1) == pytest.approx(float(spent(*logits).detach()), rel=1e-5)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8, 0.95])
def test_the_even_schedule_loses_the_same_in_every_block_and_meets_the_target(target: float) -> None:
    depth = [block_cost(384, 384, 1536)] * 12
    left = even_schedule(depth, 196, 1, target)
    lost = [before - after for before, after in zip([196.0, *left], left, strict=False)]
    whole = [n for n, after in zip(lost, left, strict=True) if after > 1]
    assert whole == pytest.approx([whole[0]] * len(whole))
    assert share(left, depth, 196, 1) == pytest.approx(target)


def test_the_first_block_reduces_too() -> None:
    """The published code leaves it whole."""
    costs = [block_cost(32, 32, 128)] * 3
    assert even_schedule(costs, 16, 1, 0.6)[0] < 15


def test_counts_never_rise_and_one_token_stays() -> None:
    assert chain([(12.4, 9.6), (20, 9.9), (3, 7), (0.2, 0.1)], 16) == [(12, 10), (10, 10), (3, 3), (1, 1)]


@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("learned_counts", [[(14, 12), (12, 9), (8, 6)], [(4, 3), (3, 3), (2, 1)], [(16, 16)] * 3])
def test_scaled_counts_are_the_largest_multiple_that_meets_the_target(
    learned_counts: list[tuple[float, float]], target: float
) -> None:
    """A slow search over all multiples finds none that is larger and still meets it."""
    got = scaled_counts(learned_counts, costs(), 16, 1, target)
    assert share([m for _, m in got], costs(), 16, 1) <= target
    multiples = [
        chain([(p * factor / 1000, m * factor / 1000) for p, m in learned_counts], 16) for factor in range(2001)
    ]
    fitting = [counts for counts in multiples if share([m for _, m in counts], costs(), 16, 1) <= target]
    assert got == fitting[-1]


# --- distributions ----------------------------------------------------------------------------------------------------


def test_expected_count_by_hand() -> None:
    assert float(expected(torch.tensor([0.1, 0.2, 0.7]).log())) == pytest.approx(0.1 + 0.4 + 2.1)


@pytest.mark.parametrize("mean", [1.5, 8.5, 12.0, 15.9])
def test_the_flattest_distribution_with_a_mean(mean: float) -> None:
    """Linear logits; any other with this mean has less entropy."""
    logits = flattest(16, mean)
    assert float(expected(logits)) == pytest.approx(mean, abs=1e-3)
    steps = logits.diff()
    torch.testing.assert_close(steps, steps[:1].expand(15), atol=1e-4, rtol=1e-3)
    p = logits.double().softmax(0)
    other = p.clone()
    move = 0.2 * float(p.min())
    middle = int(p.argmax().clamp(1, 14))
    other[middle - 1] += move
    other[middle + 1] += move
    other[middle] -= 2 * move
    for q in (other, 2 * p - other):
        assert float((q * torch.arange(1, 17)).sum()) == pytest.approx(mean, abs=1e-3)
        assert -(q * q.log()).sum() <= -(p * p.log()).sum() + 1e-9


def test_the_best_stay_and_the_gradient_is_that_of_the_chance() -> None:
    logits = random(6, seed=3).requires_grad_()
    rank = torch.tensor([[2, 0, 5, 1, 4, 3]])
    count = round(float(expected(logits.detach())))
    got = stays(logits, rank)
    assert got[0, :, 0].tolist() == [float(r < count) for r in rank[0].tolist()]
    weight = random(1, 6, 1, seed=4)
    (gradient,) = torch.autograd.grad((got * weight).sum(), logits)

    def value(at: Tensor) -> float:
        p = at.double().softmax(0)
        chance = [sum(p[j - 1] for j in range(1, 7) if j > r) for r in rank[0].tolist()]
        return float(sum(c * w for c, w in zip(chance, weight[0, :, 0].double(), strict=True)))

    for j in range(6):
        step = 1e-5 * F.one_hot(torch.tensor(j), 6).double()
        at = logits.detach().double()
        assert float(gradient[j]) == pytest.approx((value(at + step) - value(at - step)) / 2e-5, rel=1e-4, abs=1e-6)


# --- the model --------------------------------------------------------------------------------------------------------


def slow_block(block: Any, t: Tensor, size: Tensor, after: tuple[int, int], variant: str, prefix: int) -> Any:
    """One block on one image, token by token: t (N, C), size (N,)."""
    attn, n = block.attn, len(t)
    q, k, v = attn.qkv(block.norm1(t)).reshape(n, 3, 4, 8).permute(1, 2, 0, 3).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)

    def attended(queries: Tensor) -> Tensor:
        w = (queries @ k.transpose(-1, -2) * 8**-0.5).exp() * size
        return w / w.sum(-1, keepdim=True)

    t = t + block.ls1(attn.proj((attended(q) @ v).transpose(0, 1).reshape(n, 32)))
    asking = q[:, : 2 if variant == "distil" else 1]
    if variant == "average":
        asking = (q * size[:, None])[:, prefix:].sum(1, keepdim=True) / size[prefix:].sum()
    score = attended(asking).mean(dim=(0, 1)).tolist()
    order = sorted(range(prefix, n), key=lambda i: -score[i])
    stay, go = sorted(order[: after[1]]), order[after[1] : after[0]]
    keys = k.mean(dim=0)
    total, weight = t * size[:, None], size.clone()
    for i in go:
        taker = max(stay, key=lambda j: F.cosine_similarity(keys[i], keys[j], dim=0).item())
        total[taker] += t[i] * size[i]
        weight[taker] += size[i]
    left = [*range(prefix), *stay]
    t, size = (total / weight[:, None])[left], weight[left]
    return t + block.ls2(block.mlp(block.norm2(t))), size


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_equals_a_slow_one(variant: str) -> None:
    model, dense, outputs = fixed(variant), vit(variant), []
    for image in dense.norm_pre(dense._pos_embed(dense.patch_embed(images()))):
        t, size = image, torch.ones(len(image))
        for block, after in zip(dense.blocks, COUNTS, strict=True):
            t, size = slow_block(block, t, size, after, variant, dense.num_prefix_tokens)
        if variant == "average":
            t = (t * size[:, None]).sum(0, keepdim=True) / size.sum()
        outputs.append(dense.forward_head(dense.norm(t[None])))
    torch.testing.assert_close(model(images()), torch.cat(outputs), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_masking_in_training_computes_what_removing_does(variant: str) -> None:
    model = rated(variant, macs=0.6)
    for block, (prune, merge) in zip(model.blocks, COUNTS, strict=True):
        block.rates.prune.data, block.rates.merge.data = point(16, prune), point(16, merge)
    assert [pair for block in model.blocks for pair in chain([block.rates.counts()], 16)] == COUNTS
    want = fixed(variant)(images())
    torch.testing.assert_close(model(images()), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.train()(images()), want, atol=2e-4, rtol=1e-3)


def test_sizes_are_conserved_but_for_what_is_pruned() -> None:
    sizes: list[Tensor] = []
    model = fixed()
    reduce = model.blocks.reduce

    def watched(*args: Any) -> Any:
        tokens = reduce(*args)
        sizes.append(torch.ones(4, 17, 1) if tokens.size is None else tokens.size)
        return tokens

    model.blocks.reduce = watched
    model(images())
    assert [s.shape[1] - 1 for s in sizes] == [after for _, after in COUNTS]
    assert (sizes[0].sum(1) == 14).all()  # 3 of 17 pruned in the first block, of size 1
    assert (sizes[0][:, 0] == 1).all()
    assert (sizes[-1].sum(1) <= 13).all()


def test_task_and_cost_reach_the_rates() -> None:
    model = rated("layerscale", macs=0.6).train()
    F.cross_entropy(model(images()), torch.arange(4)).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())
    rates = [g for n, g in gradients.items() if ".rates." in n and g is not None]
    assert len(rates) == 6
    assert all(bool(g.abs().sum() > 0) for g in rates[:4])
    assert not any(bool(g.any()) for g in rates[4:])  # no attention comes after the last block, whose class token stays
    extra(model, Config(macs=0.5)).backward()
    assert all(bool(p.grad.abs().sum() > 0) for n, p in model.named_parameters() if n.endswith("rates.merge"))


def test_heads_that_differ_after_pruning() -> None:
    from workers.techniques.pruning.magnitude_prune import TECHNIQUE as PRUNE

    model, twin = vit(), vit()
    for m in (model, twin):
        PRUNE.apply(m, PRUNE.Config(head_ratio=0.5, mlp_ratio=0.25), surroundings(m))
    TECHNIQUE.apply(model, Config(macs=1.0), surroundings(model))
    torch.testing.assert_close(model(images()), twin(images()), rtol=0, atol=0)


# --- training ---------------------------------------------------------------------------------------------------------


def extra(model: Any, config: Config) -> Tensor:
    assert TECHNIQUE.loss is not None
    inputs = LossInputs(model, images(), torch.zeros(4, 5), torch.arange(4), None, 0.0)
    term = TECHNIQUE.loss(inputs, config)
    assert term.task_weight == 1
    return term.extra


@pytest.mark.parametrize("target", [0.4, 0.6, 0.9])
def test_loss_is_the_squared_distance_from_the_target(target: float) -> None:
    model = rated(macs=0.6)
    for block, (prune, merge) in zip(model.blocks, [(13, 11), (12, 14), (9, 5)], strict=True):
        block.rates.prune.data, block.rates.merge.data = point(16, prune), point(16, merge)
    spent = share([11, 11, 5], costs(), 16, 1)  # the second block cannot leave more than it gets
    assert float(extra(model, Config(macs=target)).detach()) == pytest.approx(
        COST_WEIGHT * (spent - target) ** 2, rel=1e-4
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_starts_at_the_target_and_ends_there(variant: str) -> None:
    config = Config(macs=0.6)
    model = rated(variant, macs=0.6)
    assert float(extra(model, config).detach()) < COST_WEIGHT * 0.01**2
    assert TECHNIQUE.finalise is not None
    resolved = TECHNIQUE.finalise(model, config)
    assert json.loads(json.dumps(resolved)) == resolved
    assert list(model.state_dict()) == list(vit(variant).state_dict())
    spent = share([m for _, m in resolved["counts"]], costs(), 16, vit(variant).num_prefix_tokens)
    assert 0.5 < spent <= 0.6
    assert TECHNIQUE.finalise(model, config) == {}


def test_the_rates_are_trained_apart_from_the_weights() -> None:
    assert TECHNIQUE.parameter_groups is not None
    model = rated(macs=0.6)
    (group,) = TECHNIQUE.parameter_groups(model, Config(macs=0.6))
    rates = [p for n, p in model.named_parameters() if ".rates." in n]
    assert {id(p) for p in group["params"]} == {id(p) for p in rates}
    assert group["weight_decay"] == 0
    assert TECHNIQUE.parameter_groups(rated(macs=1.0), Config(macs=1.0)) == []


def test_a_short_training_moves_the_rates_to_the_target_and_the_record_rebuilds_it() -> None:
    """From the even schedule of another target: the loss takes the cost from 0.65 to 0.6, the task decides how."""
    split = digits(100)
    model = learned(split)
    config = Config(macs=0.6)
    applied = TECHNIQUE.apply(model, Config(macs=0.65), surroundings(model))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = float(extra(model, config).detach())
    settings = {**SETTINGS, "epochs": 24, "batch_size": 20}
    train(model, split, settings, seed=0, device="cpu", steps=[(TECHNIQUE, config)])
    after = float(extra(model, config).detach())
    assert before == pytest.approx(COST_WEIGHT * 0.05**2, rel=0.1)
    assert after < 0.2 * before
    still = {n for n, p in model.named_parameters() if torch.equal(p, start[n])}
    assert still <= {"blocks.2.rates.prune"}  # no attention follows, and what its MLP gets is the count after merging
    assert all(pruned > merged for pruned, merged in model.blocks.learned())
    assert TECHNIQUE.finalise is not None
    resolved = {**applied.resolved, **TECHNIQUE.finalise(model, config)}
    assert share([m for _, m in resolved["counts"]], costs(), 16, 1) <= 0.6
    skeleton: nn.Module = vit(img_size=8, patch_size=2, in_chans=1, num_classes=10, device="meta")
    TECHNIQUE.rebuild(skeleton, json.loads(json.dumps(resolved)))
    skeleton.load_state_dict(copy.deepcopy(model.state_dict()), strict=True, assign=True)
    _, shown, labels = next(split.batches(100))
    with torch.inference_mode():
        torch.testing.assert_close(skeleton.eval()(shown), model(shown), rtol=0, atol=0)
        assert (model(shown).argmax(1) == labels).float().mean() > 0.5


def test_a_trial_learns_its_rates_and_its_artefact_holds(tmp_path: Path) -> None:
    context = load_study(tiny_study()).context()
    storage = LocalStorage(tmp_path)
    result = run_trial(TrialSpec("s", "t", Recipe((full("diffrate", macs=0.7),)), 0, context, storage.url))
    assert result.status == "ok", result.failure
    assert result.conditions["parity_max_abs"] == 0
    assert [s.kind for s in result.stages] == ["baseline", "surgery", "recovery"]
    manifest = json.loads(storage.read(f"stages/{result.stages[-1].key}/manifest.json"))
    assert len(manifest["steps"][0]["resolved"]["counts"]) == 2
    assert b".rates." not in storage.read(f"stages/{result.stages[-1].key}/model.safetensors")


def test_names_of_weights_stay_once_the_counts_are_fixed() -> None:
    model = fixed()
    assert isinstance(model.blocks, RatedBlocks)
    assert list(model.state_dict()) == list(vit().state_dict())
    added = set(rated(macs=0.6).state_dict()) - set(vit().state_dict())
    assert added == {f"blocks.{i}.rates.{name}" for i in range(3) for name in ("prune", "merge")}


def test_check_wants_a_target_that_can_be_met() -> None:
    assert TECHNIQUE.check(info(), Config()) is None
    assert TECHNIQUE.check(info(), Config(macs=1.0)) == "macs=1 leaves nothing to remove"
    shallow = info(depth=1, num_heads=(4,), mlp_hidden=(64,))
    assert "macs=0.3 is out of reach: one token left by the first block of 1 is" in str(
        TECHNIQUE.check(shallow, Config(macs=0.3))
    )
