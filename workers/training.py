"""Training: the baseline, and the one joint recovery of a recipe in which all of its techniques' losses take part."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers.tasks.image_classification import Split
from workers.techniques.record import LossInputs, Technique

CHUNK_S = 0.2
"""Seconds of training between two calls of ``tick``."""

Steps = Sequence[tuple[Technique, Any]]


class TrainingDiverged(Exception):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class TrainingReport:
    """What a training did; ``final_loss`` is the mean total loss of its last epoch."""

    epochs: int
    steps: int
    final_loss: float
    seconds: float


def train(
    model: nn.Module,
    split: Split,
    settings: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device | str,
    steps: Steps = (),
    teacher_logits: Tensor | None = None,
    tick: Callable[[], None] = lambda: None,
) -> TrainingReport:
    """Trains ``model`` in place. The same seed gives the same weights on a CPU with the same number of threads.

    Args:
        model: on ``device``; (B, C, H, W) -> (B, classes). Left in eval mode.
        split: training images.
        settings: ``epochs, batch_size, lr, weight_decay, warmup_fraction, optimizer, schedule, label_smoothing,
            grad_clip, amp``.
        steps: techniques of the recipe with their configs; each may add a loss, parameter groups and a progress hook.
        teacher_logits: (N, classes) float32, row i belongs to image i of ``split``.
        tick: called about every :data:`CHUNK_S` seconds, when the device is idle.

    Raises:
        TrainingDiverged: the loss is not finite.
        ValueError: an unknown optimizer, schedule or amp.
    """
    device = torch.device(device)
    epochs, batch_size = int(settings["epochs"]), int(settings["batch_size"])
    total = epochs * math.ceil(len(split) / batch_size)
    optimizer = _optimizer(model, settings, steps)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    factor = _schedule(str(settings["schedule"]), float(settings["warmup_fraction"]))
    clip = settings.get("grad_clip")
    losses = _Losses(device, tick)
    started = time.monotonic()
    model.train()
    done = 0
    with _seeded(seed, device):
        for epoch in range(epochs):
            for indices, images, targets in split.batches(
                batch_size, shuffle_seed=seed * 1_000_003 + epoch, device=device
            ):
                progress = done / total
                for technique, config in steps:
                    if technique.on_progress is not None:
                        technique.on_progress(model, config, progress)
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor((done + 0.5) / total)
                teacher = None if teacher_logits is None else teacher_logits[indices].to(device)
                loss = _loss(model, images, targets, teacher, settings, steps, progress)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                if clip:
                    nn.utils.clip_grad_norm_(parameters, float(clip))
                optimizer.step()
                done += 1
                losses.add(loss.detach())
            losses.end_epoch()
    model.eval()
    return TrainingReport(epochs, done, losses.epoch_mean, time.monotonic() - started)


class _Losses:
    """Sums losses on the device and looks at them once a chunk, because reading every one would stall a GPU."""

    def __init__(self, device: torch.device, tick: Callable[[], None]) -> None:
        self._device, self._tick = device, tick
        self._sum, self._count, self._steps = torch.zeros((), device=device), 0, 0
        self._since = time.monotonic()
        self.epoch_mean = math.nan

    def add(self, loss: Tensor) -> None:
        self._sum += loss
        self._count += 1
        self._steps += 1
        if time.monotonic() - self._since >= CHUNK_S:
            self._end_chunk()

    def end_epoch(self) -> None:
        self._end_chunk()
        self.epoch_mean = float(self._sum) / max(self._count, 1)
        self._sum.zero_()
        self._count = 0

    def _end_chunk(self) -> None:
        """Checks the losses, which waits for the device, and lets others go first."""
        if not math.isfinite(found := float(self._sum)):
            raise TrainingDiverged(
                f"the loss must stay finite; it was {found} by step {self._steps}; "
                "lower the learning rate or set grad_clip"
            )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._tick()
        self._since = time.monotonic()


def _loss(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    teacher_logits: Tensor | None,
    settings: Mapping[str, Any],
    steps: Steps,
    progress: float,
) -> Tensor:
    """Returns task loss x product of the techniques' task weights + sum of their extra losses: a scalar."""
    amp = settings.get("amp", "none")
    if amp not in ("none", "bf16"):
        raise ValueError(f"amp must be none or bf16, got {amp!r}")
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=amp == "bf16"):
        logits = model(images)
    logits = logits.float()
    loss = F.cross_entropy(logits, targets, label_smoothing=float(settings.get("label_smoothing", 0.0)))
    inputs = LossInputs(model, images, logits, targets, teacher_logits, progress)
    terms = [t.loss(inputs, config) for t, config in steps if t.loss is not None]
    loss = loss * math.prod(term.task_weight for term in terms)
    for term in terms:
        loss = loss + term.extra
    return loss


def _optimizer(model: nn.Module, settings: Mapping[str, Any], steps: Steps) -> torch.optim.Optimizer:
    """Builds the optimiser: decayed matrices, undecayed vectors and embeddings, then the techniques' own groups."""
    lr, decay = float(settings["lr"]), float(settings["weight_decay"])
    own: list[dict[str, Any]] = []
    for technique, config in steps:
        if technique.parameter_groups is not None:
            own += [{**g, "params": list(g["params"])} for g in technique.parameter_groups(model, config)]
    claimed = {id(p) for group in own for p in group["params"]}
    no_decay: Callable[[], set[str]] = getattr(model, "no_weight_decay", set)
    excluded = no_decay()
    free = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in claimed]
    matrices = [p for n, p in free if p.ndim >= 2 and n not in excluded]
    others = [p for n, p in free if p.ndim < 2 or n in excluded]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}, *own]
    groups = [g for g in groups if g["params"]]
    name = settings["optimizer"]
    optimizer: torch.optim.Optimizer
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=decay, fused=True)
    elif name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, weight_decay=decay, momentum=0.9, nesterov=True, fused=True)
    else:
        raise ValueError(f"optimizer must be adamw or sgd, got {name!r}")
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _schedule(name: str, warmup: float) -> Callable[[float], float]:
    """Returns progress (0 to 1) -> share of the peak learning rate.

    ``one_cycle`` rises along a cosine from 1/25 (Smith and Topin 2017, arXiv 1708.07120), ``cosine`` rises linearly
    from 0; both fall along a cosine to 0 after the ``warmup`` share of the training.
    """
    if name not in ("one_cycle", "cosine"):
        raise ValueError(f"schedule must be one_cycle or cosine, got {name!r}")

    def factor(progress: float) -> float:
        if progress < warmup:
            rise = progress / warmup
            return rise if name == "cosine" else 1 - (1 - 1 / 25) * (1 + math.cos(math.pi * rise)) / 2
        return (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9))) / 2

    return factor


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws inside (dropout, gates) come from ``seed``; the random state outside is left as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
