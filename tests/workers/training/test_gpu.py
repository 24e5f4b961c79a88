"""Training on CUDA: mixed precision, reading ahead, distortion in processes, going on. Run with ``pytest -m gpu``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.workers.techniques.models import vit
from workers.node.storage import LocalStorage
from workers.tasks.batches import Loader, Split
from workers.training import checkpoint
from workers.training.checkpoint import Checkpoints
from workers.training.loop import train

pytestmark = [
    pytest.mark.gpu,
]

SETTINGS: dict[str, Any] = {
    "epochs": 3, "batch_size": 16, "lr": 1e-3, "weight_decay": 0.05, "warmup_fraction": 0.1, "optimizer": "adamw",
    "schedule": "cosine", "grad_clip": 1.0,
}  # fmt: skip


def split(count: int = 50) -> Split:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return Split(pixels, generator.integers(0, 5, count), (0.5,) * 3, (0.25,) * 3)


def test_batches_read_ahead_are_those_of_the_cpu() -> None:
    here, there = Loader(split(), 8).epoch(shuffle_seed=1), Loader(split(), 8, device="cuda").epoch(shuffle_seed=1)
    for one, other in zip(here, there, strict=True):
        assert other[1].device.type == "cuda"
        assert all(torch.equal(a, b.cpu()) for a, b in zip(one[:1] + one[2:], other[:1] + other[2:], strict=True))
        torch.testing.assert_close(one[1], other[1].cpu())


@pytest.mark.parametrize(
    "settings",
    [
        {"amp": "bf16", "grad_checkpointing": True, "ema_decay": 0.9},
        {"amp": "fp16", "accumulate": 2, "augment": "flip_crop"},
        {"augment": "randaugment", "mixup": 0.2, "cutmix": 1.0, "patience": 3},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_it_trains_and_goes_on(tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MOST_SHARE", math.inf)
    data, storage, ticks = split(), LocalStorage(tmp_path), []

    def stop() -> None:
        ticks.append(1)
        if len(ticks) == 2 * settings.get("patience", 1):
            raise KeyboardInterrupt

    def fit(**more: Any) -> Any:
        model = vit().to("cuda")
        checkpoints = Checkpoints(storage, "training", "k")
        every = {**SETTINGS, **settings, "checkpoint_s": 1e-9}
        return train(model, data, every, seed=0, device="cuda", validation=data, checkpoints=checkpoints, **more)

    with pytest.raises(KeyboardInterrupt):
        fit(tick=stop)
    report = fit()
    assert 0 < report.resumed_at < report.steps <= 12
    assert math.isfinite(report.final_loss)
