"""A training that pauses at a rung hands over what it would have ended with, and goes on to the same bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.probes import SETTINGS, Config, make_model, make_split, technique, weights
from workers.node.storage import LocalStorage
from workers.training import loop
from workers.training.checkpoint import Checkpoints
from workers.training.loop import TrainingDiverged, TrainingReport, train
from workers.training.settings import whole_epochs

FOLDER = "stages/k/training"

KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd, fp16": {"optimizer": "sgd", "lr": 0.1, "amp": "fp16", "accumulate": 2},
    "mean weights": {"ema_decay": 0.9},
    "mixed and mirrored": {"augment": "flip_crop", "mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1},
    "cosine, bf16": {"schedule": "cosine", "amp": "bf16", "ema_decay": 0.9, "augment": "flip_crop"},
    "patient": {"patience": 8, "ema_decay": 0.9},
    "no states": {"checkpoint_s": None, "ema_decay": 0.9, "mixup": 0.2},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(LocalStorage(tmp_path), FOLDER, "identity")


def fit(
    model: nn.Module,
    checkpoints: Checkpoints | None,
    until: float | None = None,
    seen: list[int] | None = None,
    **more: Any,
) -> TrainingReport:
    """Trains; ``seen`` gets the number of every step that is carried out."""

    def count(module: nn.Module, config: Config, progress: float) -> None:
        if seen is not None:
            seen.append(round(progress * total))

    split = make_split()
    settings = {**SETTINGS, "checkpoint_s": 120.0, **more}
    total = settings["epochs"] * math.ceil(len(split) / settings["batch_size"])
    steps = [(technique(on_progress=count), Config())]
    return train(
        model,
        split,
        settings,
        seed=3,
        device="cpu",
        steps=steps,
        validation=split,
        checkpoints=checkpoints,
        until=until,
    )


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_a_training_that_pauses_at_every_rung_ends_at_the_same_weights(
    checkpoints: Checkpoints, settings: dict[str, Any]
) -> None:
    whole = make_model(0.3)
    expected = fit(whole, None, **settings)
    steps: list[int] = []
    reports = []
    for until in (0.125, 0.375, None):
        model = make_model(0.3)
        reports.append(fit(model, checkpoints, until, steps, **settings))
    if settings.get("patience") is None:  # which goes back to the hooks of its best epoch
        assert steps == list(range(32)), "nothing is trained twice, nothing left out"
    assert torch.equal(weights(model), weights(whole))
    assert [r.paused for r in reports] == [True, True, False]
    assert [r.progress for r in reports] == [0.125, 0.375, 1.0]
    assert [r.own_epochs for r in reports] == [1.0, 2.0, 5.0]
    assert (reports[-1].steps, reports[-1].final_loss) == (expected.steps, expected.final_loss)


class Seen(nn.Module):
    """Keeps what it was at the start of every epoch, before the first step sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model(0.3)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


@pytest.mark.parametrize("ema", [None, 0.9])
def test_what_is_handed_over_is_the_model_at_the_end_of_that_epoch(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, ema: float | None
) -> None:
    """Against the weights that an uninterrupted training has there, its means where it keeps some."""
    ends: list[Tensor] = []
    end_epoch = loop._Training._end_epoch

    def watched(self: Any) -> None:
        end_epoch(self)
        with self.state.average.in_place() if ema else nullcontext():
            ends.append(weights(self.model))

    paused = make_model(0.3)
    fit(paused, checkpoints, 0.375, ema_decay=ema)
    monkeypatch.setattr(loop._Training, "_end_epoch", watched)
    fit(make_model(0.3), None, ema_decay=ema)
    assert torch.equal(weights(paused), ends[2])
    assert not torch.equal(weights(paused), ends[3])


def test_with_patience_the_best_weights_so_far_are_handed_over(checkpoints: Checkpoints) -> None:
    model = make_model(0.3)
    report = fit(model, checkpoints, 0.5, patience=8, lr=0.5, optimizer="sgd")
    ended = make_model(0.3)
    assert report.best_epoch is not None
    assert report.best_epoch <= 4
    if report.best_epoch < 4:
        fit(
            ended,
            Checkpoints(LocalStorage(Path(checkpoints.storage.url).parent / "other"), FOLDER, "identity"),
            report.best_epoch / 8,
            patience=8,
            lr=0.5,
            optimizer="sgd",
        )
        assert torch.equal(weights(model), weights(ended))


def test_a_rung_that_was_reached_is_not_trained_again(checkpoints: Checkpoints) -> None:
    first, again, steps = make_model(0.3), make_model(0.3), list[int]()
    fit(first, checkpoints, 0.375)
    report = fit(again, checkpoints, 0.125, steps)
    assert (steps, report.own_epochs, report.progress, report.paused) == ([], 0.0, 0.375, True)
    assert torch.equal(weights(again), weights(first))


def test_a_training_out_of_patience_is_at_its_end(checkpoints: Checkpoints) -> None:
    report = fit(make_model(), checkpoints, 0.9, patience=1, lr=1e-9)
    assert (report.paused, report.progress < 0.9) == (False, True)


def test_a_diverged_training_pauses_nowhere(checkpoints: Checkpoints) -> None:
    with pytest.raises(TrainingDiverged):
        fit(make_model(), checkpoints, 0.5, optimizer="sgd", lr=1e20, grad_clip=None)
    assert checkpoints.storage.files(FOLDER) == []


def test_a_pause_needs_a_place_to_go_on_from() -> None:
    with pytest.raises(ValueError, match="until needs checkpoints"):
        fit(make_model(), None, 0.5)


def test_shares_are_rounded_up_to_whole_epochs() -> None:
    found = [
        whole_epochs(share, epochs) for share, epochs in ((0.125, 8), (0.375, 8), (0.375, 4), (0.001, 5), (2 / 7, 7))
    ]
    assert found == [1, 3, 2, 1, 2]
