"""Peak memory of models whose peak is known by hand: of weights alone, and of activations that a batch multiplies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from workers import artefact, models
from workers.measuring.peak_memory import (
    NotTellable,
    PeakMemory,
    peak_in_child,
    peak_memory,
)
from workers.measuring.protocols import CPU_RESOLUTION_BYTES, MIN_CPU_BYTES
from workers.tasks import TaskInfo

CPU = torch.device("cpu")

WIDE = {"embed_dim": 512, "depth": 1, "num_heads": 8, "patch_size": 8, "mlp_ratio": 32.0}
"""Of one patch, two tokens through two layers of 512 by 16384: next to nothing but weights."""

LONG = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 4, "mlp_ratio": 4.0}
TOKENS, C, HIDDEN = 257, 64, 256


def info(size: int) -> TaskInfo:
    return TaskInfo(num_classes=10, in_chans=3, image_size=size, class_names=())


def saved(folder: Path, create: dict[str, Any], size: int) -> int:
    """Writes an artefact; returns the bytes of its weights."""
    torch.manual_seed(0)
    section = {"family": "timm", "name": None, "create": create}
    model = models.build(section, info(size))
    artefact.save(model, folder, model_description=models.describe(section, info(size)), steps=[])
    return sum(p.nbytes for p in model.parameters())


def activations(batch: int) -> int:
    """Bytes that live while the last MLP applies GELU: the hidden tokens before and after it, and four of the model's width:
    the tokens as embedded, which timm keeps, those that the block takes, after its attention, and their norm."""
    return 4 * batch * TOKENS * (4 * C + 2 * HIDDEN)


def image_bytes(batch: int, size: int) -> int:
    return 4 * batch * 3 * size * size


def test_weights_alone(tmp_path: Path) -> None:
    weights = saved(tmp_path, WIDE, 8)
    found = peak_memory(tmp_path, 1, info(8), CPU, threads=1)
    assert weights > 60e6
    assert found.bytes == pytest.approx(weights, abs=CPU_RESOLUTION_BYTES)
    assert (found.resolution_bytes, found.method) == (CPU_RESOLUTION_BYTES, "resident growth in a fresh process")


def test_activations_that_a_batch_multiplies_and_one_image_too_small_to_be_told(tmp_path: Path) -> None:
    weights = saved(tmp_path, LONG, 64)
    assert weights < CPU_RESOLUTION_BYTES
    found = peak_memory(tmp_path, 96, info(64), CPU, threads=1)
    expected = weights + image_bytes(96, 64) + activations(96)
    assert expected > 75e6
    assert found.bytes == pytest.approx(expected, abs=CPU_RESOLUTION_BYTES)
    words = (
        f"told from {MIN_CPU_BYTES} bytes on, with a resolution of {CPU_RESOLUTION_BYTES}; .* at batch 1: take a larger"
    )
    with pytest.raises(NotTellable, match=words):
        peak_memory(tmp_path, 1, info(64), CPU, threads=1)


def test_a_system_without_proc_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NotTellable, match="read from /proc, which this system does not have"):
        peak_memory(tmp_path, 1, info(64), CPU, threads=1)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo no such artefact >&2; exit 3", "at batch 5 ended with exit status 3: no such artefact"),
        (
            "kill -9 $$",
            "at batch 5 ended with signal 9, which the system sends when memory runs out: nothing on stderr",
        ),
    ],
)
def test_a_process_that_fails_says_how(
    script: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(NotTellable, match=words):
        peak_in_child(tmp_path, 5, info(64), CPU, threads=1)


@pytest.mark.gpu
def test_the_cuda_allocator_tells_it_exactly(tmp_path: Path) -> None:
    weights = saved(tmp_path, LONG, 64)
    device = torch.device("cuda")
    one, again, two = (peak_memory(tmp_path, batch, info(64), device, threads=1) for batch in (512, 512, 1024))
    assert one == again == PeakMemory(one.bytes, 0, "allocator peak in a fresh process")
    assert one.bytes >= weights + image_bytes(512, 64) + activations(512)
    grown = image_bytes(512, 64) + activations(512)
    assert two.bytes - one.bytes == pytest.approx(grown, rel=0.01)  # workspaces do not grow, blocks are rounded up
