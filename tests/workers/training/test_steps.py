"""What a step of training is made of: accumulated gradients, the mean of the weights, stopping early."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import threads
from tests.probes import Config, fit, make_model, make_split, technique, weights
from workers.tasks.image_classification import Split
from workers.training.optimisers import WeightAverage

one_thread = threads.one_thread


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
