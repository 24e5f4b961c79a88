"""How techniques take part in a training: losses, teachers, hooks, changed images, vision transformers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import threads
from tests.probes import Config, fit, make_model, make_split, technique, weights
from tests.workers.techniques.models import surroundings, vit
from tests.workers.techniques.reduced import built, described
from workers.tasks.image_classification import Split
from workers.techniques import registry
from workers.techniques.record import LossInputs, LossTerm

one_thread = threads.one_thread


def test_losses_join_as_product_of_task_weights_plus_sum_of_extras() -> None:
    seen: list[LossInputs] = []

    def half(inputs: LossInputs, config: Config) -> LossTerm:
        seen.append(inputs)
        return LossTerm(config.weight, torch.tensor(2.0))

    plain = fit(make_model(), settings={"lr": 0.0})
    steps = [(technique(loss=half), Config(0.5)), (technique(loss=half), Config(0.5)), (technique(), Config())]
    joint = fit(make_model(), settings={"lr": 0.0}, steps=steps)
    assert joint.final_loss == pytest.approx(0.25 * plain.final_loss + 4, abs=1e-5)
    assert len(seen) == 2 * 32
    assert [s.progress for s in seen[::2]] == [i / 32 for i in range(32)]


def test_teacher_logits_belong_to_their_images() -> None:
    split = make_split()
    teacher = torch.from_numpy(split.images.reshape(60, 9)[:, :3].copy())

    def compare(inputs: LossInputs, config: Config) -> LossTerm:
        assert inputs.teacher_logits is not None
        assert torch.allclose(inputs.teacher_logits, inputs.images.flatten(1)[:, :3])
        assert inputs.logits.dtype == torch.float32
        return LossTerm(1.0, inputs.logits.sum() * 0)

    fit(make_model(), split=split, steps=[(technique(loss=compare), Config())], teacher_logits=teacher)


def test_parameter_groups_and_progress_hooks_are_used() -> None:
    model = make_model()
    frozen, gate = model[1].bias, model[4].bias
    before, seen = (frozen.detach().clone(), gate.detach().clone()), []

    def groups(module: nn.Module, config: Config) -> list[dict[str, Any]]:
        return [{"params": [frozen], "lr": 0.0, "weight_decay": 0.0}, {"params": [gate], "lr": 1.0}]

    def progress(module: nn.Module, config: Config, done: float) -> None:
        assert module is model
        seen.append(done)

    fit(model, steps=[(technique(parameter_groups=groups, on_progress=progress), Config())])
    assert torch.equal(frozen, before[0])
    assert not torch.equal(gate, before[1])
    assert seen == [i / 32 for i in range(32)]


@pytest.mark.parametrize("augment", [{"augment": "flip_crop"}, {"mixup": 0.4}, {"cutmix": 1.0}])
def test_the_teacher_sees_what_the_student_sees(augment: dict[str, Any]) -> None:
    split, teacher = make_split(), make_model().eval()
    seen: list[Tensor] = []

    def compare(inputs: LossInputs, config: Config) -> LossTerm:
        assert inputs.teacher is teacher
        assert inputs.teacher_logits is not None
        assert not inputs.teacher_logits.requires_grad
        torch.testing.assert_close(inputs.teacher_logits, teacher(inputs.images).detach())
        assert inputs.targets.dtype == torch.int64
        assert inputs.targets.ndim == 1
        seen.append(inputs.images)
        return LossTerm(1.0, inputs.logits.sum() * 0)

    steps = [(technique(loss=compare), Config())]
    fit(make_model(), split=split, settings={"epochs": 1, **augment}, steps=steps, teacher=teacher)
    originals = torch.from_numpy(split.images.reshape(60, -1))
    shown = torch.cat(seen).flatten(1)
    assert torch.cdist(shown, originals).min(dim=1).values.max() > 0.05


def test_augmented_training_repeats_and_leaves_the_outside_alone() -> None:
    settings = {"augment": "flip_crop", "mixup": 0.2, "cutmix": 1.0, "epochs": 2}
    trained = []
    for seed in (1, 1, 2):
        model = make_model(dropout=0.3)
        np.random.seed(len(trained))
        state = np.random.get_state()[1].copy()
        fit(model, seed=seed, settings=settings)
        assert np.array_equal(np.random.get_state()[1], state)
        trained.append(weights(model))
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


def noise(count: int = 16, classes: int = 5) -> Split:
    """Images for the small ViT of the techniques' tests."""
    generator = np.random.default_rng(3)
    images = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return Split(images, generator.integers(0, classes, count), (0.5,) * 3, (0.25,) * 3)


def fit_vit(model: nn.Module, **more: Any) -> Any:
    settings = {"epochs": 2, "batch_size": 8, "lr": 1e-3, **more.pop("settings", {})}
    return fit(model, split=noise(), settings=settings, **more)


@pytest.mark.parametrize("reducer", [None, "tome"])
def test_calculating_activations_twice_changes_nothing(reducer: str | None) -> None:
    trained = []
    for twice in (False, True):
        model = vit(proj_drop_rate=0.1)
        if reducer is not None:
            technique = registry()[reducer]
            model = technique.apply(model, technique.Config(), surroundings(model)).model
        calls: list[int] = []
        model.blocks[1].norm1.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        fit_vit(model, settings={"grad_checkpointing": twice, "epochs": 1})
        assert len(calls) == (4 if twice else 2)
        assert not model.grad_checkpointing
        trained.append(weights(model))
    assert torch.equal(*trained)


@pytest.mark.parametrize("name", ["eva02_small_patch14_224", "beit_base_patch16_224"])
def test_blocks_that_a_model_goes_through_itself_are_calculated_twice_too(name: str) -> None:
    trained, description = [], described(name, img_size=16, patch_size=4)
    for twice in (False, True):
        model = built(description)
        calls: list[int] = []
        model.blocks[1].norm1.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        fit_vit(model, settings={"grad_checkpointing": twice, "epochs": 1})
        assert len(calls) == (4 if twice else 2)
        trained.append(weights(model))
    assert torch.equal(*trained)


def test_a_model_whose_blocks_cannot_be_calculated_twice_trains_without(caplog: pytest.LogCaptureFixture) -> None:
    fit(make_model(), settings={"grad_checkpointing": True, "epochs": 1})
    assert "grad_checkpointing has no effect on this model" in caplog.text


def test_a_model_with_two_heads_is_trained_through_their_mean_unless_a_technique_wants_both() -> None:
    shapes = []

    def look(inputs: LossInputs, config: Config) -> LossTerm:
        shapes.append(None if inputs.distil_logits is None else inputs.distil_logits.shape)
        return LossTerm(1.0, inputs.logits.sum() * 0)

    def both(model: Any, config: Config, progress: float) -> None:
        model.set_distilled_training(True)

    fit_vit(vit("distil"), steps=[(technique(loss=look), Config())], settings={"epochs": 1})
    assert shapes == [None, None]
    model = vit("distil")
    head = copy.deepcopy(model.head_dist)
    fit_vit(model, steps=[(technique(loss=look, on_progress=both), Config())], settings={"epochs": 1})
    assert shapes[2:] == [(8, 5), (8, 5)]
    assert not model.distilled_training
    # the task loss is the class token's; nothing pulls at the other head but weight decay, which is 0 here
    assert torch.equal(model.head_dist.weight, head.weight)
