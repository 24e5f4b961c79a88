"""Training: what is learnt, that it repeats, which settings there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.study.load import StudyError, load_study
from tests import threads
from tests.probes import fit, make_model, make_split, weights
from tests.studies import tiny_study
from workers.training.loop import TrainingDiverged
from workers.training.optimisers import schedule
from workers.training.settings import TrainingSettings

one_thread = threads.one_thread


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
