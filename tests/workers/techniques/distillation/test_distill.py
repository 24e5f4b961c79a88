"""Distillation losses against their sums written out, and the students cut from a teacher."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import threads
from tests.workers.techniques.models import VARIANTS, images, info, surroundings, vit
from tests.workers.techniques.students import inputs, logits, student
from workers.techniques.distillation.distill import TECHNIQUE, Config, hard_loss, soft_loss, student_info
from workers.techniques.distillation.distill_students import student_layers

one_thread = threads.one_thread


def total(config: Config, student: Tensor, teacher: Tensor) -> Tensor:
    given = inputs(student, teacher)
    assert TECHNIQUE.loss is not None
    term = TECHNIQUE.loss(given, config)
    return term.task_weight * F.cross_entropy(student, given.targets) + term.extra


def written_out(student: Tensor, teacher: Tensor, T: float) -> float:
    """T^2 / B sum_b sum_c p_c ln(p_c / q_c), in Python floats."""
    result = 0.0
    for s_row, t_row in zip(student.tolist(), teacher.tolist(), strict=True):
        q = [math.exp(s / T) for s in s_row]
        p = [math.exp(t / T) for t in t_row]
        result += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    return T * T * result / len(student)


@pytest.mark.parametrize("temperature", [1, 2, 7, 20])
def test_soft_loss(temperature: int) -> None:
    student, teacher = logits(0), logits(1)
    assert float(soft_loss(student, teacher, temperature)) == pytest.approx(
        written_out(student, teacher, temperature), rel=1e-4
    )
    assert float(soft_loss(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-5)


def test_soft_loss_is_that_of_deit_times_the_classes() -> None:
    """DeiT's code divides the sum over images and classes by the number of logits."""
    student, teacher = torch.randn(7, 10), torch.randn(7, 10)
    p, q = (student / 3).log_softmax(1), (teacher / 3).log_softmax(1)
    deit = F.kl_div(p, q, reduction="sum", log_target=True) * 9 / student.numel()
    torch.testing.assert_close(soft_loss(student, teacher, 3), 10 * deit)


def test_hard_loss() -> None:
    student, teacher = logits(0), logits(1)
    rows = [-float(s.log_softmax(0)[int(t.argmax())]) for s, t in zip(student, teacher, strict=True)]
    assert float(hard_loss(student, teacher)) == pytest.approx(sum(rows) / len(rows), rel=1e-5)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_total_is_the_weighted_sum(kind: str, alpha: float) -> None:
    student, teacher = logits(0), logits(1)
    kd = soft_loss(student, teacher, 3) if kind == "soft" else hard_loss(student, teacher)
    want = (1 - alpha) * F.cross_entropy(student, torch.arange(6) % 5) + alpha * kd
    torch.testing.assert_close(total(Config(alpha=alpha, temperature=3, kind=kind), student, teacher), want)


def test_alpha_limits_are_the_two_losses() -> None:
    student, teacher = logits(0), logits(1)
    torch.testing.assert_close(
        total(Config(alpha=0.0), student, teacher), F.cross_entropy(student, torch.arange(6) % 5)
    )
    torch.testing.assert_close(total(Config(alpha=1.0), student, teacher), soft_loss(student, teacher, 2))


def test_gradient_of_the_soft_loss() -> None:
    """d/ds = T (softmax(s/T) - softmax(t/T)) / B: the T^2 keeps its size as T grows. The teacher gets none."""
    student, teacher, T = logits(0).requires_grad_(), logits(1).requires_grad_(), 4
    total(Config(alpha=1.0, temperature=T), student, teacher).backward()
    want = T * ((student / T).softmax(-1) - (teacher / T).softmax(-1)) / len(student)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, want.detach())
    assert teacher.grad is None


def test_loss_needs_the_teacher() -> None:
    assert TECHNIQUE.loss is not None
    assert TECHNIQUE.trains(Config())
    assert TECHNIQUE.needs_teacher(Config())
    with pytest.raises(ValueError, match="must supply teacher logits"):
        TECHNIQUE.loss(inputs(logits(0), None), Config())


@pytest.mark.parametrize(
    ("depth", "fraction", "layers"),
    [
        (12, 1.0, list(range(12))),
        (12, 0.5, [0, 2, 4, 7, 9, 11]),
        (4, 0.75, [0, 2, 3]),
        (4, 0.5, [0, 3]),
        (2, 0.5, [0]),
        (1, 0.5, [0]),
    ],
)
def test_layers_are_evenly_spaced(depth: int, fraction: float, layers: list[int]) -> None:
    assert student_layers(depth, fraction) == layers


def test_full_student_is_the_model_itself() -> None:
    model = vit()
    applied = TECHNIQUE.apply(model, Config(), surroundings(model))
    assert applied.model is model
    assert applied.changed == ["loss"]
    torch.testing.assert_close(model(images()), vit()(images()), rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shallow_student_runs_the_teachers_blocks(variant: str) -> None:
    applied = student(variant, depth=0.5)
    teacher = vit(variant, depth=4)
    teacher.blocks = torch.nn.Sequential(teacher.blocks[0], teacher.blocks[3])
    torch.testing.assert_close(applied.model(images()), teacher(images()), rtol=0, atol=0)
    assert applied.changed == ["loss", "blocks"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("width", "heads"), [(0.75, 3), (0.5, 2)])
def test_narrow_student_is_a_smaller_vit_of_timm(variant: str, width: float, heads: int) -> None:
    applied = student(variant, width=width)
    twin = vit(variant, depth=4, embed_dim=8 * heads, num_heads=heads)
    twin.load_state_dict(applied.model.state_dict())
    torch.testing.assert_close(applied.model(images()), twin(images()), rtol=0, atol=0)
    assert applied.model.embed_dim == applied.model.num_features == 8 * heads


def test_narrow_student_takes_the_strongest_parts() -> None:
    """Silent channels, heads and dimensions are the ones that go; without norms over channels logits would be equal."""
    model = vit(depth=2)
    gone = torch.arange(8, 16)
    model.patch_embed.proj.weight.data[gone] = 0
    model.pos_embed.data[..., gone] = 0
    for block in model.blocks:
        block.attn.proj.weight.data[gone] = 0
        block.mlp.fc2.weight.data[gone] = 0
        block.attn.qkv.weight.data.view(3, 4, 8, 32)[:, 3] = 0
        block.attn.proj.weight.data[:, 24:] = 0
        block.mlp.fc1.weight.data[:16] = 0
        block.mlp.fc2.weight.data[:, :16] = 0
    keep = [i for i in range(32) if i not in gone.tolist()]
    small = TECHNIQUE.apply(model, Config(width=0.75), surroundings(model)).model
    torch.testing.assert_close(small.head.weight, model.head.weight[:, keep])
    torch.testing.assert_close(small.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight[16:][:, keep])
    want = model.blocks[0].attn.qkv.weight.view(3, 4, 8, 32)[:, :3][..., keep].reshape(72, 24)
    torch.testing.assert_close(small.blocks[0].attn.qkv.weight, want)


def test_teacher_is_left_alone() -> None:
    model = vit(depth=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for config in (Config(depth=0.5, width=0.5), Config(init="random"), Config(width=0.5, init="random")):
        assert TECHNIQUE.apply(model, config, surroundings(model)).model is not model
    assert len(model.blocks) == 4
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_random_student_depends_on_the_seed_only() -> None:
    model, config = vit(depth=4), Config(width=0.5, init="random")
    one, two, other = (TECHNIQUE.apply(model, config, surroundings(model, seed)).model for seed in (0, 0, 1))
    state = torch.get_rng_state()
    TECHNIQUE.apply(model, config, surroundings(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    assert one.pos_embed.std().item() == pytest.approx(0.2, rel=0.2)  # the teacher's spread
    assert one.blocks[0].norm1.weight.min().item() == 1.0


@pytest.mark.parametrize("changes", [{"depth": 0.5}, {"width": 0.5}, {"depth": 0.75, "width": 0.75}])
@pytest.mark.parametrize("variant", ["class", "distil", "registers"])
def test_student_facts_match_the_student(variant: str, changes: dict[str, float]) -> None:
    model = vit(variant, qkv_bias=True, depth=4)
    prefix = model.num_prefix_tokens
    teacher = info(
        depth=4,
        num_heads=(4,) * 4,
        mlp_hidden=(64,) * 4,
        num_tokens=16 + prefix,
        num_prefix_tokens=prefix,
        has_distil_token=variant == "distil",
        params=sum(p.numel() for p in model.parameters()),
    )
    config = Config(**changes)
    small = TECHNIQUE.apply(model, config, surroundings(model)).model
    facts = student_info(teacher, config)
    assert facts.params == sum(p.numel() for p in small.parameters())
    assert facts.embed_dim == small.embed_dim
    assert facts.num_heads == tuple(b.attn.num_heads for b in small.blocks)
    assert facts.mlp_hidden == tuple(b.mlp.fc1.out_features for b in small.blocks)


def test_check() -> None:
    assert TECHNIQUE.check(info(), Config(depth=0.5, width=0.5)) is None
    one = info(depth=1, num_heads=(1,), mlp_hidden=(64,), head_dim=32)
    pruned = info(num_heads=(2, 4, 4))
    assert TECHNIQUE.check(pruned, Config()) is None  # the loss alone goes with any model
    assert TECHNIQUE.check(pruned, Config(depth=0.5)) is None
    assert "pruned already" in str(TECHNIQUE.check(pruned, Config(width=0.5)))
    assert TECHNIQUE.check(one, Config(depth=0.5)) == "depth=0.5 of 1 blocks removes none"
    assert "leaves no smaller whole number of heads" in str(TECHNIQUE.check(one, Config(width=0.5)))


def test_attention_pooling_keeps_its_width() -> None:
    model = vit(global_pool="map", class_token=False, mlp_ratio=2)
    with pytest.raises(ValueError, match=r"width=0.5: the model pools by attention"):
        TECHNIQUE.apply(model, Config(width=0.5), surroundings(model))
