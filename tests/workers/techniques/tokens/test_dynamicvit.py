"""DynamicViT: counts and losses in closed form, draws and their gradients, the model against a slow one, and a training."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
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
from workers.techniques.tokens.dynamicvit import TECHNIQUE, Config, ThinningBlocks
from workers.techniques.tokens.dynamicvit_predictors import Predictor, decide, kept_counts, ratio_loss, token_loss
from workers.training.loop import train
from workers.trial import Recipe, TrialSpec

one_thread = threads.one_thread


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def thinned(variant: str = "class", changes: dict[str, Any] | None = None, **config: Any) -> Any:
    """A model whose predictors have opinions: their weights are larger than at the start of a training."""
    model = vit(variant, **(changes or {}))
    model = TECHNIQUE.apply(model, Config(**config), surroundings(model)).model
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".predictor." in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def slow_predictor(predictor: Any, x: Tensor) -> Tensor:
    """Log probabilities to stay and to go, (P, 2), of the tokens x (P, C) of one image that are left."""
    norm, linear, _ = predictor.project
    first, _, second, _, third = predictor.decide
    C = x.shape[1]
    centred = x - x.mean(1, keepdim=True)
    z = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias

    def gelu(t: Tensor) -> Tensor:
        return t * 0.5 * (1 + torch.erf(t / math.sqrt(2)))

    z = gelu(z @ linear.weight.T + linear.bias)
    z = torch.stack([torch.cat([token[: C // 2], z[:, C // 2 :].mean(0)]) for token in z])
    z = gelu(gelu(z @ first.weight.T + first.bias) @ second.weight.T + second.bias) @ third.weight.T + third.bias
    return z - z.exp().sum(1, keepdim=True).log()


def slow_block(block: Any, t: Tensor) -> Tensor:
    """One block on the tokens (N, C) of one image, with an explicit attention map."""
    attn, n = block.attn, len(t)
    q, k, v = attn.qkv(block.norm1(t)).reshape(n, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3).unbind(0)
    w = (attn.q_norm(q) @ attn.k_norm(k).transpose(-1, -2) * attn.head_dim**-0.5).softmax(-1)
    t = t + block.ls1(attn.proj((w @ v).transpose(0, 1).reshape(n, attn.attn_dim)))
    return t + block.ls2(block.mlp(block.norm2(t)))


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_counts_of_the_paper() -> None:
    assert kept_counts(196, 0.7, 3) == [137, 96, 67]
    assert kept_counts(196, 0.5, 3) == [98, 49, 24]
    assert kept_counts(10, 0.7, 1) == [7]  # 0.7 x 10 may be 6.999999999999999
    assert kept_counts(4, 0.3, 3) == [1, 1, 1]


def test_ratio_loss_by_hand() -> None:
    """Two images, four tokens, keep 0.5: shares 3/4 and 1/4 against 1/2, then 2/4 and 0 against 1/4."""
    first = torch.tensor([[1.0, 1, 1, 0], [0, 0, 1, 0]])[..., None]
    second = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]])[..., None]
    want = ((0.25**2 + 0.25**2) / 2 + (0.25**2 + 0.25**2) / 2) / 2
    assert float(ratio_loss([first, second], 0.5)) == pytest.approx(want)


def test_token_loss_by_hand() -> None:
    student = torch.tensor([[[1.0, 2], [3, 4], [5, 6]]])
    teacher = torch.tensor([[[1.0, 0], [0, 0], [5, 5]]])
    kept = torch.tensor([[[1.0], [0], [1]]])
    assert float(token_loss(student, teacher, kept)) == pytest.approx((4 / 2 + 1 / 2) / 2)


def test_gradients_of_the_losses() -> None:
    kept = [random(2, 4, 1, seed=i).double().requires_grad_() for i in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: ratio_loss([a, b], 0.6), kept)
    student, mask = random(2, 4, 3).requires_grad_(), torch.tensor([1.0, 0, 1, 1]).expand(2, 4)[..., None]
    teacher = random(2, 4, 3, seed=1)
    (got,) = torch.autograd.grad(token_loss(student, teacher, mask), student)
    torch.testing.assert_close(got, 2 * (student - teacher).detach() * mask / (6 * 3))


# --- decisions --------------------------------------------------------------------------------------------------------


def test_draws_follow_the_chances_and_what_is_gone_stays_gone() -> None:
    stay = torch.tensor([0.9, 0.2, 0.5, 0.7, 0.95])
    chances = torch.stack([stay, 1 - stay], dim=-1).log().expand(20_000, -1, -1)
    kept = torch.tensor([1.0, 1, 1, 1, 0])[:, None].expand(20_000, -1, -1)
    torch.manual_seed(0)
    drawn = decide(chances, kept)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    found = drawn.mean(dim=0)[:, 0]
    assert found[0] == 1  # the most likely of those that are left
    assert found[4] == 0
    torch.testing.assert_close(found[1:4], stay[1:4], atol=0.015, rtol=0)


def test_the_gradient_of_a_draw_is_that_of_the_softened_draw() -> None:
    chances = F.log_softmax(random(3, 6, 2), dim=-1).requires_grad_()
    kept = (random(3, 6, 1, seed=1) > -0.5).float()
    weight = random(3, 6, 1, seed=2)
    torch.manual_seed(4)
    (got,) = torch.autograd.grad((decide(chances, kept) * weight).sum(), chances)
    torch.manual_seed(4)
    noise = -torch.empty(3, 6, 2).exponential_().log()  # Gumbel
    soft = (chances + noise).softmax(dim=-1)[..., :1]
    best = chances.detach()[..., :1].masked_fill(kept == 0, -torch.inf).argmax(dim=1, keepdim=True)
    (want,) = torch.autograd.grad((soft * kept * weight).sum(), chances)
    untouched = torch.ones(3, 6, dtype=torch.bool).scatter(1, best[..., 0], False)
    torch.testing.assert_close(got[untouched], want[untouched])


def test_predictor_equals_the_slow_one_and_sees_only_what_is_left() -> None:
    predictor = Predictor(32)
    for i, parameter in enumerate(predictor.parameters()):
        parameter.data = 0.3 * random(*parameter.shape, seed=i)
    x, left = random(2, 9, 32), [0, 2, 3, 7]
    kept = torch.zeros(2, 9, 1)
    kept[:, left] = 1
    got = predictor(x, kept)
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(2, 9))
    for b in range(2):
        torch.testing.assert_close(got[b, left], slow_predictor(predictor, x[b, left]), atol=1e-5, rtol=1e-4)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_equals_a_slow_model(variant: str) -> None:
    """The whole model, image by image: 16 patch tokens become 9, 5 and 3."""
    model, dense = thinned(variant, keep=0.6), vit(variant)
    prefix = dense.num_prefix_tokens
    outputs = []
    for image in dense.norm_pre(dense._pos_embed(dense.patch_embed(images()))):
        t = image
        for i, (block, count) in enumerate(zip(dense.blocks, [9, 5, 3], strict=True)):
            stay = slow_predictor(model.blocks[i].predictor, t[prefix:])[:, 0].tolist()
            best = sorted(sorted(range(len(stay)), key=lambda j: -stay[j])[:count])
            t = slow_block(block, torch.stack([*t[:prefix], *(t[prefix + j] for j in best)]))
        if variant == "average":
            t = t.mean(0, keepdim=True)
        outputs.append(dense.forward_head(dense.norm(t[None])))
    torch.testing.assert_close(model(images()), torch.cat(outputs), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_computes_what_removing_the_drawn_tokens_would(variant: str) -> None:
    model, dense = thinned(variant, keep=0.6).train(), vit(variant)
    prefix = dense.num_prefix_tokens
    torch.manual_seed(7)
    got = model(images())
    decided = model.blocks.take_trace().decided
    assert len(decided) == 3
    assert all(bool((later <= before).all()) for before, later in pairwise(decided))
    x, outputs = dense.norm_pre(dense._pos_embed(dense.patch_embed(images()))), []
    for b, image in enumerate(x):
        t, left = image, list(range(16))
        for block, kept in zip(dense.blocks, decided, strict=True):
            stays = [j for j in left if kept[b, j, 0] == 1]
            t = slow_block(block, torch.stack([*t[:prefix], *(t[prefix + left.index(j)] for j in stays)]))
            left = stays
        if variant == "average":
            t = t.mean(0, keepdim=True)
        outputs.append(dense.forward_head(dense.norm(t[None])))
    torch.testing.assert_close(got, torch.cat(outputs), atol=2e-4, rtol=1e-3)


def test_tokens_of_every_block_and_macs_follow_the_counts() -> None:
    model = thinned(changes={"img_size": 56, "depth": 12}, keep=0.7)
    seen: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with torch.inference_mode():
        model(images(1, size=56))
    assert seen == [197] * 3 + [138] * 3 + [97] * 3 + [68] * 3
    macs = 196 * 4 * 4 * 3 * 32 + 32 * 5  # patch embedding, head
    macs += sum(n * (4 * 32 * 32 + 2 * 32 * 64) + 2 * n * n * 32 for n in seen)
    macs += sum(p * (32 * 32 + 32 * 16 + 16 * 8 + 8 * 2) for p in (196, 137, 96))  # the predictors
    assert count_macs(model, (1, 3, 56, 56)) == macs


def test_only_predictors_are_added() -> None:
    model = thinned(keep=0.6)
    assert isinstance(model.blocks, ThinningBlocks)
    added = set(model.state_dict()) - set(vit().state_dict())
    assert set(vit().state_dict()) <= set(model.state_dict())
    assert added
    assert all(".predictor." in name for name in added)


def test_heads_that_differ_after_pruning() -> None:
    from workers.techniques.pruning.magnitude_prune import TECHNIQUE as PRUNE

    model, twin = vit(), vit()
    for m in (model, twin):
        PRUNE.apply(m, PRUNE.Config(head_ratio=0.5, mlp_ratio=0.25), surroundings(m))
    TECHNIQUE.apply(model, Config(keep=1.0), surroundings(model))
    torch.testing.assert_close(model(images()), twin(images()), rtol=0, atol=0)


# --- the loss ---------------------------------------------------------------------------------------------------------


def step(model: Any, config: Config, teacher: nn.Module | None, logits_of: nn.Module | None) -> Tensor:
    assert TECHNIQUE.loss is not None
    torch.manual_seed(2)
    logits = model(images())
    said = None if logits_of is None else logits_of(images()).detach()
    inputs = LossInputs(model, images(), logits, torch.arange(4), said, 0.0, teacher=teacher)
    term = TECHNIQUE.loss(inputs, config)
    assert term.task_weight == 1
    return term.extra


@pytest.mark.parametrize("variant", ["class", "distil", "average"])
def test_loss_of_a_step_is_the_sum_of_its_parts(variant: str) -> None:
    config = Config(keep=0.6, logit_weight=0.3, token_weight=0.8)
    model, teacher = thinned(variant, keep=0.6).train(), vit(variant, seed=9)
    got = step(model, config, teacher, teacher)
    torch.manual_seed(2)
    logits = model(images())
    trace = model.blocks.take_trace()
    shares = [kept.mean(dim=(1, 2)) for kept in trace.decided]
    ratio = sum((share - 0.6 ** (i + 1)).square().mean() for i, share in enumerate(shares)) * 2 / 3
    p, q = teacher(images()).softmax(-1), logits.softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(-1).mean()
    prefix = model.num_prefix_tokens
    apart = (model.norm(trace.x) - teacher.forward_features(images()))[:, prefix:].square().mean(-1)
    kept = trace.decided[-1][..., 0]
    distance = (apart * kept).sum() / kept.sum()
    torch.testing.assert_close(got, ratio + 0.3 * divergence + 0.8 * distance)


def test_what_the_loss_needs_is_asked_for() -> None:
    ratio_only = Config(keep=0.6, logit_weight=0.0, token_weight=0.0)
    assert not TECHNIQUE.needs_teacher(ratio_only)
    assert not TECHNIQUE.needs_teacher_model(ratio_only)
    assert TECHNIQUE.needs_teacher(Config())
    assert TECHNIQUE.needs_teacher_model(Config())
    assert not TECHNIQUE.needs_teacher(Config(keep=1.0))
    model = thinned(keep=0.6).train()
    assert step(model, ratio_only, None, None).isfinite()
    with pytest.raises(ValueError, match="must supply teacher logits, or logit_weight must be 0"):
        step(model, Config(keep=0.6), vit(), None)
    with pytest.raises(ValueError, match="must supply the teacher, or token_weight must be 0"):
        step(model, Config(keep=0.6), None, vit())


def test_tokens_of_another_width_or_number_are_not_compared() -> None:
    model = thinned(keep=0.6).train()
    alone = step(model, Config(keep=0.6, token_weight=0.0), None, vit())
    for teacher in (vit(embed_dim=16), vit(patch_size=8)):
        torch.testing.assert_close(step(model, Config(keep=0.6), teacher, vit()), alone)
    assert step(model, Config(keep=0.6), vit(), vit()) > alone


def test_a_trace_is_used_once_and_never_copied() -> None:
    model = thinned(keep=0.6).train()
    model(images())
    assert model.blocks.trace.x.requires_grad
    assert copy.deepcopy(model).blocks.trace is None
    model.blocks.take_trace()
    with pytest.raises(ValueError, match="needs a forward pass in training mode"):
        model.blocks.take_trace()
    model.eval()(images())
    assert model.blocks.trace is None


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_short_training_brings_the_shares_kept_to_their_targets() -> None:
    """Predictors start undecided (a half, a quarter, ...); the ratio loss takes them to 0.9, 0.81, 0.73."""
    split = digits(200)
    teacher = learned(split)
    model = copy.deepcopy(teacher)
    config = Config(keep=0.9)
    model = TECHNIQUE.apply(model, config, surroundings(model)).model
    start = {n: p.detach().clone() for n, p in model.named_parameters()}

    def shares() -> Tensor:
        _, shown, _ = next(split.batches(100))
        torch.manual_seed(0)
        with torch.no_grad():
            model.train()(shown)
        return torch.stack([kept.mean() for kept in model.blocks.take_trace().decided])

    before, target = shares(), 0.9 ** torch.arange(1.0, 4.0)
    assert (before - torch.tensor([0.5, 0.25, 0.125])).abs().max() < 0.1
    report = train(
        model,
        split,
        {**SETTINGS, "epochs": 16, "lr": 5e-3},
        seed=0,
        device="cpu",
        steps=[(TECHNIQUE, config)],
        teacher=teacher,
    )
    assert math.isfinite(report.final_loss)
    after = shares()
    assert ((after - target).abs() < 0.4 * (before - target).abs()).all()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == set(start)


def test_a_trial_trains_with_the_teacher_and_its_artefact_holds(tmp_path: Path) -> None:
    context = load_study(tiny_study()).context()
    recipe = Recipe((full("dynamicvit", keep=0.5, start=0.5, stages=1),))
    storage = LocalStorage(tmp_path)
    result = run_trial(TrialSpec("s", "t", recipe, 0, context, storage.url))
    assert result.status == "ok", result.failure
    assert result.conditions["parity_max_abs"] == 0
    assert [s.kind for s in result.stages] == ["baseline", "surgery", "recovery"]


def test_check_wants_something_to_drop() -> None:
    assert TECHNIQUE.check(info(), Config()) is None
    assert "keep=1 drops none of 16 patch tokens" in str(TECHNIQUE.check(info(), Config(keep=1.0)))
    assert "drops none of 1 patch tokens" in str(TECHNIQUE.check(info(num_tokens=2), Config(keep=0.5)))
    model = vit(global_pool="avg", fc_norm=False)
    with pytest.raises(ValueError, match="dynamicvit: the model must read its class token, or average"):
        TECHNIQUE.apply(model, Config(), surroundings(model))
