"""Training: what is learnt, that it repeats, and how techniques take part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workers.tasks.image_classification import Split
from workers.techniques.record import LossInputs, LossTerm, Technique, number
from workers.training import TrainingDiverged, _schedule, train

SETTINGS: dict[str, Any] = {
    "epochs": 8,
    "batch_size": 16,
    "lr": 0.02,
    "weight_decay": 0.0,
    "warmup_fraction": 0.25,
    "optimizer": "adamw",
    "schedule": "one_cycle",
    "label_smoothing": 0.0,
    "grad_clip": 1.0,
    "amp": "none",
}


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
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_it_learns(optimizer: str, schedule: str, amp: str) -> None:
    model, split = make_model(), make_split()
    lr = 0.2 if optimizer == "sgd" else 0.02
    report = fit(model, split=split, settings={"optimizer": optimizer, "schedule": schedule, "amp": amp, "lr": lr})
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
    one_cycle, cosine = _schedule("one_cycle", 0.2), _schedule("cosine", 0.2)
    assert one_cycle(0) == pytest.approx(1 / 25)
    assert cosine(0) == 0
    for factor in (one_cycle, cosine):
        assert factor(0.2) == pytest.approx(1)
        assert factor(0.6) == pytest.approx(0.5)
        assert factor(1) == pytest.approx(0)
    assert cosine(0.05) == pytest.approx(0.25)
    assert _schedule("cosine", 0)(0) == 1


@pytest.mark.parametrize("key", ["optimizer", "schedule", "amp"])
def test_unknown_settings_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be .* got 'best'"):
        fit(make_model(), settings={key: "best"})


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
