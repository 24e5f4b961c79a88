"""Training: what is learnt, that it repeats, and how techniques take part."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchestrator.config import StudyError, load_study
from tests.studies import tiny_study
from tests.techniques.models import surroundings, vit
from workers.optimisers import WeightAverage, schedule
from workers.tasks.image_classification import Split
from workers.techniques import registry
from workers.techniques.record import LossInputs, LossTerm, Technique, number
from workers.training import TrainingDiverged, train
from workers.training_settings import TrainingSettings

SETTINGS: dict[str, Any] = {
    "epochs": 8,
    "batch_size": 16,
    "lr": 0.02,
    "weight_decay": 0.0,
    "warmup_fraction": 0.25,
    "optimizer": "adamw",
    "momentum": 0.9,
    "schedule": "one_cycle",
    "label_smoothing": 0.0,
    "grad_clip": 1.0,
    "amp": "none",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More threads only wait for one another on models of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_split(count: int = 60) -> Split:
    """Three classes; class c is brightest in column c."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 3
    images = generator.normal(0, 0.3, (count, 3, 3, 1)).astype(np.float32)
    images[np.arange(count), :, labels] += 1
    return Split(images, labels.astype(np.int64), (0.0,), (1.0,))


def make_model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.Dropout(dropout), nn.GELU(), nn.Linear(16, 3))


def fit(model: nn.Module, *, seed: int = 0, split: Split | None = None, **more: Any) -> Any:
    settings = {**SETTINGS, **more.pop("settings", {})}
    return train(model, split or make_split(), settings, seed=seed, device="cpu", **more)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("shape", ["one_cycle", "cosine"])
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_it_learns(optimizer: str, shape: str, amp: str) -> None:
    model, split = make_model(), make_split()
    lr = 0.2 if optimizer == "sgd" else 0.02
    report = fit(model, split=split, settings={"optimizer": optimizer, "schedule": shape, "amp": amp, "lr": lr})
    _, images, labels = next(split.batches(60))
    assert (model(images).argmax(1) == labels).float().mean() > 0.95
    assert (report.epochs, report.steps) == (8, 32)
    assert 0 <= report.final_loss < 0.3
    assert not model.training


def test_the_same_seed_gives_the_same_weights_and_the_outside_stays_as_it_was() -> None:
    trained = []
    for seed in (1, 1, 2):
        model = make_model(dropout=0.3)
        torch.manual_seed(seed * 100 + len(trained))
        before = torch.get_rng_state()
        fit(model, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        trained.append(weights(model))
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


def test_one_step_of_sgd_against_its_equation() -> None:
    split, model = make_split(16), nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
    weight = model[1].weight
    start = weight.detach().clone()
    _, images, labels = next(split.batches(16))
    one_hot = nn.functional.one_hot(labels, 3).float()
    error = (model(images).softmax(1) - one_hot).detach() / 16
    gradient = error.T @ images.flatten(1) + 0.1 * start
    settings = {"epochs": 1, "optimizer": "sgd", "lr": 0.5, "weight_decay": 0.1, "grad_clip": None}
    fit(model, split=split, settings=settings | {"warmup_fraction": 0.5, "schedule": "cosine"})
    # the only step lies in the middle of the schedule: factor 1; Nesterov's first step has 1 + 0.9 times the gradient
    torch.testing.assert_close(weight.detach(), start - 0.5 * 1.9 * gradient)


def test_schedules() -> None:
    one_cycle, cosine = schedule("one_cycle", 0.2), schedule("cosine", 0.2)
    assert one_cycle(0) == pytest.approx(1 / 25)
    assert cosine(0) == 0
    for factor in (one_cycle, cosine):
        assert factor(0.2) == pytest.approx(1)
        assert factor(0.6) == pytest.approx(0.5)
        assert factor(1) == pytest.approx(0)
    assert cosine(0.05) == pytest.approx(0.25)
    assert schedule("cosine", 0)(0) == 1


@pytest.mark.parametrize("key", ["optimizer", "schedule", "amp", "augment"])
def test_unknown_settings_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be .* got 'best'"):
        fit(make_model(), settings={key: "best"})


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown \['ema'\], missing \[\]"):
        fit(make_model(), settings={"ema": 0.9})
    with pytest.raises(ValueError, match=r"unknown \[\], missing \['batch_size', 'lr'"):
        TrainingSettings.read({"epochs": 1})
    with pytest.raises(ValueError, match=r"accumulate must be from 1 to batch_size \(16\), got 17"):
        fit(make_model(), settings={"accumulate": 17})
    with pytest.raises(ValueError, match="patience needs validation images"):
        fit(make_model(), settings={"patience": 1})
    with pytest.raises(ValueError, match="give the teacher itself"):
        fit(make_model(), settings={"mixup": 0.2}, teacher_logits=torch.zeros(60, 3))
    with pytest.raises(ValueError, match=r"randaugment needs uint8 images of 1 or 3 channels, these are float32 of 1"):
        fit(make_model(), settings={"augment": "randaugment"})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"optimizer": "sdg"}, r"training\.recovery\.optimizer: must be 'adamw' or 'sgd'"),
        ({"momentum": 0.8}, "momentum is of optimizer sgd"),
        ({"accumulate": 65}, "accumulate must not exceed batch_size"),
        ({"batch_size": 1, "cutmix": 1.0}, "mixup and cutmix need a batch_size of 2 or more"),
        ({"ema_decay": 1.0}, r"training\.recovery\.ema_decay: must be less than 1"),
        ({"augment": "randaugment"}, r"training\.recovery\.augment: must not be randaugment for digits"),
        ({"mix_up": 1.0}, r"training\.recovery\.mix_up: must be a known key.*mixup"),
    ],
)
def test_a_study_says_what_is_wrong_before_anything_runs(part: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        load_study(tiny_study(training={"recovery": part}))


def test_what_a_study_says_is_what_a_worker_reads() -> None:
    study = load_study(tiny_study(training={"baseline": {"optimizer": "sgd"}, "recovery": {"checkpoint_s": "5m"}}))
    context = study.context()
    baseline, recovery = (TrainingSettings.read(context.training[name]) for name in ("baseline", "recovery"))
    assert (baseline.optimizer, baseline.momentum, baseline.checkpoint_s) == ("sgd", 0.9, 120.0)
    assert (recovery.momentum, recovery.checkpoint_s, recovery.changes_images) == (None, 300.0, False)
    assert load_study(study.to_dict()) == study
    plain = load_study(tiny_study(training={"baseline": {"optimizer": "sgd"}})).context()
    assert plain.digest == context.digest  # how often states are written changes no result


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    split = make_split()
    split.images[7] = np.inf
    with pytest.raises(TrainingDiverged, match="must stay finite; it was nan by step"):
        fit(make_model(), split=split)


def test_tick_is_called_and_may_end_the_training() -> None:
    ticks: list[int] = []
    fit(make_model(), tick=lambda: ticks.append(1))
    assert len(ticks) >= 8

    def stop() -> None:
        raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        fit(make_model(), tick=stop)


@dataclass(frozen=True)
class Config:
    weight: float = number(0.5, 0, 1, 0.5, doc="of the task loss")


def technique(**functions: Any) -> Technique:
    return Technique(
        "probe",
        "distillation",
        1,
        Config,
        "surgery",
        apply=lambda m, c, s: None,  # type: ignore[arg-type, return-value]
        rebuild=lambda m, r: m,
        source="none",
        **functions,
    )


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


# --- what a step is made of -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts: int) -> None:
    """60 images in batches of 16: parts of unequal size, and a last batch of 12, count by their images."""
    trained = []
    for accumulate in (1, parts):
        model = make_model()
        settings = {"optimizer": "sgd", "lr": 0.1, "accumulate": accumulate, "label_smoothing": 0.1}
        report = fit(model, settings=settings)
        trained.append((weights(model), report.final_loss))
    torch.testing.assert_close(trained[0][0], trained[1][0], rtol=1e-5, atol=1e-6)
    assert trained[0][1] == pytest.approx(trained[1][1], rel=1e-5)


def recorded(settings: dict[str, Any], **more: Any) -> tuple[list[Tensor], nn.Module, Any]:
    """Returns the weights before every step, the trained model and the report."""
    before: list[Tensor] = []

    def note(model: nn.Module, config: Config, progress: float) -> None:
        before.append(weights(model))

    model = make_model()
    report = fit(model, settings=settings, steps=[(technique(on_progress=note), Config())], **more)
    return before, model, report


def test_the_mean_of_the_weights_by_hand() -> None:
    before, raw, _ = recorded({"epochs": 2})
    _, averaged, _ = recorded({"epochs": 2, "ema_decay": 0.5})
    mean = before[0]
    for step, current in enumerate([*before[1:], weights(raw)], start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * current
    torch.testing.assert_close(weights(averaged), mean, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights(averaged), weights(raw))


def test_the_mean_of_the_weights_rises_to_its_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.25)
    nn.init.ones_(model.weight)
    average.update(1)
    assert average.means[0].item() == pytest.approx(1 - 2 / 11)  # (1 + 1) / (10 + 1) is below 0.25
    average.update(100)
    assert average.means[0].item() == pytest.approx(1 - 2 / 11 * 0.25)
    with average.in_place():
        assert model.weight.item() == pytest.approx(1 - 2 / 11 * 0.25)
    assert model.weight.item() == 1


@pytest.mark.parametrize("decay", [None, 0.9])
def test_training_ends_when_patience_does_and_keeps_the_best(decay: float | None) -> None:
    """Validation labels are wrong on purpose: the more is learnt, the worse they are told, so the first epoch is best."""
    split = make_split()
    wrong = Split(split.images, (split.labels + 1) % 3, split.mean, split.std)
    settings = {"patience": 2, "ema_decay": decay, "schedule": "cosine", "warmup_fraction": 0.0}
    before, model, report = recorded(settings, validation=wrong)
    assert (report.epochs, report.best_epoch, report.steps) == (3, 1, 12)
    first_epoch = before[:5]
    if decay is None:
        assert torch.equal(weights(model), first_epoch[4])
    else:
        mean = first_epoch[0]
        for step, current in enumerate(first_epoch[1:], start=1):
            used = min(decay, (1 + step) / (10 + step))
            mean = used * mean + (1 - used) * current
        torch.testing.assert_close(weights(model), mean, rtol=1e-5, atol=1e-6)


def test_hooks_hear_the_progress_of_the_weights_that_are_kept() -> None:
    split = make_split()
    wrong = Split(split.images, (split.labels + 1) % 3, split.mean, split.std)
    heard: list[float] = []
    steps = [(technique(on_progress=lambda m, c, progress: heard.append(progress)), Config())]
    fit(make_model(), settings={"patience": 1}, validation=wrong, steps=steps)
    assert heard == [i / 32 for i in range(8)] + [3 / 32]


def test_better_and_better_trains_to_the_end() -> None:
    split = make_split()
    report = fit(make_model(), settings={"patience": 8}, validation=split)
    assert report.epochs == 8
    assert report.best_epoch is not None


# --- images that are changed ------------------------------------------------------------------------------------------


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


# --- vision transformers ----------------------------------------------------------------------------------------------


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
