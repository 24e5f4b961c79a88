"""Students with a distillation token, of other architectures, and distillation as the loss of other techniques."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from orchestrator.study.load import load_study
from tests import threads
from tests.studies import tiny_study
from tests.workers.techniques.models import images, info, surroundings, vit
from tests.workers.techniques.students import fit, inputs, logits, noise
from workers.models import model_info
from workers.node.storage import LocalStorage
from workers.run import run_trial
from workers.stages.graph import compile_recipe
from workers.techniques import registry
from workers.techniques.composition import legal_orders
from workers.techniques.distillation.distill import ARCHITECTURES, TECHNIQUE, Config, hard_loss, soft_loss, student_info
from workers.techniques.distillation.distill_students import with_token
from workers.trial import Recipe, Step, TrialSpec

one_thread = threads.one_thread


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
    for changes, said in (
        (
            {"pooling": "avg"},
            "token: the head must read the class token, normalised with all others; here it reads 'avg'",
        ),
        ({"norm_after_pool": True}, "here it reads 'token' after its last norm"),
        ({"has_positions": False}, "must be a plain ViT with position embeddings"),
        ({"block": "eva.EvaBlock"}, "here the blocks are eva.EvaBlock"),
    ):
        assert said in str(TECHNIQUE.check(info(**changes), Config(token=True)))
        assert TECHNIQUE.check(info(**changes), Config()) is None
    with pytest.raises(ValueError, match="needs a plain ViT with a class token"):
        with_token(vit("registers"))


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
    baseline = compile_recipe(Recipe(), 0, context)[0].key
    assert storage.exists(f"stages/{baseline}/teacher_logits.safetensors") == (augment == "none")
    assert [s.kind for s in result.stages] == ["baseline", "surgery", "recovery"]
