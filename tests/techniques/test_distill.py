"""Distillation losses against their sums written out, and the students cut from a teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.config import load_study
from tests.studies import tiny_study
from tests.techniques.models import VARIANTS, images, info, surroundings, vit
from workers import stages
from workers.models import model_info
from workers.protocol import Recipe, Step, TrialSpec
from workers.run import run_trial
from workers.storage import LocalStorage
from workers.tasks.batches import Split
from workers.techniques import registry
from workers.techniques.composition import legal_orders
from workers.techniques.distill import (
    ARCHITECTURES,
    TECHNIQUE,
    Config,
    hard_loss,
    soft_loss,
    student_info,
)
from workers.techniques.record import LossInputs
from workers.techniques.students import student_layers, with_token
from workers.training import train


def logits(seed: int, rows: int = 6) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)) * 2


def inputs(student: Tensor, teacher: Tensor | None) -> LossInputs:
    return LossInputs(torch.nn.Identity(), images(6), student, torch.arange(6) % 5, teacher, 0.5)


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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More threads only wait for one another on models of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def student(variant: str = "class", seed: int = 0, **config: Any) -> Any:
    model = vit(variant, depth=4)
    return TECHNIQUE.apply(model, Config(**config), surroundings(model, seed))


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
    with pytest.raises(ValueError, match=r"width must be 1\.0"):
        TECHNIQUE.apply(model, Config(width=0.5), surroundings(model))


# --- the distillation token -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_loss_acts_on_the_distillation_head_alone(kind: str) -> None:
    """DeiT: (1 - a) CE(class head, label) + a KD(distillation head, teacher)."""
    heads, teacher = [logits(0).requires_grad_(), logits(1).requires_grad_()], logits(2)
    config = Config(alpha=0.3, kind=kind, temperature=3)
    given = inputs(heads[0], teacher)
    given.distil_logits = heads[1]
    assert TECHNIQUE.loss is not None
    term = TECHNIQUE.loss(given, config)
    assert term.task_weight == pytest.approx(0.7)
    kd = soft_loss(heads[1], teacher, 3) if kind == "soft" else hard_loss(heads[1], teacher)
    torch.testing.assert_close(term.extra, 0.3 * kd)
    term.extra.backward()
    assert heads[0].grad is None
    assert heads[1].grad is not None


@pytest.mark.parametrize("variant", ["class", "layerscale", "qk_norm"])
@pytest.mark.parametrize("config", [{}, {"width": 0.5, "depth": 0.5}], ids=["full", "small"])
def test_a_token_that_is_added_says_at_first_what_the_class_token_says(variant: str, config: dict[str, Any]) -> None:
    model = vit(variant, depth=4)
    applied = TECHNIQUE.apply(model, Config(token=True, **config), surroundings(model))
    assert applied.model is not model
    assert not hasattr(model, "dist_token")
    made: Any = applied.model.train()
    made.set_distilled_training(True)
    one, other = made(images())
    torch.testing.assert_close(one, other)
    made.eval()
    torch.testing.assert_close(made(images()), one)
    told = student_info(model_info(model, "cpu"), Config(token=True, **config))
    found = model_info(made, "cpu")
    assert (told.num_tokens, told.num_prefix_tokens, told.has_distil_token) == (18, 2, True)
    assert (found.num_tokens, found.num_prefix_tokens, found.has_distil_token) == (18, 2, True)


def test_a_token_against_timms_own_distilled_vit() -> None:
    model = vit(depth=2)
    made = with_token(vit(depth=2))
    twin = vit("distil", depth=2)
    twin.load_state_dict(made.state_dict())
    torch.testing.assert_close(made(images()), twin(images()), rtol=0, atol=0)
    assert torch.equal(made.state_dict()["pos_embed"][:, 1:], model.pos_embed)
    assert torch.equal(made.state_dict()["pos_embed"][:, 0], model.pos_embed[:, 0])


def test_where_a_token_cannot_be_added() -> None:
    assert "must have a class token" in str(
        TECHNIQUE.check(info(has_distil_token=True, num_prefix_tokens=2), Config(token=True))
    )
    assert "nor registers" in str(TECHNIQUE.check(info(num_prefix_tokens=5), Config(token=True)))
    assert "must have a class token" in str(
        TECHNIQUE.check(info(has_class_token=False, num_prefix_tokens=0), Config(token=True))
    )
    with pytest.raises(ValueError, match="needs a plain ViT with a class token"):
        with_token(vit("registers"))


def noise(count: int = 32) -> Split:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return Split(pixels, generator.integers(0, 5, count), (0.5,) * 3, (0.25,) * 3)


SETTINGS: dict[str, Any] = {
    "epochs": 6, "batch_size": 16, "lr": 5e-3, "weight_decay": 0.0, "warmup_fraction": 0.1, "optimizer": "adamw",
    "schedule": "cosine", "grad_clip": 1.0,
}  # fmt: skip


def fit(model: Any, config: Config, split: Split, **more: Any) -> Tensor:
    """Trains a student of the ViT of seed 9 and returns what the teacher says of the images."""
    teacher = vit(seed=9)
    shown = torch.cat([x for _, x, _ in split.batches(16)])
    with torch.no_grad():
        said: Tensor = teacher(shown)
    more = more or {"teacher_logits": said}
    train(model, split, SETTINGS, seed=0, device="cpu", steps=[(TECHNIQUE, config)], **more)
    return said


def test_training_moves_the_two_heads_apart() -> None:
    split, model = noise(), vit()
    made: Any = TECHNIQUE.apply(model, Config(token=True), surroundings(model)).model
    said = fit(made, Config(token=True, alpha=0.5, kind="hard"), split)
    shown = torch.cat([x for _, x, _ in split.batches(16)])
    with torch.no_grad():
        features = made.forward_features(shown)
        one, other = made.head(features[:, 0]), made.head_dist(features[:, 1])
        assert not made.distilled_training
        torch.testing.assert_close(made(shown), (one + other) / 2)
    labels = torch.from_numpy(split.labels)
    assert F.cross_entropy(one, labels) < F.cross_entropy(other, labels)
    assert hard_loss(other, said) < hard_loss(one, said)


# --- other architectures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_another_architecture_for_the_same_images(name: str) -> None:
    model = vit(img_size=32, patch_size=8)
    config = Config(architecture=name, init="random", depth=0.5, token="distilled" not in name)
    applied = TECHNIQUE.apply(model, config, surroundings(model))
    assert applied.changed[:2] == ["loss", "architecture"]
    assert student_info(model_info(model, "cpu"), config) == model_info(applied.model, "cpu")
    assert applied.model.eval()(images(size=32)).shape == (4, 5)
    skeleton = TECHNIQUE.rebuild(
        vit(img_size=32, patch_size=8, device="meta"), json.loads(json.dumps(applied.resolved))
    ).eval()
    skeleton.load_state_dict(applied.model.state_dict(), assign=True)
    torch.testing.assert_close(skeleton(images(size=32)), applied.model(images(size=32)), rtol=0, atol=0)
    again = TECHNIQUE.apply(model, config, surroundings(model)).model
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), applied.model.parameters(), strict=True))


def test_where_another_architecture_does_not_go() -> None:
    facts = info(image_size=32)
    small = Config(architecture="vit_small_patch32_224", init="random")
    assert TECHNIQUE.check(facts, small) is None
    assert "multiple of the patch size 32" in str(TECHNIQUE.check(info(image_size=16), small))
    for config in (
        Config(architecture="vit_tiny_patch16_224"),
        Config(init="pretrained"),
    ):
        assert f"init={config.init} does not go with architecture={config.architecture}" in str(
            TECHNIQUE.check(facts, config)
        )
    pruned = info(image_size=32, num_heads=(2, 4, 4))
    assert TECHNIQUE.check(pruned, Config(architecture="vit_tiny_patch16_224", init="random", width=0.5)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES[1:])
def test_every_architecture_can_be_built_for_small_images(name: str) -> None:
    assert TECHNIQUE.check(info(image_size=64), Config(architecture=name, init="random")) is None


# --- as the recovery loss of other techniques -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["magnitude_prune", "tome"])
@pytest.mark.parametrize("in_the_training", [False, True])
def test_a_model_changed_by_another_technique_learns_from_the_teacher(name: str, in_the_training: bool) -> None:
    """Full size, so only the loss: it brings the changed model nearer to the teacher than the same training without."""
    other, split = registry()[name], noise()
    shown = torch.cat([x for _, x, _ in split.batches(16)])
    apart = []
    for alpha in (0.9, 0.0):
        model = vit(seed=9)
        for step in (TECHNIQUE, other):
            model = step.apply(model, step.Config(), surroundings(model)).model
        said = fit(model, Config(alpha=alpha), split, **({"teacher": vit(seed=9)} if in_the_training else {}))
        with torch.no_grad():
            apart.append(float(soft_loss(model(shown), said, 2)))
    assert apart[0] < 0.3 * apart[1]


def full(name: str, **config: Any) -> Step:
    return Step(name, asdict(registry()[name].Config(**config)))


@pytest.mark.parametrize("augment", ["none", "flip_crop"])
def test_a_trial_distils_into_the_pruned_model(tmp_path: Path, augment: str) -> None:
    """Logits are shared by all trials where images stay as they are; otherwise the teacher runs and none are written."""
    training = {"baseline": {"epochs": 1}, "recovery": {"epochs": 1, "augment": augment}}
    context = load_study(tiny_study(training=training)).context()
    recipe = Recipe(
        (full("distill", token=True), full("magnitude_prune", mlp_ratio=0.5, head_ratio=0.0), full("tome", r=1))
    )
    assert recipe.techniques in legal_orders(recipe.techniques)
    storage = LocalStorage(tmp_path)
    result = run_trial(TrialSpec("s", "t", recipe, 0, context, storage.url))
    assert result.status == "ok", result.failure
    assert result.conditions["parity_max_abs"] == 0
    baseline = stages.compile_recipe(Recipe(), 0, context)[0].key
    assert storage.exists(f"stages/{baseline}/teacher_logits.safetensors") == (augment == "none")
    assert [s.kind for s in result.stages] == ["baseline", "surgery", "recovery"]
