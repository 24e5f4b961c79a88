"""Accuracy, its interval, and outputs that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workers.evaluation import NotFiniteOutput, evaluate, predict_logits, wilson
from workers.tasks.image_classification import Split


def make_split(labels: list[int]) -> Split:
    """Images of 1x1 whose pixel is the index."""
    count = len(labels)
    images = np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1)
    return Split(images, np.asarray(labels, dtype=np.int64), (0.0,), (1.0,))


class Table(nn.Module):
    """Answers image i with row i of a table."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, images: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        return self.rows[images.flatten().long()]


def test_accuracy_counts_what_is_right() -> None:
    rows = torch.eye(3)[[0, 1, 2, 0, 1]].to(torch.bfloat16)
    ticks: list[int] = []
    model = Table(rows).train()
    found = evaluate(model, make_split([0, 1, 2, 2, 2]), device="cpu", batch_size=2, tick=lambda: ticks.append(1))
    (accuracy,) = found.accuracies
    assert (accuracy.metric, accuracy.correct, accuracy.total, accuracy.pct) == ("top1_pct", 3, 5, 60.0)
    assert found.correct == 3
    assert len(ticks) == 3
    assert model.training
    assert found.logits_digest == evaluate(model, make_split([0] * 5), device="cpu").logits_digest


def test_logits_are_in_order_and_can_be_trained_on() -> None:
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    logits = predict_logits(Table(rows), make_split([0] * 7), device="cpu", batch_size=3)
    assert torch.equal(logits, rows)
    assert not logits.is_inference()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_that_is_not_finite_is_named(value: float) -> None:
    rows = torch.zeros(5, 3)
    rows[3, 1] = value
    with pytest.raises(NotFiniteOutput, match="those of 1 of 5 images are not, first of image 3"):
        evaluate(Table(rows), make_split([0] * 5), device="cpu", batch_size=2)


def test_wilson_against_known_values_and_its_equation() -> None:
    low, high = wilson(81, 263)  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1, abs=1e-12)
    for end in wilson(17, 60):  # both ends solve |p - end| = z sqrt(end (1 - end) / n)
        assert abs(17 / 60 - end) == pytest.approx(1.959963984540054 * (end * (1 - end) / 60) ** 0.5)
